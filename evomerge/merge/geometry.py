"""How far parents lie from their base, and in which directions: lengths and angles of task vectors.

One pass over the values of all models, span by span: memory holds a few spans, whatever the size
of the models. Tensors belong together as in a merge, by their place, whatever stands before their
names. Knows nothing of recipes.
"""

import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint, Header, Read

_SPAN = 1 << 16  # values of each model in a product: a few rows of float64 stay in the cache

_BASE = ""  # among the models' names: no parent has an empty one

_log = logging.getLogger(__name__)

_Key = tuple[str, int | None, str]  # part, layer, what the tensor is called there


@dataclass(frozen=True)
class Geometry:
    """What models look like from their base.

    norms: of each parent's task vector, as a share of the norm of the base's values. cosines: of
    each pair of parents' task vectors, in [-1, 1]; 0 where one of them is zero. Without a base
    there are no norms, and the cosines are those of the models themselves. rms: root mean square
    of a task vector's values. modules: the norms by parent and kind of module (see layout.Place),
    each a share of the base's norm there.
    """

    norms: dict[str, float]
    cosines: dict[tuple[str, str], float]
    rms: dict[str, float] = field(default_factory=dict)
    modules: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Tensor:
    """A tensor that some models have in one shape, and its name in each."""

    module: str
    numel: int
    names: Mapping[str, str]


@dataclass(frozen=True)
class _Products:
    """Sums over one tensor: `gram` [n, n] float64, the inner product of each pair of `rows`, which
    are the base and task vectors, or models if there is no base."""

    module: str
    numel: int
    rows: tuple[str, ...]
    gram: torch.Tensor

    def of(self, a: str, b: str) -> float:
        return float(self.gram[self.rows.index(a), self.rows.index(b)])


def geometry(
    base: Checkpoint | None,
    parents: Mapping[str, Checkpoint],
    progress: Callable[[int, int], None] = lambda read, total: None,
) -> Geometry:
    """Norms and cosines of the parents' task vectors, in float64; without a base, of the parents.

    A norm is over the tensors that the parent and the base have in one shape, a cosine over those
    that both parents and the base have. Tensors of integers and of quantised values do not count.
    progress is told the bytes read so far, of all, one call at a time. Raises ModelError where a
    value is no number.
    """
    models = dict(parents) if base is None else {_BASE: base, **parents}
    found = _measure(models, _tensors(models, base is not None), base is not None, progress)
    pairs = itertools.combinations(parents, 2)
    cosines = {pair: _cosine([p for p in found if {*pair} <= {*p.rows}], *pair) for pair in pairs}
    if base is None:
        return Geometry({}, cosines)
    own = {name: [p for p in found if name in p.rows] for name in parents}
    return Geometry(
        {name: _share(products, name) for name, products in own.items()},
        cosines,
        {name: _rms(products, name) for name, products in own.items()},
        {name: _by_module(products, name) for name, products in own.items()},
    )


def _share(products: Sequence[_Products], name: str) -> float:
    part = sum(p.of(name, name) for p in products)
    whole = sum(p.of(_BASE, _BASE) for p in products)
    return math.sqrt(part / whole) if whole else 0.0


def _by_module(products: Sequence[_Products], name: str) -> dict[str, float]:
    kinds = dict.fromkeys(p.module for p in products)
    return {kind: _share([p for p in products if p.module == kind], name) for kind in kinds}


def _rms(products: Sequence[_Products], name: str) -> float:
    count = sum(p.numel for p in products)
    return math.sqrt(sum(p.of(name, name) for p in products) / count) if count else 0.0


def _cosine(products: Sequence[_Products], a: str, b: str) -> float:
    inner, aa, bb = (sum(p.of(*pair) for p in products) for pair in ((a, b), (a, a), (b, b)))
    return max(-1.0, min(1.0, inner / math.sqrt(aa * bb))) if aa and bb else 0.0


def _tensors(models: Mapping[str, Checkpoint], with_base: bool) -> Iterator[_Tensor]:
    """The tensors that at least two models have, the base among them if there is one."""
    places = {name: dict(_places(model)) for name, model in models.items()}
    first = next(iter(models))
    keys = places[first] if with_base else {k: None for own in places.values() for k in own}
    for key in keys:
        names = {model: own[key][0] for model, own in places.items() if key in own}
        headers = {model: models[model].headers[name] for model, name in names.items()}
        shape = next(iter(headers.values())).shape
        alike = [m for m, h in headers.items() if h.shape == shape and _has_numbers(h)]
        if len(alike) > 1 and (first in alike or not with_base):
            module = places[alike[0]][key][1]
            yield _Tensor(module, math.prod(shape), {model: names[model] for model in alike})


def _places(model: Checkpoint) -> Iterator[tuple[_Key, tuple[str, str]]]:
    """Name and module of each tensor, by its place."""
    for part, layout in model.parts.items():
        for (layer, key), name in layout.index.items():
            yield (part, layer, key), (name, layout.places[name].module)


def _has_numbers(header: Header) -> bool:
    return header.dtype.is_floating_point and not header.packed


def _measure(
    models: Mapping[str, Checkpoint],
    tensors: Iterator[_Tensor],
    with_base: bool,
    progress: Callable[[int, int], None],
) -> list[_Products]:
    """The products of every tensor; threads share the tensors, and no sum depends on how many."""
    tensors_ = sorted(tensors, key=lambda t: -t.numel)  # the longest first: none is waited for
    total = sum(models[m].headers[n].bytes for t in tensors_ for m, n in t.names.items())
    lock = threading.Lock()
    read = 0

    def count(size: int) -> None:
        nonlocal read
        with lock:
            read += size
            progress(read, total)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            found = pool.map(lambda t: _products(models, t, with_base, count), tensors_)
            return [products for products in found if products is not None]
    finally:
        torch.set_num_threads(before)


def _products(
    models: Mapping[str, Checkpoint],
    tensor: _Tensor,
    with_base: bool,
    count: Callable[[int], None],
) -> _Products | None:
    reads = {model: models[model].values(name) for model, name in tensor.names.items()}
    gram = torch.zeros(len(reads), len(reads), dtype=torch.float64)
    rows = torch.empty(len(reads), min(_SPAN, tensor.numel), dtype=torch.float64)
    for start in range(0, tensor.numel, _SPAN):
        stop = min(start + _SPAN, tensor.numel)
        span = rows[:, : stop - start]
        size = 0
        for row, read in zip(span, reads.values(), strict=True):
            values = read(start, stop)
            size += values.nbytes
            row.copy_(values)
        if with_base:
            span[1:] -= span[0]
        gram += span @ span.T
        count(size)
    if not gram.isfinite().all():
        _check_numbers(reads, tensor)
        return None
    return _Products(tensor.module, tensor.numel, tuple(reads), gram)


def _check_numbers(reads: Mapping[str, Read], tensor: _Tensor) -> None:
    """Of a tensor whose sums are no numbers."""
    for model, read in reads.items():
        spans = (read(i, min(i + _SPAN, tensor.numel)) for i in range(0, tensor.numel, _SPAN))
        if any(bool(values.isnan().any()) for values in spans):
            owner = f"'{model}'" if model != _BASE else "the base"
            raise ModelError(
                f"tensor '{tensor.names[model]}' of {owner} holds NaN: the model is damaged, copy "
                "or train it again"
            )
    name = next(iter(tensor.names.values()))
    _log.warning("tensor '%s' holds infinite values: no norm or cosine counts it", name)
