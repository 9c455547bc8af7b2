"""Fixtures of the tests of the service."""

from pathlib import Path

import pytest

from evomerge.store import Store
from tests.running import url


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store without anything in it, to be copied."""
    path = tmp_path_factory.mktemp("empty") / "store.db"
    Store(url(path), create=True).database.close()
    return path
