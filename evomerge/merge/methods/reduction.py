"""Sums over parents, with the bits of a sum over a stack of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

_SEQUENTIAL = 4  # torch sums up to this many float32 tensors one after the other


def summed(parts: Sequence[Tensor]) -> Tensor:
    """The sum, rounded to the dtype once; added up in float32 at least. Of one part, that part."""
    dtype = parts[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide and len(parts) > _SEQUENTIAL:
        return torch.stack(list(parts)).sum(dim=0)
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(wide) + parts[1].to(wide)
    for part in parts[2:]:
        total += part
    return total.to(dtype)
