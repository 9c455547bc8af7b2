"""Candidates that come back: kept where it is worth it, to the last bit."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from evomerge.engine.kept import Kept, Shape
from evomerge.engine.model import LiveModel
from evomerge.errors import ModelError
from evomerge.layout import Layout
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.plan import Plan
from evomerge.recipe import Recipe

CPU = torch.device("cpu")
SHAPE = Shape((("a", 0),), Layout(0, "", {}), "a")
LONG = 100.0  # seconds that no copy takes


def made(weight: float) -> Recipe:
    entries = [{"model": "a", "parameters": {"weight": weight}}, {"model": "b"}]
    return Recipe.from_dict(
        {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}}
    )


def values(number: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((100,), float(number)), "y": torch.tensor([torch.nan, -0.0])}


def returning() -> Kept:
    """After the first return."""
    kept = Kept(CPU)
    for _ in range(2):
        assert kept.found(made(-1)) is None
    return kept


def test_nothing_is_kept_before_a_candidate_comes_back() -> None:
    kept = Kept(CPU)
    for number in range(4):
        assert kept.found(made(number)) is None
        kept.offer(made(number), SHAPE, values(number), LONG)
    assert not kept.clear()


def test_what_is_kept_is_written_to_the_last_bit() -> None:
    kept = returning()
    tensors = values(3)
    kept.offer(made(3), SHAPE, tensors, LONG)
    expected = {name: value.clone() for name, value in tensors.items()}
    for value in tensors.values():
        value.fill_(7)  # the next candidate
    found = kept.found(made(3))
    assert found is not None
    assert found.shape == SHAPE
    found.write(tensors)
    for name, value in tensors.items():
        assert value.view(torch.int32).equal(expected[name].view(torch.int32))
    assert kept.found(made(4)) is None
    assert kept.clear()
    assert kept.found(made(3)) is None


def test_merges_that_are_as_cheap_as_copies_are_not_kept() -> None:
    kept = returning()
    kept.offer(made(0), SHAPE, values(0), LONG)  # which tells what a copy takes
    kept.offer(made(1), SHAPE, values(1), 1e-12)
    assert kept.found(made(0)) is not None
    assert kept.found(made(1)) is None


def test_a_merge_that_memory_is_short_for_gets_that_of_what_is_kept(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = {name: Checkpoint.open(models[name]) for name in ("a", "b")}
    live = LiveModel(opened, "a", CPU, None)
    recipes = [made(weight) for weight in (0.1, 0.2, 0.3)]
    expected = []
    for recipe in (*recipes, *recipes[:2]):  # two come back, and the first is kept
        live.load(recipe)
        expected.append({name: value.clone() for name, value in live.run.named_parameters()})
    write, failed = Resident.write, []

    def short_once(self: Resident, plan: Plan, named: Mapping[str, torch.Tensor]) -> None:
        if not failed:
            failed.append(plan)
            raise torch.OutOfMemoryError("CUDA out of memory")
        write(self, plan, named)

    monkeypatch.setattr(Resident, "write", short_once)
    live.load(recipes[2])
    assert failed
    for name, value in live.run.named_parameters():
        assert value.equal(expected[2][name])
    failed.clear()
    live.forget()
    with pytest.raises(ModelError, match="does not fit into the memory of cpu"):
        live.load(recipes[0])


def test_the_oldest_make_room() -> None:
    kept = returning()
    for number in range(40):
        kept.offer(made(number), SHAPE, values(number), LONG)
    held = [number for number in range(40) if kept.found(made(number)) is not None]
    assert held == list(range(8, 40))
