"""How a stored search stands, as plain data: what `show` and `top` say. Reads the store alone."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from evomerge.devices import Device
from evomerge.guard.estimates import combined, wilson
from evomerge.guard.review import Used
from evomerge.job import Budget
from evomerge.search.pace import seconds_left
from evomerge.search.wear import more_looks, tests_of, wear
from evomerge.store import NOT_BEGUN, CandidateRow, MeanRow, SearchRow, Store, Sums, consistent

# What is known of how good a candidate is, from the most flattering on, each in words.
ESTIMATES = {
    "raw_train": "train, raw: it flatters what was chosen by it",
    "shrunk": "train, shrunk: the luck of being chosen taken out",
    "bbc_cv": "BBC-CV: what choosing by train gives elsewhere",
    "validation": "validation: it flatters what was chosen by it",
    "validation_bbc": "validation, BBC: what choosing a finalist by it gives",
    "test": "test",
}


@consistent
def show(store: Store, name: str) -> dict[str, Any]:
    """Everything that `evomerge show --json` says. Raises StoreError for an unknown search.

    `best` is the winner once there is one, before that the incumbent of the last generation (of
    those scored to the end: a few examples flatter), in the first one the fittest.
    Scores are in [0, 1], each with n and its interval at level 0.95; `score` is the weighted
    mean over the tasks, on train and on validation (None where it was not scored).
    `estimates`: of `best`, each with its interval: raw_train and shrunk, and of a winner bbc_cv,
    validation, validation_bbc and, once it is exported, test; None what there is not (yet).
    `unsealed_for`: for how many recipes a test split of this search was unsealed, `unsealed_by`
    which searches of this store; `worn`: what others have opened of it. `post_hoc`: whether looks
    were asked for after the launch, `more_looks` which. `contamination`: what was found at launch.
    `devices`: where the time of each went, in seconds, see devices.Device; idle: what is left of
    held; busy: the share of held in which it merged or scored. `time`: the same of all together,
    median and longest seconds of a proposed candidate that was evaluated, and the mean that an
    evaluation waited for a device. `seconds_left`: until a limit of the budget is reached, at the
    pace so far, while generations are proposed, or would be if a stopped search were resumed; None
    before a candidate was scored, and afterwards.
    `front`: of a search with several objectives, the candidates that no other beats in all of
    them, with their values, higher being better; `hypervolume` is what the front dominates.
    """
    row = store.search(name)
    verdict = row.verdict or {}
    latest = store.latest_review(row.id)
    progress = store.progress().get(row.id, NOT_BEGUN)
    leader = verdict.get("winner", latest.get("incumbent")) or store.fittest(row.id)
    front, finalists = latest.get("front", []), verdict.get("finalists", [])
    # Of thousands of candidates a few are told about: nothing is read of the rest.
    compared = store.candidates(row.id, generation=0, with_genotypes=False)
    named = [*front, *finalists] if leader is None else [*front, *finalists, leader]
    chosen = store.candidates(row.id, ids=named, with_genotypes=False)
    by_id = {c.id: c for c in (*compared, *chosen)}
    full, train = store.means(row.id, "full", by_id), store.means(row.id, "train", by_id)
    looked = store.means(row.id, "validation", by_id)
    weights = task_weights(store, row)

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
    baselines = {str(c.label): described(c) for c in compared}
    best = None if leader is None else described(by_id[leader])
    tried = sum(progress.candidates.values())
    used = _used(store, row, tried)
    unseals, later = _unseals(store, row), more_looks(store, row)
    return {
        "name": row.name,
        "state": row.state,
        "seed": row.seed,
        "optimizer": row.job["optimizer"]["name"],
        "objective": row.job["objective"],
        "created_at": row.created_at,
        "generations": progress.generations,
        "candidates": progress.candidates,
        "best": best,
        "parents": {n: baselines[n] for n in sources if n in baselines},
        "baselines": {n: d for n, d in baselines.items() if n not in sources},
        "finalists": [described(by_id[id]) for id in finalists],
        "best_parent": verdict.get("best_parent"),
        "promoted": verdict.get("promoted"),
        "violation": verdict.get("violation"),
        "validation_gain": verdict.get("validation_gain"),
        "estimates": _estimates(store, row, best, latest),
        "candidates_tried": tried,
        "budget": _budget(row, used),
        "seconds_left": _seconds_left(row, used, progress.candidates.get("open", 0)),
        "devices": [_account(device) for device in store.devices(row.id)],
        "time": _time(store, row),
        "looks": {
            "used": sum(r.kind == "look" and r.search == row.id for r in store.ledger()),
            "allowed": row.job["guard"]["validation_looks"],
        },
        "post_hoc": bool(later),
        "more_looks": [asdict(looks) for looks in later],
        "gap": latest if latest.get("gap") is not None else None,
        "objectives": row.job.get("objectives"),
        "front": [_on_front(by_id[id]) for id in front],
        "hypervolume": latest.get("hypervolume"),
        "constraints": row.job.get("constraints"),
        "stop_reason": row.stop_reason,
        "unsealed_for": len({recipe for _, recipe in unseals}),
        "unsealed_by": dict(Counter(search for search, _ in unseals)),
        "worn": [
            {**asdict(found), "text": str(found)}
            for found in wear(store, tests_of(store, row.id), apart_from=row.name)
        ],
        "contamination": store.contamination(row.id),
        "tasks": _sizes(store, row),
    }


@consistent
def top(store: Store, name: str, count: int | None) -> list[dict[str, Any]]:
    """The candidates of a search, the best first: whoever keeps the constraints, was scored on
    more examples, is fitter, in this order; those without a result last.

    Fitness and scores are those on n examples of train, whose best flatter: see `show` for what may
    be believed.
    """
    row = store.search(name)
    sums = Sums(store, row.id)
    order = [int(key[-1]) for key in sums.keys("standing", True, {}, count)]
    ids = None if count is None else order
    by_id = {c.id: c for c in store.candidates(row.id, ids=ids, with_genotypes=False)}
    found = store.means(row.id, "full", ids) | store.means(row.id, "train", ids)
    seconds = sums.seconds(ids)
    return [
        {
            "id": c.id,
            "generation": c.generation,
            "slot": c.slot,
            "label": c.label,
            "state": c.state,
            "fitness": c.fitness,
            "n": sum(mean.n for mean in found.get(c.id, {}).values()),
            "objectives": c.objectives,
            "violation": c.violation,
            "scores": {task: row.mean for task, row in found.get(c.id, {}).items()},
            "recipe_sha": c.recipe_sha,
            "gpu_seconds": seconds.get(c.id, 0.0),
        }
        for c in map(by_id.__getitem__, order)
    ]


@consistent
def ls(store: Store) -> list[dict[str, Any]]:
    """A line for each search of the store."""
    progress = store.progress()
    return [
        {
            "name": row.name,
            "state": row.state,
            "generations": found.generations,
            "candidates": sum(found.candidates.values()),
            "shrunk": _shrunk_of(store, row),
            "created_at": row.created_at,
            "hours": row.active_seconds / 3600,
            "stop_reason": row.stop_reason,
        }
        for row in store.searches()
        for found in [progress.get(row.id, NOT_BEGUN)]
    ]


def _shrunk_of(store: Store, row: SearchRow) -> float | None:
    """The shrunk train score of the winner, or of the incumbent before there is one."""
    if row.verdict is not None:
        value: float = row.verdict["estimates"]["shrunk"]["value"]
        return value
    return store.latest_review(row.id).get("shrunk")  # the first schema had none


def spending(store: Store, row: SearchRow) -> tuple[dict[str, dict[str, Any]], float | None]:
    """What was used of the budget, and the seconds left, as `show` says them."""
    states = store.progress().get(row.id, NOT_BEGUN).candidates
    used = _used(store, row, sum(states.values()))
    return _budget(row, used), _seconds_left(row, used, states.get("open", 0))


def task_weights(store: Store, row: SearchRow) -> dict[str, float]:
    """The tasks' shares of the objective, by task name; the job names its tasks by file."""
    names = dict.fromkeys(task for task, _ in store.splits(row.id))
    return {t: entry["weight"] for t, entry in zip(names, row.job["tasks"], strict=True)}


def last_stage(row: SearchRow) -> int:
    """At which a candidate has been scored to the end; 0 without staging."""
    staging = row.job.get("staging")
    return len(staging["stages"]) - 1 if isinstance(staging, dict) else 0


def _unseals(store: Store, row: SearchRow) -> set[tuple[str, str]]:
    """(search, recipe) of each opening of a test split of this search, by any of the store."""
    own = {s.identity for (_, split), s in store.splits(row.id).items() if split == "test"}
    names = {search.id: search.name for search in store.searches()}
    return {
        (names[r.search], r.subject.split("/")[0])
        for r in store.ledger()
        if r.kind == "unseal" and r.content in own
    }


def _estimates(
    store: Store, row: SearchRow, best: dict[str, Any] | None, review: dict[str, Any]
) -> dict[str, Any] | None:
    """What is known of the best candidate; of an incumbent what the last review said of it."""
    if best is None:
        return None
    if row.verdict is not None:
        report = store.report(best["candidate"])
        test = None if report is None else json.loads(report)["estimates"]["test"]
        return {**row.verdict["estimates"], "test": test}
    found: dict[str, Any] = dict.fromkeys(ESTIMATES)
    found["raw_train"] = {key: best["score"]["train"][key] for key in ("value", "interval")}
    if review.get("incumbent") == best["candidate"]:
        found["shrunk"] = _shrunk(review)
    return found


def _shrunk(review: dict[str, Any]) -> dict[str, Any] | None:
    """Of a generation's review; those of older searches have no interval, the oldest nothing."""
    if "shrunk" not in review:
        return None
    return {"value": review["shrunk"], "interval": review.get("shrunk_interval")}


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


def _used(store: Store, row: SearchRow, proposed: int) -> Used:
    return Used(
        proposed,
        store.example_evaluations(row.id),
        row.active_seconds / 3600,
        store.device_seconds(row.id) / 3600,
    )


def _budget(row: SearchRow, used: Used) -> dict[str, Any]:
    allowed = row.job["budget"]
    return {
        key: {"used": value, "allowed": allowed.get(key)} for key, value in asdict(used).items()
    }


def _seconds_left(row: SearchRow, used: Used, under_way: int) -> float | None:
    """Of a search that proposes, or would if it were resumed."""
    if row.state not in ("running", "stopped") or row.stop_reason is not None:
        return None
    done = replace(used, candidates=used.candidates - under_way)
    return seconds_left(Budget.model_validate(row.job["budget"]), used, done, under_way)


def _account(device: Device) -> dict[str, Any]:
    return {**asdict(device), **_idle_and_busy(asdict(device))}


def _idle_and_busy(spent: Mapping[str, Any]) -> dict[str, float | None]:
    """Of seconds by what they went into; busy is None where nothing was held."""
    held, working = spent["held"], spent["merging"] + spent["scoring"]
    idle = max(0.0, held - working - spent["opening"] - spent["lost"])
    return {"idle": idle, "busy": working / held if held else None}


def _time(store: Store, row: SearchRow) -> dict[str, Any]:
    devices = store.devices(row.id)
    columns = ("held", "opening", "merging", "scoring", "lost")
    together = {name: sum(getattr(device, name) for device in devices) for name in columns}
    spent = Sums(store, row.id).time()
    return {
        **together,
        **_idle_and_busy(together),
        "candidate_median": median(spent.each) if spent.each else None,
        "candidate_longest": max(spent.each, default=None),
        "waited": spent.waited,
    }


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
