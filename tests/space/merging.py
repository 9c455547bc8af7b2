"""Spaces over real models: what a point of the cube means, as tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from evomerge.coordinates import Genotype, start_of
from evomerge.layout import infer
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.files import FromFiles
from evomerge.merge.plan import compute
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from evomerge.space import Models, Space

Tensors = dict[str, torch.Tensor]


def models_of(parents: Mapping[str, Path], base: Path | None = None) -> Models:
    """What a space is told of these folders."""
    paths = {name: str(path) for name, path in parents.items()}
    folders = [*paths.values(), *([str(base)] if base else [])]
    opened = {path: Checkpoint.open(path) for path in folders}
    return Models(
        paths,
        str(base) if base else None,
        {path: infer(model.headers) for path, model in opened.items()},
        dtype_name(opened[folders[0]].dtype),
        {path: model.config for path, model in opened.items()},
        {path: {n: h.numel for n, h in model.headers.items()} for path, model in opened.items()},
    )


def merged(recipe: Recipe) -> Tensors:
    """What a recipe makes of its models."""
    models = {path: Checkpoint.open(path) for path in recipe.model_names()}
    plan, inputs = make_plan(recipe, models), FromFiles(models)
    return {tensor.name: compute(tensor, inputs, plan.seed).whole() for tensor in plan.tensors}


def values_of(folder: Path) -> Tensors:
    """A model's own tensors."""
    model = Checkpoint.open(folder)
    return {name: model.tensor(name) for name in model.headers}


def assert_same(found: Tensors, expected: Tensors) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def decoded(space: Space, genotype: Genotype) -> Recipe:
    """The recipe of a point that means one."""
    recipe = space.decode(genotype)
    assert isinstance(recipe, Recipe), recipe
    return recipe


def names_of(space: Space) -> list[str]:
    """What its coordinates are called."""
    return [coordinate.name for coordinate in space.coordinates]


def point(space: Space, **units: float) -> Genotype:
    """The start, with some coordinates elsewhere: each whose name ends in a keyword, whose
    underscores stand for spaces."""
    genotype = start_of(space.coordinates)
    for ending, unit in units.items():
        found = [i for i, n in enumerate(names_of(space)) if n.endswith(ending.replace("_", " "))]
        assert found, ending
        genotype[found] = unit
    return genotype


def layers_of(recipe: Recipe) -> list[int]:
    """The layers of a recipe's slices, one after the other."""
    ranges = [one.sources[0].layer_range for one in recipe.slices or ()]
    return [layer for start, end in ranges for layer in range(start, end)]


def random_points(space: Space, count: int, seed: int = 0) -> Sequence[Genotype]:
    """Points of the cube."""
    return list(np.random.default_rng(seed).random((count, len(space.coordinates))))
