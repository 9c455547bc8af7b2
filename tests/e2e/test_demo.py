"""The demo, as the README tells it."""

import json
import re
from pathlib import Path

import pytest

from tests.running import evomerge_, url
from tests.tiny import ROOT


def said(text: str, what: str) -> float:
    """The first percentage after some words of the README's demo."""
    match = re.search(re.escape(what) + r"\D*?(\d+\.\d)%", text)
    assert match, f"the README does not give '{what}'"
    return float(match[1]) / 100


@pytest.mark.slow
def test_the_demo_gives_what_the_readme_says(tmp_path: Path) -> None:
    demo = re.search(r"<!-- demo -->(.*)<!-- /demo -->", (ROOT / "README.md").read_text(), re.S)
    assert demo
    store = url(tmp_path / "demo.db")
    end = evomerge_("run", ROOT / "examples" / "ja_list_ops.yaml", "--store", store, "--json")
    assert end.code == 0, end.err
    shown = json.loads(end.out)
    end = evomerge_("export", "ja-list-ops", "-o", tmp_path / "out", "--store", store)
    assert end.code == 0, end.err
    report = json.loads((tmp_path / "out" / "evomerge_report.json").read_text())
    text = evomerge_("show", "ja-list-ops", "--store", store).out + end.out
    printed = [line.split() for line in text.splitlines()]
    heads = [line.split() for line in demo[1].splitlines() if "95% interval" in line]
    assert len(heads) == 2
    assert all(head in printed for head in heads)
    # Another processor rounds otherwise and may walk elsewhere; the story has to be the same.
    for name, row in shown["parents"].items():
        (found,) = row["train"].values()
        assert found["score"] == pytest.approx(said(demo[1], name), abs=0.02)
    assert report["promoted"]
    assert report["estimates"]["test"]["value"] == pytest.approx(
        said(demo[1], "exported model"), abs=0.08
    )
