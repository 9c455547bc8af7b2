"""Norms and cosines of task vectors: against whole vectors, and without holding a whole model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.merge import geometry as geometry_module
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.geometry import geometry
from tests.merge.conftest import altered


def whole(model: Checkpoint, names: list[str]) -> torch.Tensor:
    """These tensors of a model as one vector."""
    tensors = load_file(model.path / "model.safetensors")
    return torch.cat([tensors[name].double().flatten() for name in names])


def test_norms_and_cosines_are_those_of_the_whole_vectors(opened: dict[str, Checkpoint]) -> None:
    base, parents = opened["base"], {name: opened[name] for name in ("a", "b", "half-a")}
    names = list(base.headers)
    vectors = {name: whole(parent, names) - whole(base, names) for name, parent in parents.items()}
    found = geometry(base, parents)
    assert found.norms == pytest.approx(
        {name: float(v.norm() / whole(base, names).norm()) for name, v in vectors.items()}
    )
    assert list(found.cosines) == [("a", "b"), ("a", "half-a"), ("b", "half-a")]
    for (a, b), cosine in found.cosines.items():
        expected = torch.nn.functional.cosine_similarity(vectors[a], vectors[b], dim=0)
        assert cosine == pytest.approx(float(expected))


def test_only_tensors_that_all_three_have_count(opened: dict[str, Checkpoint]) -> None:
    base, tied, a = opened["base"], opened["tied"], opened["a"]  # tied has no head
    names = [name for name in base.headers if name in tied.headers]
    assert len(names) < len(base.headers)
    found = geometry(base, {"a": a, "tied": tied, "wide": opened["wide"], "deep": opened["deep"]})
    left, right = whole(a, names) - whole(base, names), whole(tied, names) - whole(base, names)
    expected = torch.nn.functional.cosine_similarity(left, right, dim=0)
    assert found.cosines["a", "tied"] == pytest.approx(float(expected))
    assert found.norms["tied"] == pytest.approx(float(right.norm() / whole(base, names).norm()))
    assert found.norms["wide"] == 0.0  # no tensor of the base's shapes
    assert found.norms["deep"] > 0  # its first layers


def test_a_parent_that_is_the_base_has_no_direction(opened: dict[str, Checkpoint]) -> None:
    found = geometry(opened["base"], {"a": opened["a"], "same": opened["base"]})
    assert (found.norms["same"], found.cosines["a", "same"]) == (0.0, 0.0)


def test_opposite_task_vectors_have_a_cosine_of_minus_one(
    models: dict[str, Path], tmp_path: Path
) -> None:
    base = load_file(models["base"] / "model.safetensors")
    mirrored = altered(
        models["a"], tmp_path / "mirrored", lambda ts: {k: 2 * base[k] - t for k, t in ts.items()}
    )
    parents = {"a": Checkpoint.open(models["a"]), "mirrored": Checkpoint.open(mirrored)}
    found = geometry(Checkpoint.open(models["base"]), parents)
    assert found.cosines["a", "mirrored"] == pytest.approx(-1.0)
    assert found.norms["a"] == pytest.approx(found.norms["mirrored"], rel=1e-5)


def test_no_vector_is_longer_than_a_tensor(
    opened: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []
    read = geometry_module._flat

    def measured(model: Checkpoint, tensor: str) -> torch.Tensor:
        values = read(model, tensor)
        lengths.append(values.numel())
        return values

    def joined(*_: object) -> None:
        raise AssertionError("a whole model is put together")

    monkeypatch.setattr(geometry_module, "_flat", measured)
    monkeypatch.setattr(torch, "cat", joined)
    geometry(opened["base"], {"a": opened["a"], "b": opened["b"]})
    largest = max(torch.Size(h.shape).numel() for h in opened["base"].headers.values())
    assert max(lengths) == largest
