"""The end of a search: finalists, looks at validation, the winner, and what may be said of it."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import LooksSpent, SearchFailed
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.guard import estimates
from evomerge.optimizer import Optimizer
from evomerge.search.loop import Run
from evomerge.search.record import Member
from evomerge.seeds import generator


def decide(run: Run, optimizer: Optimizer) -> dict[str, Any]:
    """Pick the winner by validation, and judge it against the best parent.

    The finalists are the mean of the optimizer's distribution and the best candidates by fitness;
    each look at validation is reserved in the ledger first, the best parent's included. Looks from
    outside of the search may leave fewer; finalists that get none are passed over. Gives the
    verdict as it is stored: ids, estimates, gain, whether the winner is promoted.
    Raises SearchFailed when there is no candidate to choose.
    """
    allowed = run.setting.job.guard.validation_looks
    parent = best_parent(run)
    finalists = _finalists(run, optimizer, allowed - 1)
    looked: dict[int, Scored] = {}
    for done, member in enumerate([parent, *finalists]):
        run.watcher.finalist(f"{member.name} on validation", done, len(finalists) + 1)
        try:
            found = _look(run, member, allowed)
        except LooksSpent:
            if member is parent:
                raise
            continue
        if isinstance(found, Scored):
            looked[member.id] = found
        elif member is parent:
            raise SearchFailed(f"{member.name} cannot be scored on validation: {found.reason}")
    finalists = [member for member in finalists if member.id in looked]
    if not finalists:
        raise SearchFailed("no candidate could be scored: there is no winner")
    winner = max(finalists, key=lambda m: _rank(run, m, looked[m.id]))
    return _verdict(run, winner, parent, finalists, looked)


def best_parent(run: Run) -> Member:
    """The best source model on all of train, the base among them; fitness decides ties."""
    sources = {*run.setting.named.parents, "base"}
    members = [m for m in run.record.members[0] if m.label in sources]

    objective = run.record.objective

    def rank(member: Member) -> tuple[float, float]:
        found = _on_train(run, member)
        return objective.score(found), objective.fitness(found)

    return max(members, key=rank)


def _finalists(run: Run, optimizer: Optimizer, count: int) -> list[Member]:
    """The distribution's mean, the fittest, of several objectives the knees of the front, and who
    comes next in fitness, as far as they can be scored on all of train.

    Whoever breaks a constraint there spends no look, unless all of twice as many do.
    """
    mean = _mean_member(run, optimizer)
    fittest = sorted(_complete(run), key=lambda m: run.record.rank(m.id), reverse=True)
    chosen: list[Member] = []
    breaking: list[Member] = []
    tried: set[str | None] = {None}  # the recipe of an infeasible mean
    first = [*([mean] if mean else []), *fittest[:1]]
    for member in [*first, *run.standing.knees(count), *fittest]:
        if len(chosen) == count or len(breaking) == 2 * count:
            break
        if member.recipe_sha in tried:
            continue
        tried.add(member.recipe_sha)
        run.watcher.finalist(f"{member.name} on train", len(chosen), count)
        found = run.evaluate([member], "full", run.setting.train)[member.id]
        if isinstance(found, Scored):
            holds = run.record.objective.violation(found) == 0
            (chosen if holds else breaking).append(member)
    return chosen or breaking[:count]


def _complete(run: Run) -> list[Member]:
    """Proposed candidates that were scored on as many examples as any."""
    scored = {m.id: run.record.on_train(m.id) for m in run.record.proposed}
    sizes = {id: sum(len(s) for s in found.tasks.values()) for id, found in scored.items() if found}
    most = max(sizes.values(), default=0)
    return [m for m in run.record.proposed if sizes.get(m.id) == most]


def _mean_member(run: Run, optimizer: Optimizer) -> Member | None:
    """The mean of the distribution, as a candidate of a generation of its own."""
    for members in run.record.members.values():
        if members[0].label == "mean":  # no parent may have this name
            return members[0]
    mean = optimizer.mean()
    if mean is None:
        return None
    record, number = run.record, max(run.record.members) + 1
    record.open(number, "final", optimizer.step_size, [record.proposal(0, mean, "mean")])
    return record.members[number][0]


def _look(run: Run, member: Member, allowed: int) -> Evaluation:
    contents = "+".join(task.content("validation") for task in run.setting.tasks.values())
    run.coordinator.look(hashlib.sha256(contents.encode()).hexdigest(), member.id, allowed)
    examples = run.setting.validation
    return run.evaluate([member], "validation", examples, split="validation")[member.id]


def _rank(run: Run, member: Member, looked: Scored) -> tuple[float, ...]:
    """Whoever keeps the constraints on train, then the best on validation."""
    objective, full = run.record.objective, _on_train(run, member)
    return (
        -objective.violation(full),
        objective.score(looked),
        objective.fitness(looked),
        objective.fitness(full),
    )


def _on_train(run: Run, member: Member) -> Scored:
    found = run.evaluate([member], "full", run.setting.train)[member.id]
    if isinstance(found, Failed):
        raise SearchFailed(f"{member.name} cannot be scored on train: {found.reason}")
    return found


def _verdict(
    run: Run,
    winner: Member,
    parent: Member,
    finalists: list[Member],
    looked: dict[int, Scored],
) -> dict[str, Any]:
    weights, guard = run.setting.weights, run.setting.job.guard
    random = generator(run.setting.job.seed, "verdict")
    gain = estimates.paired_gain(looked[winner.id].tasks, looked[parent.id].tasks, weights, random)
    on_train = _on_train(run, winner)
    population = [found for m in _complete(run) if (found := run.record.on_train(m.id))]
    means = np.array([*(found.score(weights) for found in population), on_train.score(weights)])
    tasks = (population or [on_train])[0].tasks
    n = sum(len(scores) for task, scores in tasks.items() if weights[task])
    validation = estimates.score_estimate(looked[winner.id].tasks, weights)
    return {
        "winner": winner.id,
        "best_parent": parent.id,
        "finalists": [m.id for m in finalists],
        "violation": run.record.objective.violation(on_train),
        "promoted": estimates.promoted(gain, guard.alpha, guard.validation_looks),
        "validation_gain": {
            **gain.estimate.as_dict(),
            "p_value": gain.p_value,
            "n": gain.n,
        },
        "estimates": {
            "raw_train": estimates.score_estimate(on_train.tasks, weights).as_dict(),
            "shrunk": estimates.shrunk(means, n, best=len(means) - 1).as_dict(),
            "bbc_cv": estimates.bbc_cv(_matrix(run, finalists), random).as_dict(),
            "validation": validation.as_dict(),
        },
    }


def _matrix(run: Run, finalists: list[Member]) -> NDArray[np.float32]:
    """Per-example scores, (candidates, examples), of all candidates that share their examples:
    the whole population without staging, with it the finalists on all of train."""
    scored = [run.record.on_train(m.id) for m in _complete(run)]
    if run.setting.job.staging is not None or not scored:  # the budget may have allowed none
        scored = [_on_train(run, m) for m in finalists]
    weights = run.setting.weights
    return np.stack([estimates.weighted_row(found.tasks, weights) for found in scored if found])
