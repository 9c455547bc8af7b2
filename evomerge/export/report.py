"""The report of an export: what is claimed of a candidate, and everything that it rests on."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import evomerge
from evomerge.errors import StoreError
from evomerge.export.reading import Reading, read
from evomerge.fitness.results import Scores, weighted_mean
from evomerge.guard import estimates, selection
from evomerge.progress import Steps
from evomerge.search.setting import Setting, versions
from evomerge.search.wear import Wear, more_looks, tests_of, wear
from evomerge.seeds import generator
from evomerge.store import CandidateRow, Coordinator


def report_on(
    setting: Setting, coordinator: Coordinator, candidate: CandidateRow, folder: Path, steps: Steps
) -> dict[str, Any]:
    """Unseal test, score the exported files in `folder` and the best parent on it, and put the
    report together, as plain data.

    Raises StoreError while there are parents that were not scored, before the seal is opened.
    """
    store, row = coordinator.store, coordinator.search
    parent = str(_best_parent(setting, coordinator).label)
    worn = wear(store, tests_of(store, row.id), apart_from=row.name)
    reading = read(setting, coordinator, candidate, parent, folder, steps)
    verdict = row.verdict or {}
    is_winner = candidate.id == verdict.get("winner")
    candidates = store.candidates(row.id, with_genotypes=False)
    full = store.means(row.id, "full")
    later = more_looks(store, row)
    return {
        "search": row.name,
        "candidate": candidate.id,
        "label": candidate.label,
        "recipe_sha": candidate.recipe_sha,
        "winner": is_winner,
        "best_parent": parent,
        "promoted": bool(verdict.get("promoted")) if is_winner else False,
        "post_hoc": bool(later),
        "claim": _claim(setting, candidate, reading),
        "estimates": {
            **(verdict["estimates"] if is_winner else _of_another(setting, coordinator, candidate)),
            "test": estimates.score_estimate(reading.ours, setting.weights).as_dict(),
        },
        "best_parent_test": estimates.score_estimate(reading.theirs, setting.weights).as_dict(),
        "test_scores": {
            task: _on_test(ours, reading.theirs[task]) for task, ours in reading.ours.items()
        },
        "candidates_tried": sum(c.label is None for c in candidates),
        "looks": {
            "used": sum(r.kind == "look" and r.search == row.id for r in store.ledger()),
            "allowed": setting.job.guard.validation_looks,
        },
        "more_looks": [asdict(looks) for looks in later],
        "seal": {task: _seal(task, reading, setting, worn) for task in setting.tasks},
        "contamination": store.contamination(row.id),
        "baselines": {
            str(c.label): {t: {"score": m.mean, "n": m.n} for t, m in full[c.id].items()}
            for c in candidates
            if c.generation == 0 and c.id in full
        },
        "parents": [
            {"name": name, "uri": m["uri"], "revision": m["revision"], "sha256": m["sha256"]}
            for name, m in store.models(row.id).items()
        ],
        "stop_reason": row.stop_reason,
        "seed": row.seed,
        "versions": {"launch": row.versions, "export": versions()},
        "evomerge": evomerge.__version__,
    }


def _best_parent(setting: Setting, coordinator: Coordinator) -> CandidateRow:
    """The best source model: fixed by the verdict, or else by all of train."""
    store, row = coordinator.store, coordinator.search
    sources = {*setting.named.parents, "base"}
    compared = store.candidates(row.id, generation=0, with_genotypes=False)
    rows = [c for c in compared if c.label in sources]
    if not rows or any(c.fitness is None for c in rows):
        raise StoreError(f"search '{row.name}' has not scored its parents yet: resume it first")
    if row.verdict:
        return next(c for c in rows if c.id == row.verdict["best_parent"])
    means = store.means(row.id, "full")

    def plain(candidate: CandidateRow) -> float:
        scores = {task: means[candidate.id][task].mean for task in setting.weights}
        return weighted_mean(scores, setting.weights)

    return max(rows, key=lambda c: (plain(c), c.fitness))


def _claim(setting: Setting, candidate: CandidateRow, reading: Reading) -> dict[str, Any]:
    """The gain over the best parent on the same items; those of a group are drawn together."""
    groups = setting.splits.groups("test")
    # By its place, not its id: another store may give the same candidate another id.
    random = generator(setting.job.seed, f"claim {candidate.generation}", candidate.slot)
    gain = estimates.paired_gain(reading.ours, reading.theirs, setting.weights, random, groups)
    return {
        "gain": gain.estimate.value,
        "interval": list(gain.estimate.interval),
        "level": estimates.LEVEL,
        "p_value": gain.p_value,
        "n": gain.n,
    }


def _of_another(
    setting: Setting, coordinator: Coordinator, candidate: CandidateRow
) -> dict[str, Any]:
    """Estimates of a candidate that did not win. What choosing it would lead to on new examples
    (bbc_cv) is not known: the search did not choose it."""
    store, row, weights = coordinator.store, coordinator.search, setting.weights
    found: dict[str, dict[int, list[dict[str, Scores]]]] = {}
    for e in store.evaluations(row.id, ("train", "full", "validation")):
        if e.scores:
            found.setdefault(e.purpose, {}).setdefault(e.candidate, []).append(e.scores)
    tried = selection.Tried()
    for other in store.candidates(row.id, with_genotypes=False):
        if other.label is None and other.recipe_sha and other.id in found.get("train", {}):
            tried.add(other.recipe_sha, _joined(found["train"][other.id]), weights)
    # Baselines are scored on all of train alone, and are not the best of anything.
    purpose = "train" if candidate.id in found.get("train", {}) else "full"
    raw = estimates.score_estimate(_joined(found[purpose][candidate.id]), weights)
    sha, looked = candidate.recipe_sha or "", found.get("validation", {}).get(candidate.id)
    return {
        "raw_train": raw.as_dict(),
        "shrunk": (tried.estimate(sha) if sha in tried else raw).as_dict(),
        "bbc_cv": None,
        "validation": looked and estimates.score_estimate(looked[0], weights).as_dict(),
    }


def _joined(parts: list[dict[str, Scores]]) -> dict[str, Scores]:
    """The results of all stages."""
    return {task: Scores.joined([part[task] for part in parts]) for task in parts[0]}


def _on_test(ours: Scores, theirs: Scores) -> dict[str, Any]:
    return {
        "exported": ours.mean,
        "best_parent": theirs.mean,
        "n": len(ours),
        "truncated": float(ours.truncated.mean()),
        "best_parent_truncated": float(theirs.truncated.mean()),
    }


def _seal(task: str, reading: Reading, setting: Setting, worn: list[Wear]) -> dict[str, Any]:
    """opened_before: for how many other recipes, by `searches`. overlaps: other test splits with
    items of this one that were opened before."""
    content, opening = setting.tasks[task].identity("test"), reading.openings[task]
    return {
        "test_content": content,
        "opened_at": opening.at,
        "opened_by": opening.search,
        "opened_before": opening.before,
        "searches": list(opening.searches),
        "overlaps": [
            {"times": w.times, "searches": list(w.searches), "share": w.share}
            for w in worn
            if w.task == task and w.content != content
        ],
    }
