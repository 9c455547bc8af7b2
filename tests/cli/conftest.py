"""A server for commands that ask one, and what is submitted to it."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from tests.service.serving import Served, listening, served

_numbers = count(1)


@pytest.fixture(scope="module")
def server(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Of the finished search 'tiny'; what is submitted stays in its queue."""
    with served(tmp_path_factory.mktemp("server"), searched) as found:
        yield found


@pytest.fixture(scope="module")
def address(server: Served) -> Iterator[str]:
    """Of that server."""
    with listening(server.app) as found:
        yield found


@pytest.fixture
def job(searched: Path) -> Path:
    """A job that the server may run."""
    return searched.parent / "job.yaml"


@pytest.fixture
def name() -> str:
    """Of a search that the server has not heard of."""
    return f"search-{next(_numbers)}"
