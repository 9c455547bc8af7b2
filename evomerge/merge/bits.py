"""Masks as integers, -1 and 0, on the bit patterns of floating values.

torch's comparisons, selections and products with booleans take ten times as long as its integer
operations, which are as fast as memory. Every function works on any floating dtype and device.
"""

import torch
from torch import Tensor

KINDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = {torch.int16: 16, torch.int32: 32, torch.int64: 64}


def bits(values: Tensor) -> Tensor:
    """The bit patterns of floating values, as integers of the same width; no copy."""
    return values.view(KINDS[values.element_size()])


def codes(values: Tensor) -> Tensor:
    """The bit patterns of magnitudes: never negative, and sorted like the magnitudes."""
    patterns = bits(values)
    return patterns & torch.iinfo(patterns.dtype).max


def below(numbers: Tensor | int, bound: Tensor | int) -> Tensor:
    """-1 where number < bound, else 0. One of them is a tensor; their difference must not overflow,
    which it cannot where neither is negative."""
    difference = torch.as_tensor(numbers - bound)
    return difference.bitwise_right_shift_(_BITS[difference.dtype] - 1)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values where the mask is -1, zeros elsewhere."""
    patterns = bits(values)
    return (patterns & mask.to(patterns.dtype)).view(values.dtype)


def pattern(value: float, dtype: torch.dtype) -> int:
    """The bit pattern of a number."""
    return int(bits(torch.tensor(value, dtype=dtype)))


def filled(number: int, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of this pattern, in a dtype as wide as the mask's, where the mask is -1, zeros
    elsewhere."""
    return (mask & number).view(dtype)


def signs(values: Tensor) -> Tensor:
    """-1 where a value is negative, else 0; zeros are not negative."""
    patterns = bits(values + 0.0)  # -0.0 + 0.0 is 0.0
    return patterns.bitwise_right_shift_(_BITS[patterns.dtype] - 1)


def of_sign(values: Tensor, sign: Tensor) -> Tensor:
    """-1 where a value is not zero and has the sign (see `signs`), else 0."""
    last = _BITS[sign.dtype] - 1
    turned = (sign << last).bitwise_xor_(bits(values))
    positive = (-turned).bitwise_right_shift_(last)
    return positive.bitwise_and_(turned.bitwise_right_shift_(last).bitwise_not_())
