"""One candidate: what it is, what it scored, how it stands against each parent, what it replied.

Nothing of test is here: that stands in an export's report. Reads the store, and the questions of
train where their task's file is at hand and is what it was at launch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import NotFound
from evomerge.fitness.results import Scores, weighted_mean
from evomerge.fitness.task import Task
from evomerge.guard.estimates import paired_gain, wilson
from evomerge.recipe import Recipe
from evomerge.report.coefficients import Coefficients, coefficients, path
from evomerge.report.population import Member, members
from evomerge.report.questions import at_hand, groups_of
from evomerge.search.summary import task_weights
from evomerge.seeds import generator
from evomerge.store import (
    CandidateRow,
    EvaluationRow,
    MeanRow,
    SearchRow,
    Store,
    Sums,
    consistent,
)

Interval = tuple[float, float]
Split = Literal["train", "validation"]

_PURPOSES = ("train", "full", "monitor", "validation")
_PURPOSES_OF: Mapping[Split, tuple[str, ...]] = {
    "train": ("full", "train"),  # the former has all examples of the latter
    "validation": ("validation",),
}
_FEW = 20  # twins that are named


@dataclass(frozen=True)
class TaskScore:
    """On n examples of a task. truncated: share of the replies that the token limit cut off.
    tokens: of a reply, on average. overlong, failed: examples that did not fit into the context,
    or have a reply that could not be graded."""

    task: str
    split: Split
    n: int
    score: float
    interval: Interval
    truncated: float
    tokens: float
    overlong: int
    failed: int


@dataclass(frozen=True)
class Comparison:
    """Against a parent on the same n examples. gain: the weighted mean difference over the tasks,
    with its interval; p_value: two-sided, of no difference, see guard.estimates.paired_gain. Of
    many candidates one that was chosen by these examples gains by luck: on train that is all of
    them, on validation the finalists."""

    parent: str
    split: Split
    n: int
    ours: float
    theirs: float
    gain: float
    interval: Interval
    p_value: float


@dataclass(frozen=True)
class Made:
    """An evaluation. purpose: train (on the driving examples), full (on all of train), monitor,
    validation. seconds: all of it, merge_seconds included. device: None of copies, and where it is
    not known. copied_from: the candidate whose result it is. reason: why it failed."""

    purpose: str
    stage: int
    examples: int
    reason: str | None
    merge_seconds: float
    seconds: float
    waited: float
    device: str | None
    gpus: float
    copied_from: int | None
    recorded_at: str


@dataclass(frozen=True)
class Candidate:
    """Everything about a candidate but its replies.

    member: as in a list. place: by its standing among all candidates, from 1; None before it is
    scored. winner, incumbent, finalist, on_front: what it is. tasks: its scores; of train on most
    examples that it was scored on. genotype: by coordinate; None of baselines. optimizer: who
    proposed it; step_size: how far it scattered then. twins: the first few others of this search
    with the same recipe. recipe: YAML; None if it is infeasible. coefficients: of a merge of
    weights; path: the source and the layer of each layer of a merge of layers, from the input on;
    a layer that several models are merged into has all their names. exported: whether its report
    is stored.
    """

    search: str
    member: Member
    place: int | None
    of: int
    winner: bool
    incumbent: bool
    finalist: bool
    on_front: bool
    tasks: tuple[TaskScore, ...]
    comparisons: tuple[Comparison, ...]
    evaluations: tuple[Made, ...]
    genotype: dict[str, float] | None
    optimizer: str | None
    step_size: float | None
    twins: tuple[int, ...]
    recipe: str | None
    coefficients: Coefficients | None
    path: tuple[tuple[str, int], ...] | None
    exported: bool


@dataclass(frozen=True)
class Reply:
    """Of another model, to the same example; score: None where it is not known."""

    reply: str
    score: float | None


@dataclass(frozen=True)
class Sample:
    """A reply to an example of train, the beginning of it where it is long. position: in the split,
    from 0. prompt, target: None where the task's file is elsewhere or is not what it was; a
    conversation is written out turn by turn. others: what each parent replied."""

    task: str
    position: int
    prompt: str | None
    target: str | None
    reply: str
    score: float | None
    others: dict[str, Reply]


@consistent
def candidate(store: Store, name: str, id: int) -> Candidate:
    """Raises StoreError for an unknown search or candidate, and for what is damaged."""
    row = store.search(name)
    own = _row(store, row, id)
    sums = Sums(store, row.id)
    parents = _parents(store, row)
    evaluations = store.evaluations(row.id, _PURPOSES, ids=[id, *parents])
    (generation,) = store.generations(row.id, own.generation)
    document = store.recipe(id)
    recipe = None if document is None else Recipe.from_dict(document)
    names = {model["uri"]: key for key, model in store.models(row.id).items()}
    scored = own.state == "scored"
    roles = _Roles.of(row, store.latest_review(row.id))
    return Candidate(
        search=row.name,
        member=members(store, row, [id])[0],
        place=sums.place(id) if scored else None,
        of=sums.count("scored"),
        winner=id == roles.winner,
        incumbent=id == roles.incumbent,
        finalist=id in roles.finalists,
        on_front=id in roles.front,
        tasks=_task_scores(store, row, id),
        comparisons=_comparisons(store, row, own, parents, evaluations),
        evaluations=tuple(_made(e) for e in evaluations if e.candidate == id),
        genotype=_genotype(store, row, own),
        optimizer=(generation.optimizer or {}).get("name"),
        step_size=generation.step_size,
        twins=sums.twins(id, own.recipe_sha, _FEW) if own.recipe_sha else (),
        recipe=None if recipe is None else recipe.to_yaml(),
        coefficients=None if recipe is None else coefficients(recipe, names),
        path=None if recipe is None else path(recipe, names),
        exported=store.report(id) is not None,
    )


@consistent
def recipe(store: Store, name: str, id: int) -> str | None:
    """Of a candidate, as YAML; None if it is infeasible. Raises StoreError for an unknown search or
    candidate, and for what is damaged."""
    _row(store, store.search(name), id)
    document = store.recipe(id)
    return None if document is None else Recipe.from_dict(document).to_yaml()


@consistent
def samples(store: Store, name: str, id: int, limit: int = 100) -> tuple[Sample, ...]:
    """What is kept of a candidate's replies to examples of train, the first `limit` by task and
    position, beside those of the parents; empty of searches that kept none, and of tasks without
    replies. What was copied from a candidate with the same recipe has its replies.
    Raises StoreError for an unknown search or candidate, and for scores that are damaged."""
    row = store.search(name)
    _row(store, row, id)
    parents = {key: label for key, label in _parents(store, row).items() if key != id}
    on_train = _by_candidate(store.evaluations(row.id, ("train", "full"), ids=[id, *parents]))
    owners = {key: _owner(key, on_train.get(key, ())) for key in (id, *parents)}
    kept: dict[int, dict[tuple[str, int], str]] = {}
    for one in Sums(store, row.id).samples(set(owners.values())):
        kept.setdefault(one.candidate, {})[one.task, one.position] = one.reply
    scores = {key: _scores(on_train.get(key, ())) for key in owners}
    own = kept.get(owners[id], {})
    shown = sorted(own)[:limit]
    tasks = {task: at_hand(store, row, task) for task in {task for task, _ in shown}}
    return tuple(
        Sample(
            task,
            position,
            *_question(tasks[task], position),
            own[task, position],
            scores[id].get((task, position)),
            {
                label: Reply(kept[owners[key]][task, position], scores[key].get((task, position)))
                for key, label in parents.items()
                if (task, position) in kept.get(owners[key], {})
            },
        )
        for task, position in shown
    )


def _row(store: Store, row: SearchRow, id: int) -> CandidateRow:
    found = store.candidates(row.id, ids=[id])
    if not found:
        raise NotFound(f"search '{row.name}' has no candidate {id}")
    return found[0]


def _parents(store: Store, row: SearchRow) -> dict[int, str]:
    """The parents and the base, as candidates of generation 0."""
    sources = {*row.job["parents"], *(["base"] if "base" in row.job else [])}
    rows = store.candidates(row.id, generation=0, with_genotypes=False)
    return {c.id: str(c.label) for c in rows if c.label in sources}


@dataclass(frozen=True)
class _Roles:
    """Candidates by what they are in their search at present."""

    winner: int | None
    incumbent: int | None
    finalists: frozenset[int]
    front: frozenset[int]

    @classmethod
    def of(cls, row: SearchRow, review: Mapping[str, Any]) -> "_Roles":
        verdict = row.verdict or {}
        return cls(
            verdict.get("winner"),
            review.get("incumbent"),
            frozenset(verdict.get("finalists", ())),
            frozenset(review.get("front", ())),
        )


def _task_scores(store: Store, row: SearchRow, id: int) -> tuple[TaskScore, ...]:
    full, train, looked = (
        store.means(row.id, purpose, [id]).get(id, {})
        for purpose in ("full", "train", "validation")
    )
    splits: tuple[tuple[Split, dict[str, MeanRow]], ...] = (
        ("train", full or train),
        ("validation", looked),
    )
    return tuple(
        TaskScore(
            task,
            split,
            mean.n,
            mean.mean,
            wilson(mean.mean, mean.n).interval,
            mean.truncated,
            mean.tokens,
            mean.overlong,
            mean.failed,
        )
        for split, means in splits
        for task, mean in means.items()
    )


def _comparisons(
    store: Store,
    row: SearchRow,
    own: CandidateRow,
    parents: Mapping[int, str],
    evaluations: Sequence[EvaluationRow],
) -> tuple[Comparison, ...]:
    """With each parent, on all of train that both were scored on, and on validation."""
    weights, found = task_weights(store, row), []
    for split, purposes in _PURPOSES_OF.items():
        results = {key: _joined(evaluations, key, purposes) for key in (own.id, *parents)}
        ours = results[own.id]
        if ours is None:
            continue
        groups = groups_of(store, row, split, ours)
        for index, (key, parent) in enumerate(parents.items()):
            theirs = results[key]
            if key == own.id or theirs is None:
                continue
            random = generator(row.seed, f"comparison on {split} of candidate {own.id}", index)
            same = {task: theirs[task].only(scores.examples) for task, scores in ours.items()}
            gain = paired_gain(ours, same, weights, random, groups)
            found.append(
                Comparison(
                    parent,
                    split,
                    gain.n,
                    weighted_mean({t: s.mean for t, s in ours.items()}, weights),
                    weighted_mean({t: s.mean for t, s in same.items()}, weights),
                    gain.estimate.value,
                    gain.estimate.interval,
                    gain.p_value,
                )
            )
    return tuple(found)


def _joined(
    evaluations: Sequence[EvaluationRow], id: int, purposes: Sequence[str]
) -> dict[str, Scores] | None:
    """What a candidate was scored on for the first of these purposes that it was scored for, all
    stages; None without such a result."""
    for purpose in purposes:
        own = [e for e in evaluations if e.candidate == id and e.purpose == purpose]
        parts = [e.scores for e in own if e.scores is not None]
        if parts:
            return {task: Scores.joined([part[task] for part in parts]) for task in parts[0]}
    return None


def _made(evaluation: EvaluationRow) -> Made:
    return Made(
        evaluation.purpose,
        evaluation.stage,
        sum(len(scores) for scores in (evaluation.scores or {}).values()),
        evaluation.reason,
        evaluation.merge_seconds,
        evaluation.seconds,
        evaluation.waited,
        evaluation.device,
        evaluation.gpus,
        evaluation.copied_from,
        evaluation.recorded_at,
    )


def _genotype(store: Store, row: SearchRow, own: CandidateRow) -> dict[str, float] | None:
    if own.genotype is None:
        return None
    names = [coordinate.name for coordinate in store.coordinates(row.id)]
    values = own.genotype.tolist()
    return dict(zip(names or [f"x{i}" for i in range(len(values))], values, strict=True))


def _by_candidate(evaluations: Sequence[EvaluationRow]) -> dict[int, list[EvaluationRow]]:
    found: dict[int, list[EvaluationRow]] = {}
    for evaluation in evaluations:
        found.setdefault(evaluation.candidate, []).append(evaluation)
    return found


def _owner(id: int, evaluations: Sequence[EvaluationRow]) -> int:
    """Whose replies a candidate's are."""
    return next((e.copied_from for e in evaluations if e.copied_from is not None), id)


def _scores(evaluations: Sequence[EvaluationRow]) -> dict[tuple[str, int], float]:
    """By task and position."""
    return {
        (task, position): score
        for evaluation in evaluations
        for task, scores in (evaluation.scores or {}).items()
        for position, score in zip(scores.examples.tolist(), scores.scores.tolist(), strict=True)
    }


def _question(task: Task | None, position: int) -> tuple[str | None, str | None]:
    """Prompt and target."""
    if task is None:
        return None, None
    item = task.examples("train")[position]
    if isinstance(item.prompt, str):
        return item.prompt, item.target
    return "\n\n".join(f"{turn.role}: {turn.text}" for turn in item.prompt), item.target
