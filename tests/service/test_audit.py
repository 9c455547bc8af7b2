"""The audit log: its lines, their order, and what does not fit into one."""

from collections.abc import Iterator

import pytest

from evomerge.store import Audit, Store


@pytest.fixture
def audit(fresh_url: str) -> Iterator[Audit]:
    with Store(fresh_url, create=True) as store:
        yield Audit(store)


def test_a_line_says_who_did_what_from_where_and_when(audit: Audit) -> None:
    audit.write("anna", "10.0.0.7", "submit", "spring", {"priority": 3, "tags": ["a"]})
    (line,) = audit.lines()
    assert (line.who, line.address, line.action, line.subject) == (
        "anna",
        "10.0.0.7",
        "submit",
        "spring",
    )
    assert line.detail == {"priority": 3, "tags": ["a"]}
    assert line.at.endswith("+00:00")


def test_lines_come_newest_first_page_by_page_without_gap_or_repetition(audit: Audit) -> None:
    for number in range(7):
        audit.write("anna", "::1", "submit", f"search{number}", {})
    first = audit.lines(limit=3)
    audit.write("anna", "::1", "submit", "late", {})
    second = audit.lines(before=first[-1].id, limit=3)
    rest = audit.lines(before=second[-1].id, limit=3)
    subjects = [line.subject for line in (*first, *second, *rest)]
    assert subjects == [f"search{number}" for number in reversed(range(7))]
    assert audit.lines(before=rest[-1].id) == []


def test_what_is_too_long_or_no_text_is_cut_and_the_line_is_written_all_the_same(
    audit: Audit,
) -> None:
    hostile = "\0\ud800é\n" * 5000
    audit.write(hostile, hostile, hostile, hostile, {"said": hostile})
    (line,) = audit.lines()
    assert (len(line.who), len(line.address), len(line.action)) == (64, 64, 64)
    assert len(line.subject) == 128
    assert line.subject.endswith("…")
    assert list(line.detail) == ["cut"]
    assert len(line.detail["cut"]) <= 4000
