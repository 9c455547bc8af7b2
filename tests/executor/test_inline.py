"""The executor in this process: it looks one request ahead where its engine merges ahead."""

from contextlib import closing

import pytest

from evomerge.errors import OutOfMemory
from evomerge.executor import Request, Stopped
from evomerge.executor.inline import InlineExecutor
from evomerge.fitness.results import Failed, Scored
from evomerge.job import Engine as Section
from evomerge.recipe import Recipe
from tests.clusters import giving


class _Engine:
    """Notes what it is told, and has too little memory for one recipe. There is nothing to score:
    it is given no examples."""

    def __init__(self, merges_ahead: bool, too_large: Recipe | None = None) -> None:
        self.merges_ahead = merges_ahead
        self.told: list[tuple[str, Recipe]] = []
        self._too_large = too_large

    def load(self, recipe: Recipe) -> None:
        self.told.append(("load", recipe))
        if recipe is self._too_large:
            raise OutOfMemory("the merge does not fit into the memory of cuda:0")

    def prepare(self, recipe: Recipe) -> bool:
        self.told.append(("prepare", recipe))
        return True

    def close(self) -> None: ...


def executor(engine: _Engine) -> InlineExecutor:
    section = Section(device="cpu")
    return InlineExecutor(section, lambda: engine, {}, shaped=False)


def some(count: int) -> list[Request]:
    """Requests for nothing, of different recipes."""
    recipes = [
        Recipe.from_dict({"merge_method": "linear", "models": [{"model": str(i)}]})
        for i in range(count)
    ]
    return [Request(i, recipe, "train", {}) for i, recipe in enumerate(recipes)]


def test_too_little_memory_is_the_candidates_failure_where_there_is_one_device() -> None:
    given = some(2)
    with closing(executor(_Engine(False, too_large=given[0].recipe))) as one:
        failed, scored = one.evaluate(giving(given))
        (device,) = one.devices()
    assert isinstance(failed.evaluation, Failed)
    assert failed.evaluation.reason == "the merge does not fit into the memory of cuda:0"
    assert isinstance(scored.evaluation, Scored)
    assert device.evaluations == 2


def test_what_comes_next_is_merged_ahead_where_the_engine_can() -> None:
    engine, given = _Engine(True), some(3)
    a, b, c = (request.recipe for request in given)
    with closing(executor(engine)) as one:
        landed = [found.request for found in one.evaluate(giving(given))]
    assert landed == given
    pairs = [("load", a), ("prepare", b), ("load", b), ("prepare", c), ("load", c)]
    assert engine.told == pairs


@pytest.mark.parametrize("ahead", [False, True])
def test_a_request_is_taken_ahead_only_where_the_engine_merges_ahead(ahead: bool) -> None:
    given, taken = iter(some(4)), 0

    def take() -> Request | None:
        nonlocal taken
        request = next(given, None)
        taken += request is not None
        return request

    with closing(executor(_Engine(ahead))) as one:
        for number, _ in enumerate(one.evaluate(take), 1):
            assert taken == min(4, number + ahead)


def test_whoever_stops_does_not_wait_for_what_was_merged_ahead() -> None:
    engine, (a, b) = _Engine(True), some(2)
    stopped, left = False, [a, b]

    def take() -> Request | None:
        if stopped:
            raise Stopped
        return left.pop(0) if left else None

    landed = []
    with closing(executor(engine)) as one:
        for found in one.evaluate(take):
            landed.append(found.request)
            stopped = True
    assert landed == [a]
    assert engine.told == [("load", a.recipe), ("prepare", b.recipe)]
