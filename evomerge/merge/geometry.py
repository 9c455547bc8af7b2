"""How far parents lie from their base, and in which directions: lengths and angles of task vectors.

Read tensor by tensor, so that memory holds one tensor of each model and never a whole model.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from evomerge.merge.checkpoint import Checkpoint


@dataclass(frozen=True)
class Geometry:
    """norms: of each parent's task vector, as a share of the norm of the base's values. cosines:
    of each pair of parents' task vectors, in [-1, 1]; 0 where one of them is zero."""

    norms: dict[str, float]
    cosines: dict[tuple[str, str], float]


@dataclass
class _Sums:
    """Running sums over tensors of two vectors: their product, and the square of each."""

    product: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        self.product += float(torch.dot(a, b))
        self.squares[0] += float(torch.dot(a, a))
        self.squares[1] += float(torch.dot(b, b))

    @property
    def norms(self) -> tuple[float, float]:
        return self.squares[0] ** 0.5, self.squares[1] ** 0.5

    @property
    def cosine(self) -> float:
        a, b = self.norms
        return max(-1.0, min(1.0, self.product / (a * b))) if a and b else 0.0


def geometry(base: Checkpoint, parents: Mapping[str, Checkpoint]) -> Geometry:
    """Norms and cosines of the parents' task vectors, in float64.

    A norm is over the tensors that the parent and the base have in one shape, a cosine over those
    that both parents and the base have.
    """
    own = {name: _Sums() for name in parents}
    pairs = {pair: _Sums() for pair in itertools.combinations(parents, 2)}
    for tensor, header in base.headers.items():
        values = _flat(base, tensor)
        vectors = {
            name: _flat(parent, tensor) - values
            for name, parent in parents.items()
            if tensor in parent.headers and parent.headers[tensor].shape == header.shape
        }
        for name, vector in vectors.items():
            own[name].add(vector, values)
        for a, b in itertools.combinations(vectors, 2):
            pairs[a, b].add(vectors[a], vectors[b])
    return Geometry(
        {name: _ratio(*sums.norms) for name, sums in own.items()},
        {pair: sums.cosine for pair, sums in pairs.items()},
    )


def _flat(model: Checkpoint, tensor: str) -> torch.Tensor:
    return model.tensor(tensor).double().flatten()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
