"""Arrays as bytes and back: little endian, versioned, hashed; nothing is ever unpickled."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import StoreError
from evomerge.fitness.results import Scores

# Example positions <u4, scores <f4, shaping <f4, truncated u1, tokens <u4, one after another.
SCORES_CODEC = 2
_BYTES_PER_EXAMPLE = {1: 13, 2: 17}  # codec 1 had no tokens


def sha256(data: bytes) -> str:
    """Hex digits."""
    return hashlib.sha256(data).hexdigest()


def pack_genotype(genotype: NDArray[np.float64]) -> bytes:
    """(d,) as float64."""
    return np.ascontiguousarray(genotype, dtype="<f8").tobytes()


def unpack_genotype(data: bytes, sha: str, what: str) -> NDArray[np.float64]:
    """Raises StoreError, naming `what` it is, when the bytes are not those that were written."""
    _verify(what, data, sha)
    return np.frombuffer(data, dtype="<f8").astype(np.float64)


def pack_scores(scores: Scores) -> bytes:
    """In the layout of SCORES_CODEC."""
    return b"".join(
        [
            scores.examples.astype("<u4").tobytes(),
            scores.scores.astype("<f4").tobytes(),
            scores.shaping.astype("<f4").tobytes(),
            scores.truncated.astype("u1").tobytes(),
            scores.tokens.astype("<u4").tobytes(),
        ]
    )


def unpack_scores(codec: int, data: bytes, sha: str, what: str) -> Scores:
    """Those of codec 1 have no tokens: zeros. Raises StoreError, naming `what` they are, for an
    unknown codec or bytes that are not those that were written."""
    if codec not in _BYTES_PER_EXAMPLE:
        raise StoreError(f"{what} are packed by codec {codec}: use a newer evomerge to read them")
    _verify(what, data, sha)
    n = len(data) // _BYTES_PER_EXAMPLE[codec]
    tokens = np.zeros(n, "<u4") if codec == 1 else np.frombuffer(data, "<u4", n, 13 * n)
    return Scores(
        np.frombuffer(data, "<u4", n, 0).astype(np.uint32),
        np.frombuffer(data, "<f4", n, 4 * n).astype(np.float32),
        np.frombuffer(data, "<f4", n, 8 * n).astype(np.float32),
        np.frombuffer(data, "u1", n, 12 * n).astype(np.bool_),
        tokens.astype(np.uint32),
    )


def _verify(what: str, data: bytes, sha: str) -> None:
    if sha256(data) != sha:
        raise StoreError(f"the store is damaged: {what} do not match their hash: restore a copy")
