"""What a store gives of its tables, as values. Knows nothing of how they are read."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.fitness.results import Scores


@dataclass(frozen=True)
class SearchRow:
    """One search. state: running | stopped (can be resumed) | finished | failed."""

    id: int
    name: str
    state: str
    epoch: int
    seed: int
    job: dict[str, Any]
    versions: dict[str, str]
    created_at: str
    active_seconds: float
    stop_reason: str | None
    verdict: dict[str, Any] | None


@dataclass(frozen=True)
class SplitRow:
    """One split of a task: n items; content and identity as of Task."""

    content: str
    identity: str
    n: int


@dataclass(frozen=True)
class GenerationRow:
    """kind: baselines | proposed | final. told: whether the optimizer was told its fitness.
    optimizer: the section of the job that proposed it; None where none did, or it is not known.
    opened_at, told_at: UTC, ISO 8601. ask, tell: see `log_places`; None where no optimizer proposed
    it."""

    number: int
    kind: str
    step_size: float | None
    told: bool
    review: dict[str, Any] | None
    optimizer: dict[str, Any] | None
    opened_at: str
    told_at: str | None
    ask: int | None
    tell: int | None


def log_places(
    number: int, told: bool, ask: int | None, tell: int | None
) -> tuple[int, int | None]:
    """When a proposed generation was asked for and told, counted in the search's asks and tells
    together from 1 on; the latter is None where it was not told.

    ask, tell: as they are stored. Searches of schemas before 5 did both in turn, and wrote neither
    down; one that goes on since then writes down when it tells a generation that was asked for
    before.
    """
    if ask is not None:
        return ask, tell
    return 2 * number - 1, tell or (2 * number if told else None)


@dataclass(frozen=True)
class CandidateRow:
    """One candidate, without its recipe (see Store.recipe).

    state: open | scored | failed | infeasible. genotype: (d,), None for baselines and where it was
    not asked for. fitness: on the train examples it was scored on. told, objectives, violation: as
    of Outcome.
    """

    id: int
    generation: int
    slot: int
    label: str | None
    state: str
    reason: str | None
    genotype: NDArray[np.float64] | None
    recipe_sha: str | None
    fitness: float | None
    told: float | None
    objectives: tuple[float, ...] | None
    violation: float | None


@dataclass(frozen=True)
class EvaluationRow:
    """One recorded evaluation. scores: by task; None if it failed. copied_from: the candidate
    with the same recipe whose result it is. recorded_at: UTC, ISO 8601. device, gpus, waited: see
    Placement; of copies, and of searches of schemas before 5, the device is not known and `waited`
    0."""

    candidate: int
    purpose: str
    stage: int
    reason: str | None
    merge_seconds: float
    seconds: float
    copied_from: int | None
    recorded_at: str
    device: str | None
    gpus: float
    waited: float
    scores: dict[str, Scores] | None


@dataclass(frozen=True)
class MeanRow:
    """A candidate's scores on n examples of a task, put together.

    truncated: share of the examples whose reply the token limit cut off. tokens: of a reply, on
    average; 0 where nothing is generated. overlong, failed: examples whose prompt did not fit into
    the model's context, which score 0, and those with a reply that could not be graded.
    """

    mean: float
    n: int
    truncated: float
    tokens: float
    overlong: int
    failed: int


@dataclass(frozen=True)
class ProgressRow:
    """How far a search has come, baselines left out. generations: how many its optimizer was told
    of. candidates: how many were proposed, by state."""

    generations: int
    candidates: dict[str, int]


NOT_BEGUN = ProgressRow(0, {})


@dataclass(frozen=True)
class LedgerRow:
    """One use of a guarded split. kind: look | more looks | unseal."""

    search: int
    kind: str
    content: str
    subject: str
    entry: dict[str, Any]
    at: str
