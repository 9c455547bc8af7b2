"""Workers on Ray whose engine is vLLM: processes that start processes of their own."""

import os
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from evomerge.executor import Request
from evomerge.executor.ray import RayExecutor
from evomerge.executor.spec import ModelSpec, TaskSpec, WorkerSpec
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Evaluation, Scored
from evomerge.fitness.task import Task
from evomerge.job import Engine, TaskEntry
from evomerge.merge.sources import open_model
from evomerge.recipe import Recipe
from tests import tiny
from tests.clusters import Nodes, by_candidate, eventually, giving, is_running, section
from tests.engine.wide import with_wide_heads
from tests.processes import called

pytestmark = pytest.mark.vllm

TASK = "en_list_ops"  # which one of the models knows


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    """Of models of the zoo, with heads that vLLM runs on a CPU, and a task."""
    folder = tmp_path_factory.mktemp("spec")
    parents = {
        name: with_wide_heads(open_model(str(tiny.ZOO / name)), folder / name)
        for name in ("base", "ops", "ja")
    }
    task = tiny.write_task(folder / "task", source=TASK)
    return WorkerSpec(
        Engine(kind="vllm", device="cpu", threads=1, cache_gb=0.25),
        {name: ModelSpec.of(model) for name, model in parents.items()},
        "base",
        (TaskSpec.of(Task.open(task), TaskEntry(task=str(task))),),
        shaped=True,
    )


@pytest.fixture(scope="module")
def pool(nodes: Nodes, spec: WorkerSpec) -> Iterator[RayExecutor]:
    """Of one worker."""
    with closing(RayExecutor(section(workers=1, cpus=1), spec)) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(spec: WorkerSpec) -> Iterator[Worker]:
    """A worker in this process, on transformers."""
    plain = replace(spec, engine=Engine(device="cpu", threads=1))
    with pytest.raises(StopIteration) as end:  # nothing is in the way
        next(plain.opening())
    with closing(end.value.value) as worker:
        yield worker


def requests() -> list[Request]:
    """What was fine-tuned into both models, by several weights, and an order of their layers."""
    weights = [(0.0, 1.0), (0.4, 0.3), (0.7, 0.7), (1.0, 0.0)]
    recipes = [
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [
                {"model": "ops", "parameters": {"weight": ops}},
                {"model": "ja", "parameters": {"weight": ja}},
            ],
        }
        for ops, ja in weights
    ]
    ranges = [("ja", [0, 1]), ("ops", [1, 6])]
    slices = [{"sources": [{"model": model, "layer_range": ends}]} for model, ends in ranges]
    recipes.append({"merge_method": "passthrough", "slices": slices})
    examples = {TASK: np.arange(24, dtype=np.uint32)}
    return [Request(i, Recipe.from_dict(r), "train", examples) for i, r in enumerate(recipes)]


def check(found: dict[int, Evaluation], reference: Worker) -> None:
    """As the reference says, as far as rounding allows."""
    means = set()
    for request in requests():
        evaluation, expected = found[request.candidate], reference.evaluate(request)
        assert isinstance(evaluation, Scored)
        assert isinstance(expected, Scored)
        scores, wanted = evaluation.tasks[TASK], expected.tasks[TASK]
        for part in ("examples", "scores", "truncated", "tokens", "overlong"):
            assert np.array_equal(getattr(scores, part), getattr(wanted, part)), part
        assert scores.shaping == pytest.approx(wanted.shaping, abs=1e-3)
        means.add(float(scores.scores.mean()))
    assert len(means) > 1


def test_candidates_score_on_ray_as_they_do_on_transformers(
    pool: RayExecutor, reference: Worker
) -> None:
    check(by_candidate(list(pool.evaluate(giving(requests())))), reference)
    assert len(called("VLLM")) == 2


def test_a_killed_worker_is_replaced_and_its_engine_ends_with_it(
    pool: RayExecutor, reference: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    (worker,), engine = called("ray::Actor"), called("VLLM")
    found = []
    for landed in pool.evaluate(giving(requests())):
        found.append(landed)
        if len(found) == 2:
            os.kill(worker, signal.SIGKILL)
    check(by_candidate(found), reference)
    assert "is replaced" in caplog.text
    assert eventually(lambda: not any(map(is_running, engine)))
    assert not {worker, *engine} & {*called("ray::Actor"), *called("VLLM")}


def test_engines_end_with_the_pool(pool: RayExecutor, spec: WorkerSpec) -> None:
    engine = called("VLLM")
    assert len(engine) == 2
    pool.close()
    assert eventually(lambda: not any(map(is_running, engine)))
