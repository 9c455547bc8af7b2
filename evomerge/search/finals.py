"""The end of a search: finalists, looks at validation, the winner, and what may be said of it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import LooksSpent, SearchFailed
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.guard import estimates, selection
from evomerge.optimizer import Optimizer
from evomerge.search.looks import content
from evomerge.search.loop import Run
from evomerge.search.record import Member
from evomerge.seeds import generator


def decide(run: Run, optimizer: Optimizer) -> dict[str, Any]:
    """Pick the winner by validation, and judge it against the best parent.

    The finalists are the mean of the optimizer's distribution and the best candidates by shrunk
    score, all of them scored on the whole of train before anyone looks at validation. Each look is
    reserved in the ledger first, the best parent's included. Looks from outside of the search may
    leave fewer; finalists that get none are passed over. Gives the verdict as it is stored: ids,
    estimates, gain, whether the winner is promoted.
    Raises SearchFailed when there is no candidate to choose.
    """
    allowed = run.setting.job.guard.validation_looks
    parent = best_parent(run)
    finalists = _finalists(run, optimizer, allowed - 1)
    finalists += _earlier(run, finalists)
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
    shrunk = _shrunk(run, finalists)
    ranks = {m.id: _rank(run, m, looked[m.id], shrunk[m.id].value) for m in finalists}
    winner = max(finalists, key=lambda m: ranks[m.id])
    _tell_ties(run, winner, [m for m in finalists if ranks[m.id][0] == ranks[winner.id][0]], shrunk)
    return _verdict(run, winner, parent, finalists, looked, shrunk[winner.id])


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
    """The distribution's mean, the best by shrunk score, of several objectives the knees of the
    front, and who comes next by shrunk score, as far as they can be scored on all of train.

    Whoever breaks a constraint there spends no look, unless all of twice as many do.
    """
    mean = _mean_member(run, optimizer)
    best = _best(run)
    chosen: list[Member] = []
    breaking: list[Member] = []
    tried: set[str | None] = {None}  # the recipe of an infeasible mean
    first = [*([mean] if mean else []), *best[:1]]
    for member in [*first, *run.standing.knees(count), *best]:
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


def _earlier(run: Run, finalists: list[Member]) -> list[Member]:
    """Who looked at validation before more looks were allowed, and would not be asked now: the
    knees are others where there are to be more of them."""
    taken = {member.id for member in finalists}
    return [
        member
        for number, members in run.record.members.items()
        for member in members
        if number and member.id not in taken and run.record.evaluation(member.id, "validation")
    ]


def _best(run: Run) -> list[Member]:
    """Proposed candidates with a result, the best first: whoever breaks the constraints less, then
    by shrunk score, to which it matters how many examples each was scored on. Where nothing but
    luck sets them apart, whoever was scored on more of them, then the fitter."""
    record, shrunk = run.record, run.standing.tried.shrunk()

    def rank(found: tuple[Member, Scored]) -> tuple[float, ...]:
        member, scored = found
        violation, fitness = record.rank(member.id)
        examples = sum(len(scores) for scores in scored.tasks.values())
        return violation, shrunk[member.recipe_sha or ""], examples, fitness

    return [member for member, _ in sorted(_scored(run), key=rank, reverse=True)]


def _scored(run: Run) -> list[tuple[Member, Scored]]:
    """Proposed candidates with their results on the driving examples."""
    found = ((member, run.record.on_train(member.id)) for member in run.record.proposed)
    return [(member, scored) for member, scored in found if scored is not None]


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
    run.coordinator.look(content(run.setting.tasks.values()), member.id, allowed)
    examples = run.setting.validation
    return run.evaluate([member], "validation", examples, split="validation")[member.id]


def _tell_ties(
    run: Run,
    winner: Member,
    equal: Sequence[Member],
    shrunk: Mapping[int, estimates.Estimate],
) -> None:
    """Say what made the winner where validation did not."""
    if len(equal) == 1:
        return
    best = sum(shrunk[member.id].value == shrunk[winner.id].value for member in equal) == 1
    why = "its shrunk train score" if best else "its fitness, as shrunk train scores are equal too"
    names = ", ".join(member.name for member in equal)
    text = f"validation says the same of {names}: {winner.name} wins by {why}"
    run.coordinator.log("tie", text)
    run.watcher.note(text)


def _rank(
    run: Run, member: Member, looked: Scored, shrunk: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Whoever keeps the constraints on train, then the best on validation; and what decides where
    that sets nobody apart: the train score with the luck taken out, then who is fitter."""
    objective, full = run.record.objective, _on_train(run, member)
    return (
        (-objective.violation(full), objective.score(looked)),
        (shrunk, objective.fitness(looked), objective.fitness(full)),
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
    shrunk: estimates.Estimate,
) -> dict[str, Any]:
    weights, guard = run.setting.weights, run.setting.job.guard
    random = generator(run.setting.job.seed, "verdict")
    ours, theirs = looked[winner.id].tasks, looked[parent.id].tasks
    groups = run.setting.splits.groups("validation")
    gain = estimates.paired_gain(ours, theirs, weights, random, groups)
    on_train = _on_train(run, winner)
    found = {
        "raw_train": estimates.score_estimate(on_train.tasks, weights),
        "shrunk": shrunk,
        "bbc_cv": selection.bbc_cv(_matrices(run, finalists), weights, random),
        "validation": estimates.score_estimate(ours, weights),
        "validation_bbc": selection.bbc_cv(
            _by_task([looked[m.id].tasks for m in finalists]), weights, random
        ),
    }
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
        "estimates": {name: estimate.as_dict() for name, estimate in found.items()},
    }


def _shrunk(run: Run, finalists: Sequence[Member]) -> dict[int, estimates.Estimate]:
    """By id, of finalists on all of train, their tasks weighed as in the claim, whatever was
    climbed; the mean of the distribution was not the best of anything, so nothing is taken out of
    it."""
    weights, tried = run.setting.weights, selection.Tried()
    for member, scored in _scored(run):
        tried.add(member.recipe_sha or "", scored.tasks, weights)
    found = {}
    for finalist in finalists:
        sha, tasks = finalist.recipe_sha or "", _on_train(run, finalist).tasks
        raced = sha in tried
        found[finalist.id] = (
            tried.reconsidered(sha, tasks, weights)
            if raced
            else estimates.score_estimate(tasks, weights)
        )
    return found


def _matrices(run: Run, finalists: list[Member]) -> dict[str, NDArray[np.float32]]:
    """What the choice is repeated on: per-example scores by task, (candidates, examples).

    All that were proposed, on the driving examples that they share. With staging they share none,
    and there are the finalists alone on all of train; what each had been raced on has made it a
    finalist, and is left out (NaN).
    """
    scored = _scored(run)
    if run.setting.staging is None and scored:  # the budget may have allowed none
        once = {member.recipe_sha: found for member, found in scored}
        return _by_task([found.tasks for found in once.values()])
    found = _by_task([_on_train(run, finalist).tasks for finalist in finalists])
    for row, finalist in enumerate(finalists):
        full = _on_train(run, finalist).tasks
        raced = [race.tasks for m, race in scored if m.recipe_sha == finalist.recipe_sha]
        for task, scores in found.items():
            met = np.isin(full[task].examples, [e for r in raced for e in r[task].examples])
            if not met.all():
                scores[row, met] = np.nan
    return found


def _by_task(rows: Sequence[Mapping[str, Scores]]) -> dict[str, NDArray[np.float32]]:
    """Scores of several models on the same examples."""
    return {task: np.stack([row[task].scores for row in rows]) for task in rows[0]}
