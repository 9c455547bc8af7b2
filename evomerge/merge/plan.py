"""The plan of a merge: for every output tensor its inputs, method and parameters.

Made by `planner` from a recipe and the headers of its models. Both sinks compute a tensor by
`compute`, so that what is scored is what is shipped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from evomerge.merge import methods
from evomerge.merge.methods.aim import relaxed
from evomerge.merge.operand import Operand, Read
from evomerge.recipe import Recipe
from evomerge.seeds import derive

if TYPE_CHECKING:
    from evomerge.merge.vocabulary import Rows, Vocabulary

Located = tuple[str, str]  # (model, tensor name)
COPY = "copy"


@dataclass(frozen=True)
class Input:
    """A model's tensor. rows: where its rows stand in the output's order of tokens, None where
    they stay; owners: the tensors of all inputs, which rows may be taken from."""

    model: str
    name: str
    rows: "Rows | None" = None
    owners: tuple[Located, ...] = ()


@dataclass(frozen=True, eq=False)
class AimPlan:
    """How far a merged matrix is drawn back to the base's: see recipe.Aim. activation: of the
    base, see statistics.ACTIVATION_MEAN."""

    base: Input
    omega: float
    activation: torch.Tensor


@dataclass(frozen=True)
class TensorPlan:
    """One output tensor.

    method: a merge method, or 'copy': the only input as it is. inputs: as the method takes them;
    base: for methods that need one. per_model: parameters of each input; shared: those of the
    merge. compute_dtype: what inputs are cast to; dtype: what the output is. aim: what is done to
    the result of the method.
    """

    name: str
    shape: tuple[int, ...]
    method: str
    inputs: tuple[Input, ...]
    base: Input | None
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    compute_dtype: torch.dtype
    dtype: torch.dtype
    aim: AimPlan | None = None

    @property
    def numel(self) -> int:
        """How many values the output has."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the output's values."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A whole merge.

    layers: by part of the model, (model, layer) that each output layer's place in the config
    follows. head: the output has a head of its own, not tied to the embeddings. donor: the model
    that gives config.json and, without a vocabulary, the tokenizer's files. seed: of random masks.
    notes: what is copied, left out or odd, a line each.
    """

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    layers: Mapping[str, tuple[tuple[str, int], ...]]
    head: bool
    donor: str
    vocabulary: "Vocabulary | None"
    seed: int
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of the merged model's values."""
        return sum(tensor.bytes for tensor in self.tensors)


class Inputs(Protocol):
    """Where the values come from: files, or memory."""

    def operand(self, source: Input, plan: TensorPlan) -> Operand:
        """An input of a tensor, in the plan's compute dtype."""
        ...

    def task_vector(self, source: Input, base: Operand, plan: TensorPlan) -> Operand:
        """An input minus the operand of the plan's base, both cast first."""
        ...

    def draws(self, seed: int, plan: TensorPlan) -> Read:
        """Random numbers for a mask: see methods.drawn."""
        ...


def compute(plan: TensorPlan, inputs: Inputs, seed: int) -> Operand:
    """One output tensor, in its dtype."""
    if not plan.numel:
        return Operand.of(torch.empty(plan.shape, dtype=plan.dtype))
    merged = _merged(plan, inputs, seed)
    if plan.aim is not None:
        base = inputs.operand(plan.aim.base, plan)
        merged = relaxed(merged, base, plan.aim.activation, plan.aim.omega)
    return merged if merged.dtype == plan.dtype else merged.derived(merged.span, plan.dtype)


def _merged(plan: TensorPlan, inputs: Inputs, seed: int) -> Operand:
    if plan.method == COPY:
        return inputs.operand(plan.inputs[0], plan)
    if plan.base is None:
        base, values = None, [inputs.operand(source, plan) for source in plan.inputs]
    else:
        base = inputs.operand(plan.base, plan)
        if not plan.inputs:
            return base
        values = [inputs.task_vector(source, base, plan) for source in plan.inputs]

    def draws(i: int) -> Read:
        return inputs.draws(derive(seed, plan.name, i), plan)

    call = methods.Call(base, values, plan.per_model, plan.shared, draws)
    return methods.merge(plan.method, call)
