"""What every executor promises: each request is evaluated once, by whichever device is free."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.errors import SealedError
from evomerge.executor import Executor, Request
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.job import Job
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from tests import tiny

# None of these has to be a good one.
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


class Bench:
    """An executor over three random models and two tasks, and what one worker finds without it."""

    def __init__(self, setting: Setting) -> None:
        self.executor: Executor = setting.executor()
        self.models = setting.named.parents
        self.base = setting.named.base
        self.worker = Worker(setting.engine(), setting.tasks, shaped=True)
        self.tasks = [*setting.tasks]

    def recipe(self, *weights: float, normalize: bool = True) -> Recipe:
        """A merge of both parents."""
        entries = [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(self.models.values(), weights, strict=True)
        ]
        shared = {"dtype": "float32", "parameters": {"normalize": normalize}}
        return Recipe.from_dict({"merge_method": "linear", "models": entries, **shared})

    def requests(self, count: int = len(WEIGHTS)) -> list[Request]:
        """Different ones, on different examples."""
        return [
            Request(
                i,
                self.recipe(1 - weight, weight),
                "validation" if i % 3 == 2 else "train",
                {task: np.array([i, 2, 9 - i], np.uint32) for task in self.tasks[: 1 + i % 2]},
            )
            for i, weight in enumerate(WEIGHTS[:count])
        ]

    def evaluated(self, requests: list[Request]) -> dict[int, Evaluation]:
        """By candidate, each once."""
        found = list(self.executor.evaluate(requests))
        assert sorted(r.candidate for r, _ in found) == [r.candidate for r in requests]
        return {request.candidate: evaluation for request, evaluation in found}


def cluster(request: pytest.FixtureRequest) -> dict[str, object]:
    """The executor section for a cluster."""
    request.getfixturevalue("nodes")
    return {"kind": "ray", "workers": 2, "cpus": 1}


def alone(request: pytest.FixtureRequest) -> dict[str, object]:
    """The executor section for this process."""
    return {"kind": "inline"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(alone, id="inline"),
        pytest.param(cluster, id="ray", marks=pytest.mark.ray),
    ],
)
def bench(
    request: pytest.FixtureRequest,
    models: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bench]:
    """One for each kind, whose devices are started once."""
    section: Callable[[pytest.FixtureRequest], dict[str, object]] = request.param
    folder = tmp_path_factory.mktemp("bench")
    tiny.write_task(folder / "task")
    tiny.write_task(folder / "other", source="ja_transcription")
    changes = {
        "parents": {name: {"model": str(models[name])} for name in ("a", "b")},
        "base": {"model": str(models["base"])},
        "tasks": [{"task": "task"}, {"task": "other"}],
        "executor": section(request),
    }
    opened = Bench(Setting.open(Job.from_file(tiny.write_job(folder, **changes))))
    with closing(opened.executor), closing(opened.worker):
        yield opened


def same(one: Evaluation, other: Evaluation) -> bool:
    """Bit for bit, but for the time it took."""
    if not isinstance(one, Scored) or not isinstance(other, Scored):
        return isinstance(one, Failed) and isinstance(other, Failed) and one.reason == other.reason
    return one.tasks.keys() == other.tasks.keys() and all(
        np.array_equal(getattr(scores, part), getattr(other.tasks[task], part))
        for task, scores in one.tasks.items()
        for part in ("examples", "scores", "shaping", "truncated", "tokens", "overlong")
    )


def test_every_request_is_evaluated_as_a_single_worker_would(bench: Bench) -> None:
    found = bench.evaluated(bench.requests())
    for request in bench.requests():
        assert same(found[request.candidate], bench.worker.evaluate(request))
    assert len({str(evaluation) for evaluation in found.values()}) == len(found)


def test_the_order_of_requests_changes_nothing(bench: Bench) -> None:
    found = bench.evaluated(bench.requests())
    for request, evaluation in bench.executor.evaluate(bench.requests()[::-1]):
        assert same(evaluation, found[request.candidate])


def test_the_time_is_that_of_the_evaluation(bench: Bench) -> None:
    for evaluation in bench.evaluated(bench.requests()).values():
        assert isinstance(evaluation, Scored)
        assert 0 < evaluation.merge_seconds < evaluation.seconds < 60


def test_a_recipe_that_cannot_be_merged_has_failed_and_the_others_have_not(bench: Bench) -> None:
    requests = bench.requests(4)
    requests[1] = Request(1, bench.recipe(1, -1), "train", requests[1].examples)
    found = bench.evaluated(requests)
    assert all(same(found[r.candidate], bench.worker.evaluate(r)) for r in requests)
    assert [isinstance(e, Scored) for _, e in sorted(found.items())] == [True, False, True, True]
    assert isinstance(found[1], Failed)
    assert "sum to 0" in found[1].reason


def test_a_model_whose_outputs_are_no_numbers_has_failed(bench: Bench) -> None:
    requests = bench.requests(3)
    largest = torch.finfo(torch.float32).max
    broken = bench.recipe(largest, largest, normalize=False)
    requests[0] = Request(0, broken, "train", requests[0].examples)
    found = bench.evaluated(requests)
    assert isinstance(found[0], Failed)
    assert found[0].reason == "the merged model's outputs are not finite numbers"
    assert found[0].seconds > 0
    assert isinstance(found[1], Scored)
    assert isinstance(found[2], Scored)


def test_whoever_gives_no_more_requests_is_given_what_is_under_way(bench: Bench) -> None:
    taken: list[int] = []

    def given() -> Iterator[Request]:
        for request in bench.requests():
            if len(landed) == 2:
                return
            taken.append(request.candidate)
            yield request

    landed: list[int] = []
    for request, _ in bench.executor.evaluate(given()):
        landed.append(request.candidate)
    assert sorted(landed) == sorted(taken)
    assert 2 <= len(landed) <= 4  # one more, at most, for each device


def test_an_iterator_that_is_given_up_leaves_nothing_behind(bench: Bench) -> None:
    given_up = bench.executor.evaluate(bench.requests())
    next(given_up)
    del given_up
    assert len(bench.evaluated(bench.requests())) == len(WEIGHTS)


def test_without_requests_there_is_nothing_to_wait_for(bench: Bench) -> None:
    assert list(bench.executor.evaluate([])) == []


def test_the_test_split_is_sealed_to_executors(bench: Bench) -> None:
    (request,) = bench.requests(1)
    sealed = Request(0, request.recipe, "test", request.examples)
    with pytest.raises(SealedError, match="sealed"):
        list(bench.executor.evaluate([sealed]))
    assert isinstance(bench.evaluated([request])[0], Scored)
