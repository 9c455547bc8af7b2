"""The merge methods: which parameters each takes, of what default, and how many models.

Knows nothing of recipes, files or formulas: those are in `evomerge.merge.methods`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import StrictBool, StrictFloat, StrictInt

Scalar = StrictBool | StrictInt | StrictFloat


@dataclass(frozen=True)
class Signature:
    """What a method takes.

    per_model: parameters that each parent has a value of; shared: those of the whole merge.
    Each maps a name to its default, None where the recipe has to give it.
    base: 'required', 'optional' or 'none', where a base_model is a parent like the others.
    task_vectors: True where parents enter as their difference from the base, so that the base,
    listed among the models, changes nothing.
    models: how many models a merge has (lowest, highest), the base aside if it is subtracted.
    """

    per_model: Mapping[str, Scalar | None]
    shared: Mapping[str, Scalar | None]
    base: Literal["required", "optional", "none"]
    task_vectors: bool
    models: tuple[int, float]


_WEIGHTED: Mapping[str, Scalar | None] = {"weight": None}
_SPARSE: Mapping[str, Scalar | None] = {"weight": None, "density": 1.0}
_BREADCRUMBS: Mapping[str, Scalar | None] = {"weight": None, "density": 1.0, "gamma": 0.01}
_DELLA: Mapping[str, Scalar | None] = {"weight": None, "density": 1.0, "epsilon": 0.15}


def _on_vectors(per_model: Mapping[str, Scalar | None], **shared: Scalar | None) -> Signature:
    return Signature(per_model, shared, "required", True, (1, math.inf))


def _added(
    per_model: Mapping[str, Scalar | None], normalize: bool, rescale: bool, **more: Scalar
) -> Signature:
    """Sparse task vectors, weighted and added to the base. int8_mask changes nothing."""
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    return _on_vectors(per_model, **shared, **more)


METHODS: dict[str, Signature] = {
    "linear": Signature(_WEIGHTED, {"normalize": True}, "none", False, (1, math.inf)),
    "slerp": Signature({}, {"t": None}, "required", False, (2, 2)),
    "nuslerp": Signature(
        _WEIGHTED,
        {"nuslerp_row_wise": False, "nuslerp_flatten": True},
        "optional",
        True,
        (2, 2),
    ),
    "multislerp": Signature(
        _WEIGHTED, {"normalize_weights": True, "eps": 1e-8}, "optional", True, (1, math.inf)
    ),
    "karcher": Signature({}, {"max_iter": 10, "tol": 1e-5}, "none", False, (1, math.inf)),
    "task_arithmetic": _on_vectors(_WEIGHTED, normalize=False, **{"lambda": 1.0}),
    "ties": _added(_SPARSE, normalize=True, rescale=False),
    "dare_ties": _added(_SPARSE, normalize=False, rescale=True, rescale_by_density=False),
    "dare_linear": _added(_SPARSE, normalize=False, rescale=True, rescale_by_density=False),
    "breadcrumbs": _added(_BREADCRUMBS, normalize=False, rescale=False),
    "breadcrumbs_ties": _added(_BREADCRUMBS, normalize=False, rescale=False),
    "della": _added(_DELLA, normalize=True, rescale=True),
    "della_linear": _added(_DELLA, normalize=False, rescale=True),
    "model_stock": Signature({}, {"filter_wise": False}, "required", False, (3, math.inf)),
    "sce": _on_vectors({}, select_topk=1.0, int8_mask=False),
    "nearswap": Signature({}, {"t": None}, "required", False, (2, 2)),
    "arcee_fusion": Signature({}, {}, "required", False, (2, 2)),
    "ram": _on_vectors({}, epsilon=1e-5),
    "ramplus_tl": _on_vectors({}, epsilon=1e-5, r=0.1, alpha=0.2),
    "passthrough": Signature({"scale": 1.0}, {}, "none", False, (1, 1)),
}
