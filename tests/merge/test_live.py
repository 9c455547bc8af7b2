"""The sink in memory: what it keeps, what it reads again, and that neither changes a bit."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from evomerge.errors import ModelError
from evomerge.merge import live
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.operand import Operand
from evomerge.merge.plan import Plan
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from tests.merge.conftest import Tensors, spans_of, threads_of_torch

CPU = torch.device("cpu")
VALUES = {"weight": 0.4, "density": 0.5, "gamma": 0.1, "epsilon": 0.2, "scale": 0.7, "t": 0.3}


def plan_of(
    method: str, opened: Mapping[str, Checkpoint], seed: int = 0, **parameters: Any
) -> Plan:
    """A merge of a and b, or of as many as the method takes, on the base if it takes one."""
    signature = METHODS[method]
    count = int(
        min(2, signature.models[1] - (signature.base != "none" and not signature.task_vectors))
    )
    known = signature.per_model | signature.shared
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name} for name in "ab"[:count]],
        "parameters": {k: v for k, v in (VALUES | parameters).items() if k in known},
    }
    if signature.base != "none":
        recipe["base_model"] = "base"
    parsed = Recipe.from_dict(recipe)
    return make_plan(parsed, {name: opened[name] for name in parsed.model_names()}, seed)


def written(resident: Resident, plan: Plan) -> Tensors:
    """What is written into parameters that hold nothing yet."""
    found = {t.name: torch.full(t.shape, torch.nan, dtype=t.dtype) for t in plan.tensors}
    resident.write(plan, found)
    return found


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def counted(opened: Mapping[str, Checkpoint]) -> tuple[dict[str, Checkpoint], list[str]]:
    """The models, and the names of the tensors that are read of them, span by span."""
    reads: list[str] = []

    def reader(model: Checkpoint) -> Callable[[str], Any]:
        def read(name: str) -> Any:
            values = model.values(name)

            def counting(start: int, stop: int) -> torch.Tensor:
                reads.append(name)
                return values(start, stop)

            return counting

        return read

    return {name: replace(model, read=reader(model)) for name, model in opened.items()}, reads


@pytest.mark.parametrize(
    "method",
    [
        m if m in ("linear", "ties", "slerp") else pytest.param(m, marks=pytest.mark.slow)
        for m in METHODS
    ],
)
def test_how_much_room_there_is_does_not_matter(opened: dict[str, Checkpoint], method: str) -> None:
    plan = plan_of(method, opened)
    with spans_of(256):
        roomy = Resident(opened, CPU)
        expected = written(roomy, plan)
        for room in (0, roomy.held // 3, roomy.held):
            resident = Resident(opened, CPU, room)
            for _ in range(2):
                assert same(written(resident, plan), expected)
            assert resident.held <= room
            assert resident.held + resident.streamed == roomy.held
    assert roomy.streamed == 0


def test_what_is_held_are_casts_task_vectors_and_masks(opened: dict[str, Checkpoint]) -> None:
    plan = plan_of("dare_ties", opened)
    resident = Resident(opened, CPU)
    written(resident, plan)
    values = sum(tensor.numel for tensor in plan.tensors)
    assert resident.held == values * (4 + 2 * 4 + 2 * 2)  # a base, two task vectors, two masks


CHANGES: dict[str, list[dict[str, Any]]] = {
    "slerp": [{"t": t} for t in (0.1, 0.9)],
    "nearswap": [{"t": t} for t in (0.1, 0.9)],
    "ties": [{"density": 0.3, "weight": 0.9}, {"density": 0.9, "lambda": 0.5, "rescale": True}],
    "breadcrumbs": [{"gamma": 0.2}, {"density": 0.2}],
    "dare_ties": [{"density": 0.3}, {"weight": 0.9}],
    "della": [{"density": 0.4}, {"epsilon": 0.1}],
    "task_arithmetic": [{"weight": 0.1}, {"lambda": 0.3}],
    "sce": [{"select_topk": 0.5}, {"select_topk": 0.1}],
    "linear": [{"weight": 0.1}],
}


@pytest.mark.parametrize("method", CHANGES)
def test_the_next_candidate_reads_no_file(opened: dict[str, Checkpoint], method: str) -> None:
    models, reads = counted(opened)
    resident = Resident(models, CPU)
    written(resident, plan_of(method, models))
    assert reads
    reads.clear()
    for change in CHANGES[method]:
        plan = plan_of(method, models, **change)
        assert same(written(resident, plan), written(Resident(opened, CPU), plan))
    assert reads == []


def test_streaming_reads_each_value_once_where_nothing_has_to_be_known(
    opened: dict[str, Checkpoint],
) -> None:
    models, reads = counted(opened)
    resident = Resident(models, CPU, room=0)
    plan = plan_of("task_arithmetic", models)
    for _ in range(2):
        reads.clear()
        written(resident, plan)
        assert len(reads) == 3 * len(plan.tensors)  # the base is read once for both task vectors


@pytest.mark.parametrize(("method", "changed"), [("slerp", "t"), ("ties", "weight")])
def test_what_is_known_of_streamed_tensors_is_not_found_out_again(
    opened: dict[str, Checkpoint], method: str, changed: str
) -> None:
    """Angles, and counts of magnitudes: the second candidate reads less than the first."""
    models, reads = counted(opened)
    resident = Resident(models, CPU, room=0)
    plan = plan_of(method, models, **{changed: 0.8})
    with spans_of(64):
        written(resident, plan_of(method, models))
        first = len(reads)
        reads.clear()
        assert same(written(resident, plan), written(Resident(opened, CPU), plan))
    assert len(reads) < first


def alive(kind: type) -> int:
    gc.collect()
    return sum(issubclass(type(thing), kind) for thing in gc.get_objects())


@pytest.mark.parametrize(
    ("method", "room"),
    [("ties", None), ("ties", 0), ("dare_linear", None), ("sce", None), ("slerp", 0), ("della", 0)],
)
def test_memory_does_not_grow_with_the_number_of_candidates(
    opened: dict[str, Checkpoint], method: str, room: int | None
) -> None:
    models = {name: opened[name] for name in ("base", "a", "b")}
    resident = Resident(models, CPU, room)
    generator = np.random.default_rng(1)
    counts = []
    for candidate in range(50):
        values = {k: float(generator.uniform(0.35, 0.65)) for k in ("density", "weight", "t")}
        values["select_topk"] = values["density"]
        plan = plan_of(method, models, **values)
        written(resident, replace(plan, tensors=plan.tensors[2:5]))
        if candidate in (4, 49):
            counts.append((resident.held, alive(Operand), alive(torch.Tensor)))
    assert counts[0] == counts[1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_tensors_that_share_an_input_may_be_merged_at_once(
    opened: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """A layer that is repeated, in several threads."""
    monkeypatch.setattr(live, "_WORTH_THREADS", 0)
    sources = [{"model": name, "layer_range": [1, 2]} for name in ("base", "a")]
    known = METHODS[method].per_model | METHODS[method].shared
    recipe = {
        "merge_method": method,
        "slices": [{"sources": sources}] * 20,
        "parameters": {k: v for k, v in VALUES.items() if k in known},
    }
    if METHODS[method].base == "required":
        recipe["base_model"] = "base"
    plan = make_plan(Recipe.from_dict(recipe), opened)
    with spans_of(16):
        expected = written(Resident(opened, CPU), plan)
        for room in (None, 0):
            resident = Resident(opened, CPU, room)
            with threads_of_torch(4):
                assert same(written(resident, plan), expected)
    first = {k: v for k, v in expected.items() if ".layers.0." in k}
    for name, value in first.items():
        assert torch.equal(expected[name.replace(".0.", ".19.")], value)


def test_threads_fill_the_room_once(
    opened: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of("dare_ties", opened)
    one, several = Resident(opened, CPU), Resident(opened, CPU)
    expected = written(one, plan)
    monkeypatch.setattr(live, "_WORTH_THREADS", 0)
    with threads_of_torch(3):
        assert same(written(several, plan), expected)
    assert several.held == one.held


def test_live_parameters_that_are_not_contiguous_are_filled(opened: dict[str, Checkpoint]) -> None:
    plan = plan_of("ties", opened)
    resident = Resident(opened, CPU)
    expected = written(resident, plan)
    turned = {
        t.name: torch.zeros(t.shape[::-1], dtype=t.dtype).permute(*range(len(t.shape))[::-1])
        for t in plan.tensors
    }
    resident.write(plan, turned)
    assert same(turned, expected)


def test_what_the_plan_lacks_stays_as_it_is(opened: dict[str, Checkpoint]) -> None:
    plan = plan_of("linear", opened)
    parameters = {t.name: torch.zeros(t.shape) for t in plan.tensors}
    parameters["other"] = torch.full((3,), 7.0)
    Resident(opened, CPU).write(plan, parameters)
    assert parameters["other"].tolist() == [7.0] * 3


def test_parameters_that_learn_are_filled_and_go_on_learning(opened: dict[str, Checkpoint]) -> None:
    plan = plan_of("linear", opened)
    parameters = {t.name: torch.nn.Parameter(torch.zeros(t.shape)) for t in plan.tensors}
    Resident(opened, CPU).write(plan, parameters)
    assert all(p.requires_grad and p.grad_fn is None for p in parameters.values())
    expected = written(Resident(opened, CPU), plan)
    assert same({k: p.detach() for k, p in parameters.items()}, expected)


def test_a_read_error_comes_out(
    opened: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Any:
        raise ModelError(f"tensor '{name}' cannot be read")

    monkeypatch.setattr(live, "_WORTH_THREADS", 0)
    models = opened | {"a": replace(opened["a"], read=broken)}
    for threads in (1, 3):
        with threads_of_torch(threads), pytest.raises(ModelError, match="cannot be read"):
            written(Resident(models, CPU), plan_of("linear", models))


def test_a_model_that_streams_costs_no_memory(opened: dict[str, Checkpoint]) -> None:
    """Neither spans nor task vectors of tensors that found no room stay behind."""
    resident = Resident(opened, CPU, room=0)
    plan = plan_of("ties", opened)
    before = alive(Operand)
    written(resident, plan)
    assert alive(Operand) == before
    tensors = alive(torch.Tensor)
    written(resident, plan)
    assert alive(torch.Tensor) == tensors


def test_what_does_not_fit_on_the_device_is_held_by_the_host(
    opened: dict[str, Checkpoint],
) -> None:
    models, reads = counted(opened)
    plan = plan_of("ties", models)
    resident = Resident(models, CPU, room=1000, host_room=10**9)
    expected = written(Resident(opened, CPU), plan)
    assert same(written(resident, plan), expected)
    assert 0 < resident.held <= 1000 < resident.host_held
    assert not resident.streamed
    reads.clear()
    assert same(written(resident, plan), expected)
    assert reads == []


def test_what_is_held_keeps_no_spans(opened: dict[str, Checkpoint]) -> None:
    """Those of values on the host would be copies on the device, one for each tensor."""
    plan = plan_of("ties", opened)
    resident = Resident(opened, CPU, room=1000, host_room=10**9)
    before = alive(Operand)
    written(resident, plan)
    assert alive(Operand) == before


def test_one_name_may_have_another_shape_in_the_next_candidate(
    opened: dict[str, Checkpoint],
) -> None:
    """As that of a layer in whose place another stands: masks are of the right size."""
    plan = plan_of("dare_linear", opened)
    (tensor,) = (t for t in plan.tensors if t.name == "model.layers.1.mlp.up_proj.weight")
    short = replace(tensor, shape=(tensor.shape[0] - 1, *tensor.shape[1:]))
    resident = Resident(opened, CPU)
    for one in (short, tensor, short):
        changed = replace(plan, tensors=(one,))
        assert same(written(resident, changed), written(Resident(opened, CPU), changed))


@pytest.mark.parametrize("shape", [(5, 16), (1000, 16), (16, 32)])
def test_live_parameters_of_another_shape_are_refused(
    opened: dict[str, Checkpoint], shape: tuple[int, ...]
) -> None:
    plan = plan_of("linear", opened)
    parameters = {t.name: torch.zeros(t.shape) for t in plan.tensors}
    name = "model.layers.1.mlp.up_proj.weight"
    parameters[name] = torch.zeros(shape)
    with pytest.raises(ModelError, match=rf"'{name}' is .* in the merge and \[{shape[0]}, "):
        Resident(opened, CPU).write(plan, parameters)


def test_buffers_that_the_live_model_makes_itself_are_left_to_it(
    opened: dict[str, Checkpoint],
) -> None:
    plan = plan_of("linear", opened)
    buffer = replace(plan.tensors[0], name="model.rotary_emb.inv_freq", method="copy")
    parameters = {t.name: torch.zeros(t.shape, dtype=t.dtype) for t in plan.tensors}
    Resident(opened, CPU).write(replace(plan, tensors=(*plan.tensors, buffer)), parameters)
    assert same(parameters, written(Resident(opened, CPU), plan))
