"""Fixtures that several folders of tests share."""

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three random models that fit together (base, a, b), and one of another depth (deep)."""
    folder = tmp_path_factory.mktemp("models")
    base = tiny.write_model(folder / "base", seed=0)
    return {
        "base": base,
        "a": tiny.write_model(folder / "a", seed=1, near=base),
        "b": tiny.write_model(folder / "b", seed=2, near=base),
        "deep": tiny.write_model(folder / "deep", seed=3, layers=5),
    }


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A job that searches the zoo in seconds."""
    return tiny.write_job(tmp_path)
