"""Several objectives at once: what nobody dominates, how far it reaches, where to look first.

All values are (n, k), one row for each candidate; higher is better in every column. A row
dominates another if it is nowhere worse and somewhere better.
"""

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Positions = NDArray[np.intp]

_MARGIN = 0.1


def front(values: Values) -> Positions:
    """The positions, in their order, of the rows that no row dominates; equal rows all stay."""
    # Whoever dominates a row has a larger sum, so that only rows that were kept can dominate it;
    # a sum may round to that of the row, hence the lexicographic order among equal ones.
    order = np.lexsort((*(-values.T), -values.sum(axis=1)))
    kept = np.empty_like(values)
    found: list[int] = []
    for position in order:
        row, others = values[position], kept[: len(found)]
        if not ((others >= row).all(axis=1) & (others > row).any(axis=1)).any():
            kept[len(found)] = row
            found.append(int(position))
    return np.sort(np.array(found, dtype=np.intp))


def reference(baselines: Values) -> NDArray[np.float64]:
    """Where hypervolume is measured from, (k,): the worst of the baselines in each objective,
    less a tenth of their range, so that who is worst in one thing alone still counts.

    Where the baselines are all alike, less a tenth of that value's size; where it is 0, of 1.
    """
    worst = baselines.min(axis=0)
    span = baselines.max(axis=0) - worst
    span = np.where(span > 0, span, np.where(worst != 0, np.abs(worst), 1.0))
    return np.asarray(worst - _MARGIN * span, dtype=np.float64)


def hypervolume(values: Values, reference: NDArray[np.float64]) -> float:
    """The volume of what the rows dominate above a reference point, (k,): exact.

    Rows that are not above the reference in every objective add nothing. Each row adds what it
    dominates alone among those that are better in the last objective (While, Bradstreet and Barone
    2012, with slices of one dimension less).
    """
    above = values - reference
    return _volume(above[(above > 0).all(axis=1)])


def _volume(boxes: Values) -> float:
    """Of the union of boxes from 0 to each row."""
    n, k = boxes.shape
    if n == 0:
        return 0.0
    if k == 1:
        return float(boxes.max())
    boxes = boxes[np.argsort(boxes[:, -1], kind="stable")]
    if k == 2:
        widest = np.maximum.accumulate(boxes[::-1, 0])[::-1]  # of this height or higher
        return float((widest * np.diff(boxes[:, 1], prepend=0.0)).sum())
    total = 0.0
    for i, box in enumerate(boxes):
        floor, higher = box[:-1], boxes[i + 1 :, :-1]
        shared = np.minimum(floor, higher)
        if k > 3:  # in two dimensions the sweep is as fast as the filter
            shared = shared[front(shared)]
        total += float(box[-1]) * (float(floor.prod()) - _volume(shared))
    return total


def knees(values: Values, count: int) -> Positions:
    """Up to `count` positions of the front that stand for all of it, the first one its knee.

    Each objective is scaled to its range on the front. Then, one after the other, whoever adds
    most hypervolume over the front's worst corner is taken (Guerreiro, Fonseca and Paquete 2016);
    of those that add alike, whoever lies furthest beyond the plane through the best of each
    objective. Of equal rows only the first is taken.
    """
    members = front(values)
    _, first = np.unique(values[members], axis=0, return_index=True)
    members = members[np.sort(first)]
    rows = values[members]
    span = np.ptp(rows, axis=0)
    scaled = np.where(span > 0, (rows - rows.min(axis=0)) / np.where(span > 0, span, 1.0), 1.0)
    chosen: list[int] = []
    while len(chosen) < min(count, len(members)):
        left = [i for i in range(len(members)) if i not in chosen]
        gains = [(_volume(scaled[[*chosen, i]]), float(scaled[i].sum())) for i in left]
        chosen.append(left[max(range(len(left)), key=lambda at: gains[at])])
    return members[chosen]
