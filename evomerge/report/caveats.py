"""What makes the claim of a stored report less than it seems, in words. Knows reports alone."""

from collections.abc import Mapping, Sequence
from typing import Any


def opened_before(report: Mapping[str, Any]) -> int:
    """For how many recipes a test split of the report was opened earlier: of all, the most worn."""
    return max((int(seal["opened_before"]) for seal in report["seal"].values()), default=0)


def caveats(report: Mapping[str, Any]) -> list[str]:
    """What makes the claim of a report less than it seems, each in words."""
    # Reports stay as they were stored: those of older versions have fewer keys.
    found = [
        f"post hoc: the search was allowed {looks['allowed']} looks at validation instead of "
        f"{looks['before']} on {looks['at'][:10]}"
        + (", after its test split had been opened" if looks["opened"] else "")
        for looks in report.get("more_looks", [])
    ]
    for task, seal in report["seal"].items():
        if seal.get("opened_by", report["search"]) != report["search"]:
            by = _searches([seal["opened_by"]])
            found.append(
                f"this recipe was read on the test split of `{task}` by {by}, once for both"
            )
        if seal["opened_before"]:
            of = f"{seal['opened_before']:,} other recipe{'s' if seal['opened_before'] > 1 else ''}"
            by = f" by {_searches(seal['searches'])}" if "searches" in seal else ""
            found.append(
                f"the test split of `{task}` was opened for {of} before{by}: the claim is worn, "
                "its p-value no longer that of a first reading"
            )
        for overlap in seal.get("overlaps", []):
            share = f"{100 * overlap['share']:.2g}% of the test split of `{task}`"
            found.append(f"{share} was opened before, by {_searches(overlap['searches'])}")
    return found + _contaminated(report.get("contamination") or {})


def _contaminated(contamination: Mapping[str, Any]) -> list[str]:
    """What was found at launch of items that more than one split has."""
    found = []
    if contamination.get("benchmarks"):
        names = ", ".join(dict.fromkeys(use["benchmark"] for use in contamination["benchmarks"]))
        found.append(f"the search was driven by test sets of public benchmarks: {names}")
    quarantined = sum(
        len(positions)
        for splits in contamination.get("quarantined", {}).values()
        for positions in splits.values()
    )
    if quarantined:
        found.append(
            f"{quarantined:,} items were left out, as another split asks them too in nearly the "
            "same words"
        )
    return found


def _searches(names: Sequence[str]) -> str:
    return f"search{'es' if len(names) > 1 else ''} {', '.join(f'`{name}`' for name in names)}"
