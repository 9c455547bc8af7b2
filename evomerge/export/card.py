"""The model card of an export: front matter for a hub, then what a reader should know."""

from collections.abc import Mapping
from typing import Any

import yaml

from evomerge.merge.plan import Plan


def model_card(report: Mapping[str, Any], plan: Plan, licence_name: str) -> str:
    """README.md of an export folder, in Markdown with YAML front matter."""
    front = {
        "license": licence_name,
        "library_name": "transformers",
        "base_model": list(plan.recipe.model_names()),
        "base_model_relation": "merge",
        "tags": ["merge", "mergekit", "evomerge"],
    }
    claim, test = report["claim"], report["estimates"]["test"]
    low, high = claim["interval"]
    verdict = (
        "It was promoted: on validation it beats the best parent beyond what luck explains."
        if report["promoted"]
        else "It was **not** promoted: validation did not show that it beats the best parent."
    )
    rows = "\n".join(
        f"| {task} | {s['winner']:.1%} | {s['best_parent']:.1%} | {s['n']:,} |"
        for task, s in report["test_scores"].items()
    )
    parents = "\n".join(
        f"- {p['name']}: `{p['uri']}` (sha256 `{p['sha256'][:16]}`)" for p in report["parents"]
    )
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"""---
{header}---
# A merge found by evomerge

Candidate {report["candidate"]} of search `{report["search"]}`, the best of
{report["candidates_tried"]:,} candidates tried. {verdict}

On the sealed test split, read once, on the files in this folder: {test["value"]:.1%}
(95% interval {test["interval"][0]:.1%} to {test["interval"][1]:.1%}); the gain over the best
parent, `{report["best_parent"]}`, is {100 * claim["gain"]:+.1f} points
({100 * low:+.1f} to {100 * high:+.1f}, p = {claim["p_value"]:.2g}).

| task | this model | best parent | examples |
|---|---|---|---|
{rows}

Merged from:

{parents}

The recipe is `mergekit_config.yml`; every number, with how it came about, is in
`evomerge_report.json`.
"""
