"""`evomerge report` writes one page, and never over anything."""

from pathlib import Path

import pytest

from evomerge.report import page
from evomerge.store import Store
from tests.running import evomerge_, query, url


def test_the_page_is_written_and_test_stays_closed(searched: Path, tmp_path: Path) -> None:
    out = tmp_path / "reports" / "tiny.html"
    end = evomerge_("report", "tiny", "-o", out, "--store", url(searched))
    assert (end.code, end.out) == (0, f"{out}\n"), end.err
    with Store(url(searched)) as store:
        assert out.read_text(encoding="utf-8") == page.report(store, "tiny")
    assert query(searched, "SELECT COUNT(*) FROM ledger WHERE kind = 'unseal'") == [(0,)]


def test_what_is_there_stays(searched: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine")
    end = evomerge_("report", "tiny", "-o", out, "--store", url(searched))
    assert end.code == 2
    assert "is there already" in end.err
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["tny", "<script>"])
def test_an_unknown_search_leaves_no_file(searched: Path, tmp_path: Path, name: str) -> None:
    end = evomerge_("report", name, "-o", tmp_path / "report.html", "--store", url(searched))
    assert end.code == 2
    assert f"no search '{name}'" in end.err
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(searched: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    end = evomerge_("report", "tiny", "-o", tmp_path / "file" / "x.html", "--store", url(searched))
    assert end.code == 2
    assert "cannot be written" in end.err
    assert len(end.err.splitlines()) == 1
