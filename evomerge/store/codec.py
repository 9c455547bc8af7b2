"""Arrays as bytes and back: little endian, versioned, hashed; nothing is ever unpickled."""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from evomerge.errors import StoreError
from evomerge.fitness.results import Scores

# The number of examples <u4, then positions <u4, scores <f4, shaping <f4, flags u1, tokens <u4, one
# after another, then failures as a JSON object of reasons by position. Codecs 1 and 2 had neither
# the number nor the failures, codec 1 no tokens.
SCORES_CODEC = 3
_BYTES_PER_EXAMPLE = {1: 13, 2: 17, 3: 17}
_TRUNCATED, _OVERLONG = 1, 2  # flags


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
    flags = _TRUNCATED * scores.truncated.astype("u1") | _OVERLONG * scores.overlong.astype("u1")
    return b"".join(
        [
            len(scores).to_bytes(4, "little"),
            scores.examples.astype("<u4").tobytes(),
            scores.scores.astype("<f4").tobytes(),
            scores.shaping.astype("<f4").tobytes(),
            flags.astype("u1").tobytes(),
            scores.tokens.astype("<u4").tobytes(),
            json.dumps(dict(scores.failures)).encode() if scores.failures else b"",
        ]
    )


def unpack_scores(codec: int, data: bytes, sha: str, what: str) -> Scores:
    """Those of codec 1 have no tokens: zeros. Raises StoreError, naming `what` they are, for an
    unknown codec or bytes that are not those that were written."""
    if codec not in _BYTES_PER_EXAMPLE:
        raise StoreError(f"{what} are packed by codec {codec}: use a newer evomerge to read them")
    _verify(what, data, sha)
    if codec < 3:
        n, start = len(data) // _BYTES_PER_EXAMPLE[codec], 0
    else:
        n, start = int.from_bytes(data[:4], "little"), 4
    flags = np.frombuffer(data, "u1", n, start + 12 * n)
    tokens = np.zeros(n, "<u4") if codec == 1 else np.frombuffer(data, "<u4", n, start + 13 * n)
    failures = json.loads(data[start + _BYTES_PER_EXAMPLE[codec] * n :] or b"{}")
    return Scores(
        np.frombuffer(data, "<u4", n, start).astype(np.uint32),
        np.frombuffer(data, "<f4", n, start + 4 * n).astype(np.float32),
        np.frombuffer(data, "<f4", n, start + 8 * n).astype(np.float32),
        flags & _TRUNCATED != 0,
        tokens.astype(np.uint32),
        flags & _OVERLONG != 0,
        {int(position): reason for position, reason in failures.items()},
    )


def _verify(what: str, data: bytes, sha: str) -> None:
    if sha256(data) != sha:
        raise StoreError(f"the store is damaged: {what} do not match their hash: restore a copy")
