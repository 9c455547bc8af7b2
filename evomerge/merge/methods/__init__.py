"""Merge methods: from operands to a merged operand, with the bits of mergekit 0.1.5.

A formula first makes its passes over the inputs, if it needs to know something of them as a whole,
and gives an operand that computes any span of the result. Formulas are in `pointwise`, `vectors`
(on `sparsity`) and `sphere`; here is which method is which formula on which parameters.

Knows nothing of models, files or recipes. `x` stands for a parent's tensor, `d` for a task vector
(parent minus base); all operands of a call have one shape, one floating dtype and one device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from evomerge.merge.methods.pointwise import arcee_fusion, linear, nearswap, passthrough
from evomerge.merge.methods.sparsity import (
    density_rescaled,
    drawn,
    dropped,
    dropped_by_rank,
    l1_rescaled,
    trimmed,
    without_outliers,
)
from evomerge.merge.methods.sphere import karcher, model_stock, multislerp, nuslerp, slerp
from evomerge.merge.methods.vectors import ram, ram_plus, sce, sign_consensus, task_arithmetic
from evomerge.merge.operand import Operand, Read

__all__ = ["Call", "drawn", "merge", "result_dtype"]

# Methods that end in float32 at least, whatever goes in, as in mergekit.
_WIDENING = {"arcee_fusion", "ramplus_tl"}


@dataclass(frozen=True)
class Call:
    """Everything that one output tensor is merged from.

    inputs: task vectors for the methods that take them, else the parents' tensors, the base first
    where the method has one. per_model: the parameters of each input; shared: those of the merge
    (see signatures.METHODS). draws: for input i the random numbers of its mask (see drawn).
    """

    base: Operand | None
    inputs: Sequence[Operand]
    per_model: Sequence[Mapping[str, Any]]
    shared: Mapping[str, Any]
    draws: Callable[[int], Read]

    def column(self, name: str) -> list[float]:
        """A parameter's value for each input."""
        return [parameters[name] for parameters in self.per_model]

    def flag(self, name: str) -> bool:
        """A parameter of the merge that is true or false."""
        return bool(self.shared[name])


def merge(method: str, call: Call) -> Operand:
    """One merged tensor. Raises RecipeError where these very values cannot be merged so."""
    return _FORMULAS[method](call)


def result_dtype(method: str, dtype: torch.dtype) -> torch.dtype:
    """What a method gives for inputs of `dtype`."""
    return torch.promote_types(dtype, torch.float32) if method in _WIDENING else dtype


def _base(call: Call) -> Operand:
    if call.base is None:
        raise TypeError("this method merges task vectors and needs their base")
    return call.base


# A task vector made sparse, from its parameters and random numbers, made if they are asked for.
Sparsify = Callable[[Operand, Mapping[str, Any], Callable[[], Read]], Operand]


def _sparse(call: Call, sparsify: Sparsify) -> list[Operand]:
    """The task vectors, each made sparse by its density and rescaled if asked for."""
    found = []
    for i, (d, parameters) in enumerate(zip(call.inputs, call.per_model, strict=True)):
        density = parameters["density"]
        if density >= 1:
            found.append(d)
            continue
        sparse = sparsify(d, parameters, partial(call.draws, i))
        if call.shared.get("rescale_by_density"):
            sparse = density_rescaled(sparse, density)
        elif call.flag("rescale"):
            sparse = l1_rescaled(d, sparse)
        found.append(sparse)
    return found


def _by_magnitude(d: Operand, parameters: Mapping[str, Any], draws: Callable[[], Read]) -> Operand:
    return trimmed(d, parameters["density"])


def _at_random(d: Operand, parameters: Mapping[str, Any], draws: Callable[[], Read]) -> Operand:
    return dropped(d, parameters["density"], draws())


def _without_outliers(
    d: Operand, parameters: Mapping[str, Any], draws: Callable[[], Read]
) -> Operand:
    return without_outliers(d, parameters["density"], parameters["gamma"])


def _by_rank(d: Operand, parameters: Mapping[str, Any], draws: Callable[[], Read]) -> Operand:
    return dropped_by_rank(d, parameters["density"], parameters["epsilon"], draws())


def _added(call: Call, ds: Sequence[Operand]) -> Operand:
    weights, scale = call.column("weight"), call.shared["lambda"]
    return task_arithmetic(_base(call), ds, weights, call.flag("normalize"), scale)


def _agreed(call: Call, ds: Sequence[Operand]) -> Operand:
    weights, scale = call.column("weight"), call.shared["lambda"]
    return sign_consensus(_base(call), ds, weights, call.flag("normalize"), scale)


def _nuslerp(call: Call) -> Operand:
    a, b = call.inputs
    vectors = "whole"
    if not call.flag("nuslerp_flatten"):  # row_wise is mergekit's name for one vector a column
        vectors = "columns" if call.flag("nuslerp_row_wise") else "rows"
    return nuslerp(a, b, call.base, call.column("weight"), vectors)


def _multislerp(call: Call) -> Operand:
    weights, epsilon = call.column("weight"), call.shared["eps"]
    return multislerp(call.inputs, call.base, weights, call.flag("normalize_weights"), epsilon)


def _ram_plus(call: Call) -> Operand:
    shared = call.shared
    return ram_plus(_base(call), call.inputs, shared["epsilon"], shared["r"], shared["alpha"])


_FORMULAS: dict[str, Callable[[Call], Operand]] = {
    "linear": lambda c: linear(c.inputs, c.column("weight"), c.flag("normalize")),
    "slerp": lambda c: slerp(c.inputs[0], c.inputs[1], c.shared["t"]),
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": lambda c: karcher(c.inputs, int(c.shared["max_iter"]), c.shared["tol"]),
    "task_arithmetic": lambda c: _added(c, c.inputs),
    "ties": lambda c: _agreed(c, _sparse(c, _by_magnitude)),
    "dare_ties": lambda c: _agreed(c, _sparse(c, _at_random)),
    "dare_linear": lambda c: _added(c, _sparse(c, _at_random)),
    "breadcrumbs": lambda c: _added(c, _sparse(c, _without_outliers)),
    "breadcrumbs_ties": lambda c: _agreed(c, _sparse(c, _without_outliers)),
    "della": lambda c: _agreed(c, _sparse(c, _by_rank)),
    "della_linear": lambda c: _added(c, _sparse(c, _by_rank)),
    "model_stock": lambda c: model_stock(c.inputs[0], c.inputs[1:], c.flag("filter_wise")),
    "sce": lambda c: sce(_base(c), c.inputs, c.shared["select_topk"]),
    "nearswap": lambda c: nearswap(c.inputs[0], c.inputs[1], c.shared["t"]),
    "arcee_fusion": lambda c: arcee_fusion(c.inputs[0], c.inputs[1]),
    "ram": lambda c: ram(_base(c), c.inputs, c.shared["epsilon"]),
    "ramplus_tl": _ram_plus,
    "passthrough": lambda c: passthrough(c.inputs[0], c.per_model[0]["scale"]),
}
