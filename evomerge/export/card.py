"""The model card of an export: front matter for a hub, then what a reader should know."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.licence import terms_of
from evomerge.merge.plan import Plan
from evomerge.reference import halves, hub_id
from evomerge.report.caveats import caveats, opened_before
from evomerge.search.summary import ESTIMATES


def model_card(report: Mapping[str, Any], plan: Plan, models: Mapping[str, Checkpoint]) -> str:
    """README.md of an export folder, in Markdown with YAML front matter."""
    claim, test, looks = report["claim"], report["estimates"]["test"], report["looks"]
    low, high = claim["interval"]
    rows = "\n".join(
        f"| {task} | {s['exported']:.1%} | {s['best_parent']:.1%} | {s['truncated']:.1%}, "
        f"{s['best_parent_truncated']:.1%} | {s['n']:,} |"
        for task, s in report["test_scores"].items()
    )
    parents = "\n".join(
        f"- {p['name']}: `{p['uri']}` (sha256 `{p['sha256'][:16]}`)" for p in report["parents"]
    )
    warnings = "".join(f"**Mind:** {caveat}.\n\n" for caveat in caveats(report))
    return f"""{_front_matter(plan, models)}# A merge found by evomerge

{_origin(report)}

On the {_opening(report)}, on the files in this folder: {test["value"]:.1%}
(95% interval {test["interval"][0]:.1%} to {test["interval"][1]:.1%}); the gain over the best
parent, `{report["best_parent"]}`, is {100 * claim["gain"]:+.1f} points
({100 * low:+.1f} to {100 * high:+.1f}, p = {claim["p_value"]:.2g}).

{warnings}| task | this model | best parent | answers cut off | examples |
|---|---|---|---|---|
{rows}

What is known of how good it is, one of {report["candidates_tried"]:,} candidates, after
{looks["used"]} of {looks["allowed"]} looks at validation:

| estimate | score | 95% interval |
|---|---|---|
{_estimates(report)}

Merged from:

{parents}

The recipe is `mergekit_config.yml`; every number, with how it came about, is in
`evomerge_report.json`, and for people in `report.html`.
"""


def _estimates(report: Mapping[str, Any]) -> str:
    rows = []
    for key, words in ESTIMATES.items():
        found = report["estimates"].get(key)
        if found is None:
            continue
        low, high = found["interval"]
        rows.append(f"| {words} | {found['value']:.1%} | {low:.1%} to {high:.1%} |")
    return "\n".join(rows)


def merge_card(plan: Plan, models: Mapping[str, Checkpoint]) -> str:
    """README.md of a merge by hand: what it was made of, and how."""
    named = plan.recipe.model_names()
    parents = "\n".join(
        f"- `{models[name].uri if models[name].revision else name}`" for name in named
    )
    return f"""{_front_matter(plan, models)}# A merge

Made by evomerge with the method `{plan.recipe.merge_method}` from:

{parents}

The recipe, which is also in `mergekit_config.yml`:

```yaml
{plan.recipe.to_yaml().rstrip()}
```
"""


def _front_matter(plan: Plan, models: Mapping[str, Checkpoint]) -> str:
    """What a hub reads. It refuses a base_model that it does not have, such as a folder."""
    terms, donor = terms_of(models.values()), models[plan.donor]
    is_link = terms.link is not None and "://" in terms.link  # not a file beside another model
    library = (
        "diffusers" if "_class_name" in donor.config else None if donor.plain else "transformers"
    )
    parents = [name for m in plan.recipe.model_names() for name in _on_hub(models[m])]
    front = {
        "license": terms.licence,
        "license_name": terms.name,
        "license_link": terms.link if is_link else None,
        "library_name": library,
        "base_model": list(dict.fromkeys(parents)),
        "base_model_relation": "merge",
        "tags": ["merge", "mergekit", "evomerge"],
    }
    front = {key: value for key, value in front.items() if value}
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def _on_hub(model: Checkpoint) -> Iterator[str]:
    """The repositories that a model, and its adapter, come from."""
    for half in halves(model.uri, lambda name: Path(name).is_dir()):
        found = hub_id(half) if half else None
        if found is not None:
            yield found.repository


def _origin(report: Mapping[str, Any]) -> str:
    """Which candidate this is, and whether a gate judged it: only a winner was judged."""
    label = "the mean of the distribution" if report["label"] == "mean" else report["label"]
    candidate = f"candidate {report['candidate']}" + (f" ({label})" if label else "")
    search = f"search `{report['search']}`, which tried {report['candidates_tried']:,} candidates"
    if not report["winner"]:
        return (
            f"This is {candidate} of {search}.\nIt was chosen by hand: it is not the search's "
            "winner, and no gate judged whether it beats the best parent."
        )
    if report["promoted"]:
        verdict = "promoted: on validation it beats the best parent beyond what luck explains."
    else:
        verdict = "**not** promoted: validation did not show that it beats the best parent."
    return f"This is the winner, {candidate}, of {search}.\nIt was {verdict}"


def _opening(report: Mapping[str, Any]) -> str:
    """What the number was measured on: a split that was opened before is not sealed any more."""
    before = opened_before(report)
    if not before:
        return "sealed test split, read once"
    return f"test split, opened for {before} other recipe{'s' if before > 1 else ''} before"
