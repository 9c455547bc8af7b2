"""How a stored search stands, as plain data: what `show` and `top` say. Reads the store alone."""

import math
from collections import Counter
from typing import Any

from evomerge.guard.estimates import combined, wilson
from evomerge.store import CandidateRow, MeanRow, SearchRow, Store


def show(store: Store, name: str) -> dict[str, Any]:
    """Everything that `evomerge show --json` says. Raises StoreError for an unknown search.

    `best` is the winner once there is one, before that the incumbent of the last generation (of
    those scored to the end: a few examples flatter), in the first one the fittest.
    Scores are in [0, 1], each with n and its interval at level 0.95; `score` is the weighted
    mean over the tasks, on train and on validation (None where it was not scored).
    `unsealed_for`: for how many recipes a test split of this search was unsealed, by whichever
    search of this store. `front`: of a search with several objectives, the candidates that no
    other beats in all of them, with their values, higher being better; `hypervolume` is what the
    front dominates.
    """
    row = store.search(name)
    candidates = store.candidates(row.id)
    full, train = store.means(row.id, "full"), store.means(row.id, "train")
    looked = store.means(row.id, "validation")
    proposed = [c for c in candidates if c.label is None]
    verdict = row.verdict or {}
    by_id = {c.id: c for c in candidates}
    weights = _task_weights(store, row)

    def described(candidate: CandidateRow) -> dict[str, Any]:
        on_train = full.get(candidate.id) or train.get(candidate.id) or {}
        on_validation = looked.get(candidate.id) or {}
        return {
            "candidate": candidate.id,
            "generation": candidate.generation,
            "slot": candidate.slot,
            "label": candidate.label,
            "fitness": candidate.fitness,
            "objectives": candidate.objectives,
            "violation": candidate.violation,
            "score": {
                "train": _overall(on_train, weights),
                "validation": _overall(on_validation, weights),
            },
            "train": _scores(on_train),
            "validation": _scores(on_validation) if on_validation else None,
        }

    sources = [*row.job["parents"], *(["base"] if "base" in row.job else [])]
    baselines = {str(c.label): described(c) for c in candidates if c.generation == 0}
    generations = store.generations(row.id)
    reviews = [g.review for g in generations if g.review]
    latest = reviews[-1] if reviews else {}
    leader = by_id.get(verdict.get("winner", latest.get("incumbent", -1)))
    best = leader or _fittest(proposed)
    return {
        "name": row.name,
        "state": row.state,
        "seed": row.seed,
        "optimizer": row.job["optimizer"]["name"],
        "objective": row.job["objective"],
        "created_at": row.created_at,
        "generations": sum(g.kind == "proposed" and g.told for g in generations),
        "candidates": dict(Counter(c.state for c in proposed)),
        "best": described(best) if best else None,
        "parents": {n: baselines[n] for n in sources if n in baselines},
        "baselines": {n: d for n, d in baselines.items() if n not in sources},
        "finalists": [described(by_id[id]) for id in verdict.get("finalists", [])],
        "best_parent": verdict.get("best_parent"),
        "promoted": verdict.get("promoted"),
        "violation": verdict.get("violation"),
        "validation_gain": verdict.get("validation_gain"),
        "estimates": verdict.get("estimates"),
        "budget": _budget(store, row, len(proposed)),
        "looks": {
            "used": sum(r.kind == "look" and r.search == row.id for r in store.ledger()),
            "allowed": row.job["guard"]["validation_looks"],
        },
        "gap": latest if latest.get("gap") is not None else None,
        "objectives": row.job.get("objectives"),
        "front": [_on_front(by_id[id]) for id in latest.get("front", [])],
        "hypervolume": latest.get("hypervolume"),
        "constraints": row.job.get("constraints"),
        "stop_reason": row.stop_reason,
        "unsealed_for": _unsealed_for(store, row),
        "tasks": _sizes(store, row),
    }


def top(store: Store, name: str, count: int | None) -> list[dict[str, Any]]:
    """The candidates of a search, the best first: whoever keeps the constraints, was scored on
    more examples, is fitter, in this order; those without a result last."""
    row = store.search(name)
    candidates = store.candidates(row.id)
    full, train = store.means(row.id, "full"), store.means(row.id, "train")
    found = {c.id: train.get(c.id) or full.get(c.id) or {} for c in candidates}

    n = {id: sum(row.n for row in tasks.values()) for id, tasks in found.items()}
    most = max((n[c.id] for c in candidates if c.label is None), default=0)

    def standing(candidate: CandidateRow) -> tuple[float, ...]:
        fitness = -math.inf if candidate.fitness is None else candidate.fitness
        return (
            candidate.state == "scored",
            -(candidate.violation or 0.0),
            min(n[candidate.id], most),  # baselines were scored on all of train
            fitness,
            -candidate.generation,
            -candidate.slot,
        )

    order = sorted(candidates, key=standing, reverse=True)
    return [
        {
            "id": c.id,
            "generation": c.generation,
            "slot": c.slot,
            "label": c.label,
            "state": c.state,
            "fitness": c.fitness,
            "objectives": c.objectives,
            "violation": c.violation,
            "scores": {task: row.mean for task, row in found[c.id].items()},
            "recipe_sha": c.recipe_sha,
        }
        for c in order[:count]
    ]


def ls(store: Store) -> list[dict[str, Any]]:
    """A line for each search of the store."""
    rows = []
    for row in store.searches():
        candidates = store.candidates(row.id)
        proposed = [c for c in candidates if c.label is None]
        rows.append(
            {
                "name": row.name,
                "state": row.state,
                "generations": max((c.generation for c in proposed), default=0),
                "candidates": len(proposed),
                "best_fitness": max(
                    (c.fitness for c in proposed if c.fitness is not None), default=None
                ),
                "created_at": row.created_at,
                "hours": row.active_seconds / 3600,
                "stop_reason": row.stop_reason,
            }
        )
    return rows


def _task_weights(store: Store, row: SearchRow) -> dict[str, float]:
    """The tasks' shares of the objective, by task name; the job names its tasks by file."""
    names = dict.fromkeys(task for task, _ in store.splits(row.id))
    return {t: entry["weight"] for t, entry in zip(names, row.job["tasks"], strict=True)}


def _unsealed_for(store: Store, row: SearchRow) -> int:
    """For how many recipes a test split of this search was unsealed, by any search of the store."""
    own = {s.identity for (_, split), s in store.splits(row.id).items() if split == "test"}
    unseals = [r for r in store.ledger() if r.kind == "unseal" and r.content in own]
    return len({r.subject for r in unseals})


def _overall(means: dict[str, MeanRow], weights: dict[str, float]) -> dict[str, Any] | None:
    """The weighted mean over the tasks with its interval, see guard.estimates.combined; n: of
    those with a weight."""
    if not means:
        return None
    n = sum(row.n for task, row in means.items() if weights[task])
    pairs = {task: (row.mean, row.n) for task, row in means.items()}
    return {**combined(pairs, weights).as_dict(), "n": n}


def _scores(means: dict[str, MeanRow]) -> dict[str, dict[str, Any]]:
    """truncated: share of the replies that the token limit cut off. tokens: of a reply, on
    average. overlong, failed: examples that did not fit into the context, or have a reply that
    could not be graded."""
    return {
        task: {
            "score": row.mean,
            "n": row.n,
            "interval": list(wilson(row.mean, row.n).interval),
            "truncated": row.truncated,
            "tokens": row.tokens,
            "overlong": row.overlong,
            "failed": row.failed,
        }
        for task, row in means.items()
    }


def _fittest(candidates: list[CandidateRow]) -> CandidateRow | None:
    scored = [c for c in candidates if c.fitness is not None]
    return max(scored, key=lambda c: c.fitness or 0.0, default=None)


def _budget(store: Store, row: SearchRow, proposed: int) -> dict[str, Any]:
    used = {
        "candidates": proposed,
        "example_evaluations": store.example_evaluations(row.id),
        "hours": row.active_seconds / 3600,
        "gpu_hours": store.device_seconds(row.id) / 3600,
    }
    allowed = row.job["budget"]
    return {key: {"used": value, "allowed": allowed.get(key)} for key, value in used.items()}


def _on_front(candidate: CandidateRow) -> dict[str, Any]:
    return {
        "candidate": candidate.id,
        "generation": candidate.generation,
        "slot": candidate.slot,
        "objectives": candidate.objectives,
    }


def _sizes(store: Store, row: SearchRow) -> dict[str, dict[str, int]]:
    sizes: dict[str, dict[str, int]] = {}
    for (task, split), found in store.splits(row.id).items():
        sizes.setdefault(task, {})[split] = found.n
    return sizes
