"""Arrays as bytes and back, little endian and versioned; documents as JSON. What has a hash is
compared with it when it is read; nothing is ever unpickled."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.coordinates import Coordinate, When
from evomerge.errors import StoreError
from evomerge.fitness.results import Scores
from evomerge.recipe import sha_of

# The number of examples <u4, then positions <u4, scores <f4, shaping <f4, flags u1, tokens <u4, one
# after another, then failures as a JSON object of reasons by position. Codecs 1 and 2 had neither
# the number nor the failures, codec 1 no tokens.
SCORES_CODEC = 3
COUNTED_SINCE = 3  # the codec from which on rows count tokens and what went wrong beside it
_BYTES_PER_EXAMPLE = {1: 13, 2: 17, 3: 17}
_TRUNCATED, _OVERLONG = 1, 2  # flags
_WORD, _FLOAT = np.dtype("<u4"), np.dtype("<f4")


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


def unpack_recipe(text: str, content: Mapping[str, str], sha: str, what: str) -> dict[str, Any]:
    """Of JSON. content: the models' hashes by where they are. Raises StoreError, naming `what` it
    is, when it is not the one that was written."""
    try:
        found: dict[str, Any] = json.loads(text)
        whole = sha_of(found, content) == sha
    except (ValueError, TypeError, LookupError, AttributeError):  # whatever became of it
        whole = False
    if not whole:
        raise StoreError(f"the store is damaged: {what} does not match its hash: restore a copy")
    return found


def pack_coordinates(coordinates: Sequence[Coordinate]) -> str | None:
    """As JSON; None where nothing is known of them."""
    if not coordinates:
        return None
    return json.dumps(
        [
            {
                "name": c.name,
                "start": c.start,
                "choices": c.choices,
                "ordered": c.ordered,
                "when": c.when and [c.when.coordinate, sorted(c.when.choices)],
            }
            for c in coordinates
        ]
    )


def unpack_coordinates(text: str | None) -> tuple[Coordinate, ...]:
    """Of `pack_coordinates`; empty where nothing is known of them."""
    found = []
    for entry in json.loads(text or "[]"):
        when = entry.pop("when")
        found.append(Coordinate(**entry, when=when and When(when[0], frozenset(when[1]))))
    return tuple(found)


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
    """Read only. Those of codec 1 have no tokens: zeros. Raises StoreError, naming `what` they
    are, for an unknown codec or bytes that are not those that were written."""
    if codec not in _BYTES_PER_EXAMPLE:
        raise StoreError(f"{what} are packed by codec {codec}: use a newer evomerge to read them")
    _verify(what, data, sha)
    if codec < 3:
        n, start = len(data) // _BYTES_PER_EXAMPLE[codec], 0
    else:
        n, start = int.from_bytes(data[:4], "little"), 4
    # Views of the bytes where they lie as they are wanted: a search has millions of examples.
    words = np.frombuffer(data, _WORD, 3 * n, start)
    flags = np.frombuffer(data, np.uint8, n, start + 12 * n)
    tokens = np.zeros(n, _WORD) if codec == 1 else np.frombuffer(data, _WORD, n, start + 13 * n)
    end = start + _BYTES_PER_EXAMPLE[codec] * n
    failures = json.loads(data[end:]) if len(data) > end else {}
    return Scores(
        words[:n].astype(np.uint32, copy=False),
        words[n : 2 * n].view(_FLOAT).astype(np.float32, copy=False),
        words[2 * n :].view(_FLOAT).astype(np.float32, copy=False),
        flags & _TRUNCATED != 0,
        tokens.astype(np.uint32),
        flags & _OVERLONG != 0,
        {int(position): reason for position, reason in failures.items()},
    )


def _verify(what: str, data: bytes, sha: str) -> None:
    if sha256(data) != sha:
        raise StoreError(f"the store is damaged: {what} do not match their hash: restore a copy")
