"""What every executor promises: each request is evaluated once, by whichever device is free."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evomerge.errors import SealedError
from evomerge.executor import Executor, Request, Stopped
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.job import Job
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from tests import tiny
from tests.clusters import by_candidate, giving

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
                samples=2,
            )
            for i, weight in enumerate(WEIGHTS[:count])
        ]

    def evaluated(self, requests: list[Request]) -> dict[int, Evaluation]:
        """By candidate, each once."""
        found = by_candidate(list(self.executor.evaluate(giving(requests))))
        assert sorted(found) == sorted(request.candidate for request in requests)
        return found


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
    other = tiny.write_task(folder / "other", source="ja_transcription")
    written = other.read_text(encoding="utf-8").replace("teacher_forced: true", "")
    other.write_text(written, encoding="utf-8")
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
    if one.replies != other.replies:
        return False
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


def test_replies_come_along_as_far_as_they_are_asked_for(bench: Bench) -> None:
    """Of a task that is answered by one forward there are none."""
    forced, written = bench.tasks
    for request in bench.requests():
        lowest = sorted({*np.sort(request.examples[forced])[:2].tolist()})
        for samples, expected in ((0, []), (2, lowest)):
            (landed,) = bench.executor.evaluate(giving([replace(request, samples=samples)]))
            assert isinstance(landed.evaluation, Scored)
            replies = landed.evaluation.replies
            assert replies[forced] == {}
            assert [*replies.get(written, {})] == (expected if written in request.examples else [])


def test_the_order_of_requests_changes_nothing(bench: Bench) -> None:
    found = bench.evaluated(bench.requests())
    for landed in bench.executor.evaluate(giving(bench.requests()[::-1])):
        assert same(landed.evaluation, found[landed.request.candidate])


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


def test_what_lands_is_the_very_request_that_was_taken(bench: Bench) -> None:
    (one,) = bench.requests(1)
    alike = [one, replace(one), replace(one)]  # tell them apart by nothing but that
    found = [landed.request for landed in bench.executor.evaluate(giving(alike))]
    assert sorted(map(id, found)) == sorted(map(id, alike))


class Feed:
    """Gives requests, and writes down when it is asked. then: what it gives where none is left, as
    long as that is something."""

    def __init__(self, requests: Sequence[Request], then: Callable[[], Request | None]) -> None:
        self._left = list(requests)
        self._then = then
        self.given: list[Request] = []
        self.asked = 0

    def take(self) -> Request | None:
        """See Executor."""
        self.asked += 1
        request = self._left.pop(0) if self._left else self._then()
        if request is not None:
            self.given.append(request)
        return request


def nothing() -> None:
    """There is no request."""


def test_a_request_is_taken_when_there_is_a_device_for_it(bench: Bench) -> None:
    feed = Feed(bench.requests(), nothing)
    each = 1 + bench.worker.merges_ahead  # is told of one more than it is at
    for number, _ in enumerate(bench.executor.evaluate(feed.take), 1):
        assert len(feed.given) <= number - 1 + each * len(bench.executor.devices())
    assert len(feed.given) == len(WEIGHTS)


def test_whoever_gives_no_more_requests_is_given_what_is_under_way(bench: Bench) -> None:
    landed: list[Request] = []
    some = iter(bench.requests())
    feed = Feed([], lambda: next(some) if len(landed) < 2 else None)
    for found in bench.executor.evaluate(feed.take):
        landed.append(found.request)
    assert sorted(map(id, landed)) == sorted(map(id, feed.given))


def test_whoever_stops_is_given_what_has_begun(bench: Bench) -> None:
    landed: list[Request] = []
    some = iter(bench.requests())

    def stopping() -> Request | None:
        if len(landed) == 2:
            raise Stopped
        return next(some)

    feed = Feed([], stopping)
    for found in bench.executor.evaluate(feed.take):
        landed.append(found.request)
    ahead = len(bench.executor.devices()) if bench.worker.merges_ahead else 0
    assert len({*landed}) == len(landed) >= len(feed.given) - ahead
    assert {*landed} <= {*feed.given}
    assert len(bench.evaluated(bench.requests(3))) == 3  # those that follow are not stopped


def test_whoever_has_none_at_present_is_asked_again_when_something_has_landed(
    bench: Bench,
) -> None:
    """One after the other, each of which depends on what came of the one before it."""
    first, *others = bench.requests()
    known: list[int] = []
    feed = Feed(
        [first], lambda: others.pop(0) if others and len(known) == 8 - len(others) else None
    )
    for landed in bench.executor.evaluate(feed.take):
        known.append(landed.request.candidate)
    assert known == list(range(len(WEIGHTS)))


def test_nobody_is_asked_again_before_something_has_landed(bench: Bench) -> None:
    feed = Feed(bench.requests(3), nothing)
    landed = 0
    for _ in bench.executor.evaluate(feed.take):
        assert feed.asked <= len(feed.given) + landed + 1  # once for none after each landing
        landed += 1
    assert feed.asked <= len(feed.given) + landed + 1


def test_stages_follow_one_another_while_others_run(bench: Bench) -> None:
    """A second round for the better half of each pair, as soon as both of it have landed."""
    pairs: dict[int, list[Request]] = {}
    again: list[Request] = []
    feed = Feed(bench.requests(), lambda: again.pop(0) if again else None)
    landed = []
    for found in bench.executor.evaluate(feed.take):
        landed.append(found)
        if found.request in feed.given[: len(WEIGHTS)]:
            pair = pairs.setdefault(found.request.candidate // 2, [])
            pair.append(found.request)
            if len(pair) == 2:
                again.append(replace(pair[0], split="validation"))
    assert len(landed) == len(feed.given) == len(WEIGHTS) * 3 // 2
    for found in landed:
        assert same(found.evaluation, bench.worker.evaluate(found.request))


def test_an_iterator_that_is_given_up_leaves_nothing_behind(bench: Bench) -> None:
    given_up = bench.executor.evaluate(giving(bench.requests()))
    next(given_up)
    del given_up
    assert len(bench.evaluated(bench.requests())) == len(WEIGHTS)


def test_without_requests_there_is_nothing_to_wait_for(bench: Bench) -> None:
    assert list(bench.executor.evaluate(nothing)) == []


def test_what_is_raised_by_whoever_is_asked_reaches_the_caller(bench: Bench) -> None:
    def refusing() -> Request | None:
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        list(bench.executor.evaluate(refusing))
    assert len(bench.evaluated(bench.requests(2))) == 2


def test_devices_say_where_their_time_went(bench: Bench) -> None:
    before = {device.name: device for device in bench.executor.devices()}
    found = list(bench.executor.evaluate(giving(bench.requests())))
    after = {device.name: device for device in bench.executor.devices()}
    assert len(after) == len(bench.executor.devices()) >= len(before)
    for device in after.values():
        spent = device.opening + device.merging + device.scoring + device.lost
        assert device.opening > 0
        assert device.lost == 0
        assert spent <= device.held
        assert device.gpus == 0
        mine = [landed.evaluation for landed in found if landed.device == device.name]
        was = before.get(device.name)
        assert device.evaluations - (was.evaluations if was else 0) == len(mine)
        seconds = sum(evaluation.seconds for evaluation in mine)
        busy = device.merging + device.scoring - (was.merging + was.scoring if was else 0)
        assert busy == pytest.approx(seconds)
    assert {landed.device for landed in found} <= after.keys()
    assert {landed.gpus for landed in found} == {1}  # where there is none


def test_the_test_split_is_sealed_to_executors(bench: Bench) -> None:
    (request,) = bench.requests(1)
    sealed = Request(0, request.recipe, "test", request.examples)
    with pytest.raises(SealedError, match="sealed"):
        list(bench.executor.evaluate(giving([sealed])))
    assert isinstance(bench.evaluated([request])[0], Scored)
