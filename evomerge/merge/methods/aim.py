"""Activation-informed merging: what any method merged, drawn back to the base where the base's
inputs are large (AIM, arXiv 2502.02421).

Knows nothing of how activations are measured.
"""

from torch import Tensor

from evomerge.merge.operand import Operand


def relaxed(merged: Operand, base: Operand, activation: Tensor, omega: float) -> Operand:
    """base + (merged - base)(1 - a (1 - omega)), where a is the activation over its largest value
    (arXiv 2502.02421).

    merged, base: a matrix, of one shape. activation: at least 0, broadcasts against it. omega in
    [0, 1]. Computed in float32 at least, as merged + (base - merged) a (1 - omega), so that where a
    is 0, or omega 1, nothing changes; rounded once to the dtype of `merged`.
    """
    row = merged.row
    largest = activation.max()
    share = activation / largest if largest > 0 else activation
    back = (share * (1 - omega)).to(merged.device, merged.wide).expand(merged.shape)

    def read(start: int, stop: int) -> Tensor:
        values = merged.span(start, stop)
        wide = values.to(merged.wide)
        change = base.span(start, stop).to(merged.wide) - wide
        change.view(-1, row).mul_(back[start // row : stop // row])
        return change.add_(wide).to(values.dtype)

    return merged.derived(read, unit=row)
