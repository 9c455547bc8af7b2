"""Candidates of a search: page by page, and one by one."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from evomerge.errors import NotFound
from evomerge.report import compare
from evomerge.report.candidate import (
    Candidate,
    Comparison,
    Sample,
    TaskScore,
    candidate,
    recipe,
    samples,
)
from evomerge.report.population import MOST, Page, population
from evomerge.service.access import requires
from evomerge.service.api.shapes import LARGEST, CandidateId, Cursor, SearchName
from evomerge.service.context import Here
from evomerge.service.problems import declared
from evomerge.store import Sort

router = APIRouter(prefix="/searches/{name}/candidates", tags=["candidates"])

_YAML = "application/yaml"


@dataclass(frozen=True)
class Beside:
    """A candidate beside others. comparisons: with each parent, on the same examples. difference:
    of the recipe to that of the other candidate that was asked for, as a unified diff; None where
    none was."""

    comparisons: tuple[Comparison, ...]
    difference: str | None


@router.get("", dependencies=[requires("read")], responses=declared(404))
def list_candidates(
    here: Here,
    name: SearchName,
    state: Annotated[
        Literal["open", "scored", "failed", "infeasible"] | None,
        Query(description="Of these alone."),
    ] = None,
    generation: Annotated[
        int | None, Query(ge=0, le=LARGEST, description="Of these alone; 0: the baselines.")
    ] = None,
    sort: Annotated[Sort, Query(description="standing: as `evomerge top`.")] = "standing",
    order: Literal["descending", "ascending"] = "descending",
    cursor: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=MOST)] = 50,
) -> Page:
    """Candidates in an order; those without what they are sorted by come last. A cursor is of one
    sort and order."""
    descending = order == "descending"
    return population(here.store, name, state, generation, sort, descending, cursor, limit)


@router.get("/{id}", dependencies=[requires("read")], responses=declared(404))
def show_candidate(here: Here, name: SearchName, id: CandidateId) -> Candidate:
    """Everything about a candidate but its replies."""
    return candidate(here.store, name, id)


@router.get("/{id}/scores", dependencies=[requires("read")], responses=declared(404))
def show_scores(here: Here, name: SearchName, id: CandidateId) -> list[TaskScore]:
    """What it scored on each task, with intervals."""
    return list(candidate(here.store, name, id).tasks)


@router.get(
    "/{id}/recipe",
    dependencies=[requires("read")],
    response_class=Response,
    responses=declared(404)
    | {200: {"content": {_YAML: {"schema": {"type": "object"}}}, "description": "The recipe."}},
)
def show_recipe(here: Here, name: SearchName, id: CandidateId) -> Response:
    """Its recipe, as mergekit and `evomerge merge` read it."""
    return Response(_recipe(here, name, id), media_type=_YAML)


@router.get("/{id}/samples", dependencies=[requires("read")], responses=declared(404))
def show_samples(
    here: Here,
    name: SearchName,
    id: CandidateId,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[Sample]:
    """What it replied to some examples of train, beside what its parents did."""
    return list(samples(here.store, name, id, limit))


@router.get("/{id}/comparison", dependencies=[requires("read")], responses=declared(404))
def show_comparison(
    here: Here,
    name: SearchName,
    id: CandidateId,
    other: Annotated[
        int | None,
        Query(ge=1, le=LARGEST, description="A candidate of the search to compare recipes with."),
    ] = None,
) -> Beside:
    """How it stands against each parent; and how its recipe differs from another's."""
    found = candidate(here.store, name, id).comparisons
    if other is None:
        return Beside(found, None)
    ours, theirs = _recipe(here, name, id), _recipe(here, name, other)
    return Beside(found, compare.recipes(theirs, ours, (str(other), str(id))))


def _recipe(here: Here, name: str, id: int) -> str:
    found = recipe(here.store, name, id)
    if found is None:
        raise NotFound(f"candidate {id} of search '{name}' is infeasible and has no recipe")
    return found
