"""Packing and unpacking: every bit comes back, and what is damaged is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from evomerge.errors import StoreError
from evomerge.fitness.results import Scores
from evomerge.store import codec

PARTS = ("examples", "scores", "shaping", "truncated", "tokens", "overlong")


def genotypes() -> st.SearchStrategy[np.ndarray]:
    """Any float64 at all: what is stored is bits."""
    return arrays.arrays(np.float64, st.integers(1, 40))


@st.composite
def results(draw: Any) -> Scores:
    """Any results of one length."""
    n = draw(st.integers(1, 40))
    dtypes = (np.uint32, np.float32, np.float32, np.bool_, np.uint32, np.bool_)
    parts = [draw(arrays.arrays(dtype, n)) for dtype in dtypes]
    reasons = draw(st.dictionaries(st.sampled_from(parts[0].tolist()), st.text()))
    return Scores(*parts, reasons)


@settings(deadline=None)
@given(genotypes())
def test_genotype_comes_back_bit_for_bit(genotype: np.ndarray) -> None:
    blob = codec.pack_genotype(genotype)
    found = codec.unpack_genotype(blob, codec.sha256(blob), "x")
    assert found.dtype == np.float64
    assert found.tobytes() == genotype.tobytes()


@settings(deadline=None)
@given(genotypes())
def test_genotype_is_packed_alike_whatever_its_layout(genotype: np.ndarray) -> None:
    strided = np.repeat(genotype, 2)[::2]
    swapped = genotype.astype(">f8")
    packed = {codec.pack_genotype(g) for g in (genotype, strided, swapped)}
    assert len(packed) == 1


@pytest.mark.slow
@settings(deadline=None)
@given(results())
def test_scores_come_back_bit_for_bit(scores: Scores) -> None:
    blob = codec.pack_scores(scores)
    found = codec.unpack_scores(codec.SCORES_CODEC, blob, codec.sha256(blob), "x")
    for part in PARTS:
        ours, theirs = getattr(found, part), getattr(scores, part)
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()
    assert found.failures == scores.failures


@pytest.mark.slow
@settings(deadline=None)
@given(results(), st.data())
def test_flipped_bit_is_refused(scores: Scores, data: st.DataObject) -> None:
    blob = codec.pack_scores(scores)
    place = data.draw(st.integers(0, 8 * len(blob) - 1))
    damaged = bytearray(blob)
    damaged[place // 8] ^= 1 << place % 8
    with pytest.raises(StoreError, match="damaged: these do not match their hash"):
        codec.unpack_scores(codec.SCORES_CODEC, bytes(damaged), codec.sha256(blob), "these")


def test_scores_of_the_first_codec_have_no_tokens() -> None:
    blob = bytes.fromhex(
        "0700000009000000"  # examples 7 and 9
        "0000803f0000003f"  # scores 1 and 1/2
        "000080bf00000000"  # shaping -1 and 0
        "0001"  # the second was cut off
    )
    found = codec.unpack_scores(1, blob, codec.sha256(blob), "x")
    assert found.examples.tolist() == [7, 9]
    assert found.scores.tolist() == [1.0, 0.5]
    assert found.shaping.tolist() == [-1.0, 0.0]
    assert found.truncated.tolist() == [False, True]
    assert found.tokens.tolist() == [0, 0]
    assert found.tokens.dtype == np.uint32


def test_scores_of_the_second_codec_have_no_failures() -> None:
    blob = bytes.fromhex(
        "0700000009000000"  # examples 7 and 9
        "0000803f0000003f"  # scores 1 and 1/2
        "000080bf00000000"  # shaping -1 and 0
        "0001"  # the second was cut off
        "0300000004000000"  # tokens
    )
    found = codec.unpack_scores(2, blob, codec.sha256(blob), "x")
    assert found.truncated.tolist() == [False, True]
    assert found.tokens.tolist() == [3, 4]
    assert (found.overlong.tolist(), found.failures) == ([False, False], {})


def test_unknown_codec_is_refused() -> None:
    with pytest.raises(StoreError, match="these are packed by codec 99: use a newer evomerge"):
        codec.unpack_scores(99, b"", codec.sha256(b""), "these")
