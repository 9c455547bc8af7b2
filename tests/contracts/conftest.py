"""Stores of every backend, and a search in one."""

from collections.abc import Iterator

import pytest

from evomerge.store import Coordinator, NewCandidate, Store
from tests.contracts.stored import RECIPE, launched, proposal


@pytest.fixture
def store(fresh_url: str) -> Iterator[Store]:
    """A new, empty store."""
    with Store(fresh_url, create=True) as opened:
        yield opened


@pytest.fixture
def coordinator(store: Store) -> Iterator[Coordinator]:
    """Of a new search without any generation."""
    with launched(store, "one") as held:
        yield held


@pytest.fixture
def opened(coordinator: Coordinator) -> Coordinator:
    """Of a search with two baselines (candidates 1, 2) and two proposals (3, 4)."""
    baselines = [NewCandidate(i, label, None, RECIPE, "a" * 64) for i, label in enumerate("xy")]
    coordinator.open_generation(0, "baselines", None, baselines)
    coordinator.open_generation(1, "proposed", 0.25, [proposal(0), proposal(1)])
    return coordinator
