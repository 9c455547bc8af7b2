"""Seeds: derived from all three arguments, the same in every process and version."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.seeds import derive, generator


@pytest.mark.parametrize(
    ("arguments", "seed"),
    [
        ((0, "optimizer"), 1254734564935198980),
        ((7, "monitor", 3), 2729038996145088392),
        ((2**80, "日本"), 8827914134674972830),
    ],
)
def test_a_stored_search_finds_its_seeds_again(arguments: tuple[int, str], seed: int) -> None:
    assert derive(*arguments) == seed


def test_a_stored_search_finds_its_numbers_again() -> None:
    numbers = generator(7, "monitor", 3).random(3)
    assert numbers.tolist() == [0.6147134499235066, 0.9727278590963834, 0.20629337505699397]


@settings(max_examples=50, deadline=None)
@given(st.integers(), st.text("a/-0日", max_size=8), st.integers())
def test_a_seed_has_63_bits(seed: int, purpose: str, index: int) -> None:
    assert 0 <= derive(seed, purpose, index) < 2**63


@settings(max_examples=50, deadline=None)
@given(
    st.sets(
        st.tuples(st.integers(0, 99), st.sampled_from(["a", "b", "1", "-1"]), st.integers(0, 99)),
        min_size=2,
        max_size=20,
    )
)
def test_each_argument_changes_the_seed(arguments: set[tuple[int, str, int]]) -> None:
    assert len({derive(*a) for a in arguments}) == len(arguments)


def test_generators_of_one_purpose_do_not_share_a_stream() -> None:
    one, other = generator(1, "noise"), generator(1, "noise")
    one.random(100)
    assert other.random() == generator(1, "noise").random()


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002 the global one is the subject
    first = generator(5, "x").random(4)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(generator(5, "x").random(4), first)
