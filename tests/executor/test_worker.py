"""What a worker makes of a request: a score or a failure, and of the next one a merge ahead."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from evomerge.engine import Likelihood
from evomerge.engine.build import build
from evomerge.errors import ModelError, OutOfMemory
from evomerge.executor import Request
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Failed, Scored
from evomerge.fitness.task import Task
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from tests import tiny

TASK = "ja_list_ops"


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    return {TASK: Task.open(tiny.write_task(tmp_path / "task"))}


def of(model: str, layers: int = 6) -> Request:
    """A model, as it is by default, on four examples."""
    slices = [{"sources": [{"model": model, "layer_range": [0, layers]}]}]
    recipe = {"merge_method": "passthrough", "slices": slices}
    return Request(0, Recipe.from_dict(recipe), "train", {TASK: np.arange(4, dtype=np.uint32)})


class _Heard:
    """An engine that notes what it is told, and fails to load what it is made to."""

    merges_ahead = True

    def __init__(self, failure: Exception | None = None) -> None:
        self.told: list[tuple[str, object]] = []
        self._failure = failure

    def load(self, recipe: Recipe) -> None:
        self.told.append(("load", recipe))
        if self._failure is not None:
            raise self._failure

    def prepare(self, recipe: Recipe) -> bool:
        self.told.append(("prepare", recipe))
        return True

    def likelihoods(self, pairs: Sequence[object], ended: bool = True) -> list[Likelihood]:
        self.told.append(("score", len(pairs)))
        return [Likelihood((-1.0,), False) for _ in pairs]


def test_what_is_upcoming_is_prepared_between_the_load_and_the_scores(
    tasks: dict[str, Task],
) -> None:
    engine = _Heard()
    worker = Worker(engine, tasks, shaped=True)
    assert worker.merges_ahead
    now, after = of("a"), of("b")
    worker.evaluate(now, after)
    worker.evaluate(after)
    assert engine.told == [
        ("load", now.recipe),
        ("prepare", after.recipe),
        ("score", 4),
        ("load", after.recipe),
        ("score", 4),
    ]


def test_nothing_is_prepared_beside_a_model_that_is_not_there() -> None:
    engine = _Heard(ModelError("damaged"))
    worker = Worker(engine, {}, shaped=False)
    evaluation = worker.evaluate(of("a"), of("b"))
    assert isinstance(evaluation, Failed)
    assert evaluation.reason == "damaged"
    assert [what for what, _ in engine.told] == ["load"]


def test_too_little_memory_is_for_others_to_judge() -> None:
    engine = _Heard(OutOfMemory("the merge does not fit into the memory of cuda:0"))
    with pytest.raises(OutOfMemory):
        Worker(engine, {}, shaped=False).evaluate(of("a"))


@pytest.fixture(params=[False, True], ids=["in turn", "ahead"])
def worker(request: pytest.FixtureRequest, tasks: dict[str, Task]) -> Iterator[Worker]:
    """A real one, of two models of the zoo."""
    parents = {name: Checkpoint.open(tiny.ZOO / name) for name in ("ops", "ja")}
    section = Section(device="cpu", merge_ahead=request.param)
    with closing(Worker(build(section, parents, "ops"), tasks, shaped=True)) as opened:
        assert opened.merges_ahead is request.param
        yield opened


def test_scores_are_the_same_whatever_was_said_to_be_upcoming(worker: Worker) -> None:
    a, b = of("ops"), of("ja")
    wrong = of("ja", layers=99)  # which it does not have
    told: list[tuple[Request, Request | None]] = [
        (a, None),
        (b, None),
        (a, b),
        (b, a),
        (b, wrong),
        (a, wrong),
        (wrong, b),
        (b, None),
    ]
    expected: dict[Request, Scored] = {}
    for now, upcoming in told:
        evaluation = worker.evaluate(now, upcoming)
        if now is wrong:
            assert isinstance(evaluation, Failed)
            continue
        assert isinstance(evaluation, Scored)
        assert 0 <= evaluation.merge_seconds <= evaluation.seconds
        before = expected.setdefault(now, evaluation)
        pairs = zip(astuple(before.tasks[TASK]), astuple(evaluation.tasks[TASK]), strict=True)
        for one, other in pairs:
            np.testing.assert_array_equal(one, other)
    shaping = [scored.tasks[TASK].shaping for scored in expected.values()]
    assert not np.array_equal(*shaping)


def test_an_actor_loads_nothing_before_its_environment_is_set() -> None:
    code = (
        "import sys, evomerge.executor.actor as actor; actor.Actor({});"
        "print({'torch', 'transformers', 'huggingface_hub', 'ray'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
