"""Norms and cosines of task vectors: against whole vectors, and without holding a whole tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.errors import ModelError
from evomerge.merge import geometry as geometry_module
from evomerge.merge.checkpoint import Checkpoint, Read
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


def test_norms_by_module_and_typical_values_are_those_of_the_vectors(
    opened: dict[str, Checkpoint],
) -> None:
    base, a = opened["base"], opened["a"]
    found = geometry(base, {"a": a})
    places = base.layout.places
    kinds = {place.module for place in places.values()}
    assert set(found.modules["a"]) == kinds == {"attention", "mlp", "norms", "embeddings", "head"}
    for kind in kinds:
        names = [name for name, place in places.items() if place.module == kind]
        ours, theirs = whole(base, names), whole(a, names)
        assert found.modules["a"][kind] == pytest.approx(
            float((theirs - ours).norm() / ours.norm())
        )
    names = list(base.headers)
    vector = whole(a, names) - whole(base, names)
    assert found.rms["a"] == pytest.approx(float(vector.square().mean().sqrt()))


def test_without_a_base_the_cosines_are_those_of_the_models(opened: dict[str, Checkpoint]) -> None:
    models = {name: opened[name] for name in ("a", "b", "tied")}
    found = geometry(None, models)
    assert (found.norms, found.rms, found.modules) == ({}, {}, {})
    names = list(opened["a"].headers)
    for (a, b), cosine in found.cosines.items():
        shared = [name for name in names if name in models[a].headers and name in models[b].headers]
        left, right = whole(models[a], shared), whole(models[b], shared)
        expected = torch.nn.functional.cosine_similarity(left, right, dim=0)
        assert cosine == pytest.approx(float(expected))


def test_tensors_belong_together_by_their_place_not_their_prefix(
    models: dict[str, Path], opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def wrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("model.", "wrapped.model.", 1): t for name, t in tensors.items()}

    other = Checkpoint.open(altered(models["a"], tmp_path / "wrapped", wrapped))
    expected = geometry(opened["base"], {"a": opened["a"]}).norms
    assert geometry(opened["base"], {"a": other}).norms == pytest.approx(expected)


def test_a_number_that_is_none_is_told_with_its_place(
    models: dict[str, Path], opened: dict[str, Checkpoint], tmp_path: Path
) -> None:
    def damaged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.norm.weight"][3] = float("nan")
        return tensors

    model = Checkpoint.open(altered(models["b"], tmp_path / "damaged", damaged))
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' of 'b' holds NaN"):
        geometry(opened["base"], {"a": opened["a"], "b": model})
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' of the base holds NaN"):
        geometry(model, {"a": opened["a"]})


def test_infinite_values_are_left_out_and_said_to_be(
    models: dict[str, Path],
    opened: dict[str, Checkpoint],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def masked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.norm.weight"][3] = float("inf")
        return tensors

    model = Checkpoint.open(altered(models["b"], tmp_path / "masked", masked))
    names = [name for name in model.headers if name != "model.norm.weight"]
    vector = whole(model, names) - whole(opened["base"], names)
    found = geometry(opened["base"], {"b": model})
    assert found.norms["b"] == pytest.approx(
        float(vector.norm() / whole(opened["base"], names).norm())
    )
    assert "'model.norm.weight' holds infinite values" in caplog.text


def test_values_are_read_in_short_spans_and_their_progress_is_told(
    opened: dict[str, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    told: list[tuple[int, int]] = []
    values = Checkpoint.values

    def measured(model: Checkpoint, name: str) -> Read:
        read = values(model, name)

        def counted(start: int, stop: int) -> torch.Tensor:
            lengths.append(stop - start)
            return read(start, stop)

        return counted

    monkeypatch.setattr(Checkpoint, "values", measured)
    monkeypatch.setattr(geometry_module, "_SPAN", 100)
    models = [opened[name] for name in ("base", "a", "b")]
    before = torch.get_num_threads()
    found = geometry(models[0], {"a": models[1], "b": models[2]}, lambda *now: told.append(now))
    assert max(lengths) == 100
    assert torch.get_num_threads() == before
    total = sum(header.bytes for model in models for header in model.headers.values())
    assert told[-1] == (total, total)
    assert told == sorted(told)
    monkeypatch.undo()
    again = geometry(models[0], {"a": models[1], "b": models[2]})
    assert found.norms == pytest.approx(again.norms)
    assert found.cosines == pytest.approx(again.cosines)
