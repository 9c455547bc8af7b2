"""Every way in which a store can be damaged is named, and hides no other."""

import contextlib
import shutil
import sqlite3
from pathlib import Path

import pytest
from sqlalchemy import text

from evomerge.errors import StoreError
from evomerge.store import Findings, Store, check, copy, ledger
from evomerge.store.backend import WRITES
from evomerge.store.database import connect
from tests.golden import quiet, upgraded
from tests.running import query, url


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three searches, with an export, looks, copied results and readings of test; the
    first search has overlapping generations and two devices.

    Shared by all: copy it before anything is written to it.
    """
    found = upgraded(tmp_path_factory.mktemp("whole")).store
    damage(
        found,
        "DELETE FROM device",
        "UPDATE evaluation SET device = NULL, gpus = 1, waited = 0",
        "UPDATE generation SET ask = NULL, tell = NULL",  # the others are of an older version
        "UPDATE generation SET ask = number, tell = 5 - number WHERE id IN (2, 3)",
        "UPDATE evaluation SET device = 'a/gpu ' || (id % 2), gpus = 0.5, waited = 0.1 "
        "WHERE candidate_id <= 15",
        "INSERT INTO device VALUES (1, 1, 1, 'a/gpu 0', 0.5, 9.5, 1, 2, 3, 0.5, 10, '2027')",
        "INSERT INTO device VALUES (2, 1, 1, 'a/gpu 1', 0.5, 9.5, 1, 2, 3, 0, 10, '2027')",
        "INSERT INTO wish VALUES (1, 2, 'pause', 'ada', '2027')",
        "INSERT INTO sample VALUES (10, 'ja_list_ops', 19, 'さん')",
        "INSERT INTO submission VALUES (1, 'search', 'finished', '{}', '[]', 0, 'finished', NULL, "
        "NULL, NULL, 'ada', 'k', NULL, 0, '2027', '2027', '2027')",
        f"INSERT INTO token VALUES (1, 'ada', '{'a' * 64}', 'read run', '2027', NULL, NULL, NULL)",
        "INSERT INTO audit VALUES (1, '2027', 'ada', '127.0.0.1', 'submit', 'finished', '{}')",
    )
    return found


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    """A store to be damaged."""
    return Path(shutil.copyfile(whole, tmp_path / "store.db"))


def damage(store: Path, *statements: str) -> None:
    """Behind the store's back, and that of its foreign keys."""
    with contextlib.closing(sqlite3.connect(store)) as db, db:
        for statement in statements:
            db.execute(statement)


def checked(store: Path) -> Findings:
    """What is found."""
    return check(url(store), quiet)


def test_whole_store_is_whole(whole: Path) -> None:
    found = checked(whole)
    assert found.violations == ()
    assert found.notes == ()
    assert found.checked == {
        "search": 3, "generation": 9, "candidate": 39, "evaluation": 45, "score": 40, "ledger": 4,
        "reading": 2, "device": 2, "export": 1, "sample": 1, "wish": 1, "submission": 1, "token": 1,
        "audit": 1,
    }  # fmt: skip


def flipped(table: str, column: str, condition: str) -> str:
    """SQL that changes one byte in the middle of a blob."""
    at = f"length({column}) / 2"
    byte = f"CASE WHEN substr({column}, {at} + 1, 1) = x'55' THEN x'AA' ELSE x'55' END"
    value = f"CAST(substr({column}, 1, {at}) || {byte} || substr({column}, {at} + 2) AS BLOB)"
    return f"UPDATE {table} SET {column} = {value} WHERE {condition}"


OF_WINNER = "candidate_id = 10 AND purpose = 'train'"
SCORE = f"evaluation_id = (SELECT id FROM evaluation WHERE {OF_WINNER})"
RESTORE = "restore a backup of the store"
FINISHED = "search 'finished': "
OWN = f"{FINISHED}generation 1, candidate 10"

# SQL, and a violation that it leads to.
DAMAGES: dict[str, tuple[str, str]] = {
    "kind of a wish": (
        "UPDATE wish SET kind = 'fly' WHERE id = 1",
        "search 'stopped': wish 1: is of kind 'fly'",
    ),
    "reply to an item that is not there": (
        "UPDATE sample SET position = 20",
        f"reply to item 21: task 'ja_list_ops' has no such item of train: {RESTORE}",
    ),
    "reply to an item of validation": (
        "UPDATE sample SET evaluation_id = "
        "(SELECT min(id) FROM evaluation WHERE purpose = 'validation')",
        "reply to item 20: is of validation: remove it",
    ),
    "state of a submission": (
        "UPDATE submission SET state = 'lost'",
        f"{FINISHED}submission 1: is a 'lost' 'search'",
    ),
    "submission that has ended and has not": (
        "UPDATE submission SET ended_at = NULL",
        f"{FINISHED}submission 1: is finished, ended None",
    ),
    "job of a submission": (
        "UPDATE submission SET document = '{'",
        f"{FINISHED}submission 1: cannot be read",
    ),
    "hash of a token": ("UPDATE token SET sha256 = 'evm_x'", "token 'ada': its hash is none"),
    "scope of a token": (
        "UPDATE token SET scopes = 'read root'",
        "token 'ada': has scopes ['root']",
    ),
    "audit log": ("UPDATE audit SET detail = 'x'", "row 1 of the audit log: cannot be read"),
    "lost score": (f"DELETE FROM score WHERE {SCORE}", f"{OWN}, train: has scores of no task"),
    "score of another task": (
        f"UPDATE score SET task = 'other' WHERE {SCORE}",
        f"{OWN}, train: has scores of ['other'], the search has ['ja_list_ops']",
    ),
    "score of a failure": (
        "UPDATE evaluation SET state = 'failed' WHERE " + OF_WINNER,
        f"{OWN}, train: has failed, and has scores of ['ja_list_ops']",
    ),
    "failure without a reason": (
        "UPDATE evaluation SET reason = NULL WHERE state = 'failed' AND candidate_id = 8",
        "generation 1, candidate 8, train: is 'failed' for the reason 'None'",
    ),
    "unknown purpose": (
        "UPDATE evaluation SET purpose = 'other' WHERE " + OF_WINNER,
        f"{OWN}, other: is 'scored' for 'other'",
    ),
    "epoch to come": (
        "UPDATE evaluation SET epoch = 3 WHERE " + OF_WINNER,
        f"{OWN}, train: is of epoch 3, the search of 2",
    ),
    "negative time": (
        "UPDATE evaluation SET waited = -0.5 WHERE " + OF_WINNER,
        f"{OWN}, train: its waited is -0.5",
    ),
    "time without end": (
        "UPDATE device SET held = 9e999 WHERE id = 2",
        f"{FINISHED}device 'a/gpu 1' in epoch 1: its held is inf",
    ),
    "epoch of a device": (
        "UPDATE device SET epoch = 3 WHERE id = 2",
        f"{FINISHED}device 'a/gpu 1' in epoch 3: the search is of epoch 2",
    ),
    "lost device": (
        "DELETE FROM device WHERE id = 1",
        f"{OWN}, train: ran on 'a/gpu 0', which is no device of epoch 1",
    ),
    "epoch that falls": (
        "UPDATE evaluation SET epoch = 2 WHERE " + OF_WINNER,
        f"{OWN}, monitor: is of epoch 1, after one of epoch 2",
    ),
    "stage that is missing": (
        "UPDATE evaluation SET stage = 3 WHERE " + OF_WINNER,
        f"{OWN}: has stages [3] of train",
    ),
    "text for a number": (
        "UPDATE evaluation SET epoch = 'one' WHERE " + OF_WINNER,
        f"{OWN}, train: cannot be read",
    ),
    "search's state": (
        "UPDATE search SET state = 'done' WHERE id = 1",
        f"{FINISHED}its row: the state is 'done'",
    ),
    "search's epoch": (
        "UPDATE search SET epoch = 0 WHERE id = 2",
        "search 'stopped': its row: the epoch is 0",
    ),
    "job": (
        "UPDATE search SET job = substr(job, 2) WHERE id = 1",
        f"{FINISHED}column 'job': cannot be read",
    ),
    "contamination report": (
        "UPDATE search SET contamination = '{' WHERE id = 1",
        f"{FINISHED}column 'contamination': cannot be read",
    ),
    "text that is none": (
        "UPDATE search SET job = CAST(x'FF' || job AS TEXT) WHERE id = 1",
        f"{FINISHED}column 'job': cannot be read",
    ),
    "removed generation": (
        "UPDATE generation SET number = 9 WHERE search_id = 1 AND number = 2",
        f"{FINISHED}generation 9: follows upon generation 2",
    ),
    "kind of a generation": (
        "UPDATE generation SET kind = 'baselines' WHERE search_id = 1 AND number = 2",
        f"{FINISHED}generation 2: is of kind 'baselines'",
    ),
    "review": (
        "UPDATE generation SET review = 'x' WHERE search_id = 1 AND number = 2",
        f"{FINISHED}generation 2: cannot be read",
    ),
    "generation that was not told": (
        "UPDATE generation SET told_at = NULL WHERE search_id = 1 AND number = 1",
        f"{FINISHED}generation 1: was never told, and the search went on",
    ),
    "generation that was not told before the next": (
        "UPDATE generation SET told_at = NULL WHERE search_id = 2 AND number = 1",
        "search 'stopped': generation 1: was never told, and the search went on",
    ),
    "baselines that were not told": (
        "UPDATE generation SET told_at = NULL WHERE search_id = 1 AND number = 0",
        f"{FINISHED}generation 0: was never told, and the search went on",
    ),
    "place of an ask": (
        "UPDATE generation SET ask = 0 WHERE search_id = 1 AND number = 2",
        f"{FINISHED}generation 2: was asked for as 0 of the log, the one before as 1",
    ),
    "place of a tell": (
        "UPDATE generation SET tell = 1 WHERE search_id = 1 AND number = 2",
        f"{FINISHED}generation 2: was asked for as 2 of the log, and told as 1",
    ),
    "place of a tell that is lost": (
        "UPDATE generation SET tell = NULL WHERE search_id = 1 AND number = 2",
        f"{FINISHED}generation 2: was told at 20",
    ),
    "place twice": (
        "UPDATE generation SET tell = 4 WHERE search_id = 1 AND number = 2",
        f"{FINISHED}its log of asks and tells: has 2 entries 4",
    ),
    "place that is missing": (
        "UPDATE generation SET tell = 9 WHERE search_id = 1 AND number = 1",
        f"{FINISHED}its log of asks and tells: has 0 entries 4",
    ),
    "place of no proposal": (
        "UPDATE generation SET ask = 5 WHERE search_id = 1 AND number = 0",
        f"{FINISHED}generation 0: is of kind 'baselines', and in the log",
    ),
    "told without a result": (
        "DELETE FROM evaluation WHERE " + OF_WINNER,
        f"{OWN}: was told of without a result on train",
    ),
    "told value": (
        "UPDATE candidate SET told = NULL WHERE id = 10",
        f"{OWN}: its generation was told; what of it, is not there",
    ),
    "slot": (
        "UPDATE candidate SET slot = 7 WHERE id = 10",
        f"{FINISHED}generation 1: has slots [0, 1, 2, 7]",
    ),
    "removed candidate": (
        "DELETE FROM candidate WHERE id = 9",
        f"{FINISHED}generation 1: has slots [0, 1, 3]",
    ),
    "generation of a candidate": (
        "UPDATE candidate SET generation = 8 WHERE id = 10",
        "generation 8, candidate 10: is of another generation than it says",
    ),
    "state of a candidate": (
        "UPDATE candidate SET state = 'open' WHERE id = 10",
        f"{OWN}: is 'open'; by its evaluations it is 'scored'",
    ),
    "recipe's hash is lost": (
        "UPDATE candidate SET recipe = NULL WHERE id = 10",
        f"{OWN}: has a recipe or the hash of one, not both",
    ),
    "byte of a genotype": (
        flipped("candidate", "genotype", "id = 10"),
        f"{OWN}, its genotype: cannot be read: its bytes do not match",
    ),
    "recipe": (
        "UPDATE candidate SET recipe = replace(recipe, ': 0.', ': 1.') WHERE id = 10",
        f"{OWN}: its recipe does not match its hash",
    ),
    "recipe that is none": (
        "UPDATE candidate SET recipe = substr(recipe, 2) WHERE id = 10",
        f"{OWN}, its recipe: cannot be read",
    ),
    "model": (
        f"UPDATE model SET sha256 = '{'0' * 64}' WHERE search_id = 1 AND name = 'ja'",
        f"{OWN}: its recipe does not match its hash",
    ),
    "files of a model": (
        "UPDATE model SET files = replace(files, 'config', 'other') WHERE search_id = 1",
        f"{FINISHED}model 'ja': its files do not match its hash",
    ),
    "byte of scores": (
        flipped("score", "blob", SCORE),
        f"{OWN}, train, scores of task 'ja_list_ops': cannot be read: its bytes do not match",
    ),
    "codec of scores": (
        f"UPDATE score SET codec = 9 WHERE {SCORE}",
        "scores of task 'ja_list_ops': cannot be read: its bytes are packed by codec 9",
    ),
    "number of scores": (
        f"UPDATE score SET n = 17 WHERE {SCORE}",
        "scores of task 'ja_list_ops': are of 16 examples, not of 17",
    ),
    "mean": (
        f"UPDATE score SET mean = mean + 0.001 WHERE {SCORE}",
        "scores of task 'ja_list_ops': the mean is ",
    ),
    "tokens": (
        f"UPDATE score SET tokens = tokens + 1 WHERE {SCORE}",
        "scores of task 'ja_list_ops': the tokens is ",
    ),
    "copy of another recipe": (
        "UPDATE evaluation SET copied_from = 3 WHERE candidate_id = 16",
        "search 'stopped': generation 0, candidate 16, full: is a copy of candidate 3, which does",
    ),
    "copy of nothing": (
        "UPDATE evaluation SET state = 'failed', reason = 'x' WHERE candidate_id = 1",
        "candidate 16, full: is a copy of candidate 1, which was not scored before",
    ),
    "fewer items": (
        "DELETE FROM split_item WHERE split_id = 1 AND position = 3",
        f"{FINISHED}train of task 'ja_list_ops': has 20 items, and hashes of 19",
    ),
    "shared item": (
        "UPDATE split_item SET hash = (SELECT hash FROM split_item WHERE split_id = 1 AND "
        "position = 2) WHERE split_id = 3 AND position = 4",
        f"{FINISHED}item 5 of test of task 'ja_list_ops': is item 3 of train of task "
        "'ja_list_ops': launch a new search with splits that differ",
    ),
    "example beyond the split": (
        "UPDATE split SET n = 2 WHERE search_id = 1 AND split = 'train'",
        "scores of task 'ja_list_ops': example 20 of 2 is scored",
    ),
    "verdict": (
        "UPDATE search SET verdict = NULL WHERE id = 1",
        f"{FINISHED}its verdict: is missing, and the search is finished",
    ),
    "winner": (
        """UPDATE search SET verdict = replace(verdict, '"winner": 10', '"winner": 99')""",
        f"{FINISHED}its verdict: the winner 99 is none of its candidates",
    ),
    "winner that was not looked at": (
        """UPDATE search SET verdict = replace(verdict, '"winner": 10', '"winner": 11')""",
        f"{FINISHED}generation 2, candidate 11: is the winner, and was never scored on validation",
    ),
    "byte of the ledger": (
        "UPDATE ledger SET at = replace(at, '2026', '2025') WHERE id = 2",
        f"{FINISHED}ledger row 2: does not match its hash",
    ),
    "removed row of the ledger": (
        "DELETE FROM ledger WHERE id = 2",
        f"{FINISHED}ledger row 3: does not point to row 1: one between them was removed or changed",
    ),
    "removed first row": (
        "DELETE FROM ledger WHERE id = 1",
        f"{FINISHED}ledger row 2: does not point to the beginning",
    ),
    "look that is lost": (
        "DELETE FROM ledger WHERE id = 1",
        "validation: no look was reserved for it: do not trust what the search claims",
    ),
    "too many looks": (
        "UPDATE search SET job = replace(job, 'looks\": 3', 'looks\": 1')",
        f"{FINISHED}the ledger: 3 looks at validation, 1 are allowed: do not trust what was",
    ),
    "kind of a use": (
        "UPDATE ledger SET kind = 'other' WHERE id = 3",
        f"{FINISHED}ledger row 3: is of kind 'other'",
    ),
    "export without its opening": (
        "DELETE FROM ledger WHERE kind = 'unseal'",
        f"{FINISHED}export of candidate 10: test of task 'ja_list_ops' was never opened for it",
    ),
    "reading without its opening": (
        "UPDATE reading SET ledger_id = 1",
        "reading 1 of test of 'ja_list_ops': test was never opened for it",
    ),
    "reading of another model": (
        f"UPDATE reading SET subject = '{'0' * 64}' WHERE id = 1",
        f"{FINISHED}reading 1 of test of 'ja_list_ops': is of a model that it was not opened for",
    ),
    "byte of a reading": (
        flipped("reading", "blob", "id = 1"),
        f"{FINISHED}reading 1 of test of 'ja_list_ops': cannot be read: its bytes do not match",
    ),
    "report": (
        "UPDATE export SET report = substr(report, 2)",
        f"{FINISHED}export of candidate 10: cannot be read",
    ),
    "report of another": (
        "UPDATE export SET candidate_id = 11",
        f"{FINISHED}export of candidate 11: its report is of another candidate",
    ),
    "row that points to nothing": (
        "UPDATE score SET evaluation_id = 999 WHERE id = 1",
        "score 1: points to evaluation 999, which is not there",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_in_one_line_with_its_remedy(store: Path, name: str) -> None:
    statement, expected = DAMAGES[name]
    damage(store, statement)
    violations = checked(store).violations
    lines = [str(violation) for violation in violations]
    assert any(expected in line for line in lines), lines
    for violation, line in zip(violations, lines, strict=True):
        assert "\n" not in line
        assert line.endswith(violation.remedy)


def test_damages_do_not_hide_each_other(store: Path) -> None:
    apart = ("byte of a genotype", "text for a number", "byte of the ledger", "report", "job",
             "byte of a reading", "copy of another recipe", "kind of a generation")  # fmt: skip
    for name in apart:
        damage(store, DAMAGES[name][0])
    lines = "\n".join(str(violation) for violation in checked(store).violations)
    for name in apart:
        assert DAMAGES[name][1] in lines, name


def test_damaged_page_of_the_file_is_named(store: Path) -> None:
    (root,) = query(store, "SELECT rootpage FROM sqlite_master WHERE name = 'event'")[0]
    content = bytearray(store.read_bytes())
    start = (root - 1) * int.from_bytes(content[16:18], "big")
    content[start : start + 8] = bytes(8)
    store.write_bytes(content)
    assert any(violation.where == "the database" for violation in checked(store).violations)


def test_export_that_was_not_finished_is_a_note(store: Path) -> None:
    damage(store, "DELETE FROM export")
    found = checked(store)
    assert found.violations == ()
    (note,) = found.notes
    assert "(evomerge export finished) ends it" in note


def test_look_that_is_dated_after_its_result_is_a_note(store: Path) -> None:
    damage(store, "UPDATE evaluation SET recorded_at = '2025' WHERE purpose = 'validation'")
    found = checked(store)
    assert found.violations == ()
    assert len(found.notes) == 3
    assert "after the result of 2025: a clock went wrong" in found.notes[0]


def test_devices_that_were_not_written_down_before_the_end_are_no_damage(store: Path) -> None:
    damage(
        store,
        "UPDATE evaluation SET device = 'b/gpu 0' WHERE id = 20",
        "UPDATE device SET seen_at = (SELECT recorded_at FROM evaluation WHERE id = 19)",
    )
    assert checked(store).violations == ()
    damage(store, "DELETE FROM device")
    assert checked(store).violations == ()


def test_generations_may_be_open_together_until_the_search_ends(store: Path) -> None:
    overlapping = "told_at = NULL, tell = NULL, ask = number"
    damage(
        store,
        f"UPDATE generation SET {overlapping} WHERE search_id = 2 AND kind = 'proposed'",
        f"UPDATE generation SET {overlapping} WHERE search_id = 1 AND kind = 'proposed'",
    )
    found = [str(violation) for violation in checked(store).violations]
    assert len(found) == 2
    assert all(line.startswith(FINISHED) for line in found)


def test_log_of_an_older_search_goes_on(store: Path) -> None:
    """The second search was stopped in its second generation, before places were written down."""
    told = "told_at = '2027', tell = 4"
    damage(
        store,
        f"UPDATE generation SET {told} WHERE search_id = 2 AND number = 2",
        "UPDATE candidate SET told = 0, state = 'scored' WHERE generation_id = 7",
        "INSERT INTO generation (search_id, number, kind, opened_at, ask) "
        "VALUES (2, 3, 'proposed', '2027', 5)",
    )
    about = [v.where for v in checked(store).violations if v.search == "stopped"]
    assert "its log of asks and tells" not in about
    assert "generation 2" not in about
    damage(store, "UPDATE generation SET ask = 6 WHERE ask = 5 AND search_id = 2")
    about = [v.where for v in checked(store).violations if v.search == "stopped"]
    assert "its log of asks and tells" in about


def test_more_looks_are_counted_as_allowed(store: Path) -> None:
    damage(store, DAMAGES["too many looks"][0])
    with Store(url(store)) as opened, opened.database.write() as db:
        ledger.more_looks(db, opened.search("finished"), "c" * 64, 1, 3)
    assert checked(store).violations == ()


def test_missing_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no such file"):
        check(url(tmp_path / "none.db"), quiet)


def test_progress_ends_with_all_that_there_is(whole: Path) -> None:
    told: list[tuple[int, int]] = []
    check(url(whole), lambda done, of: told.append((done, of)))
    assert told[-1] == (79, 79)


def test_checking_changes_nothing(store: Path) -> None:
    before = store.read_bytes()
    checked(store)
    assert store.read_bytes() == before


@pytest.mark.slow
def test_postgres_is_checked_the_same(whole: Path, postgres_url: str) -> None:
    copy(url(whole), postgres_url, quiet)
    assert check(postgres_url, quiet).violations == ()
    apart = ("byte of the ledger", "mean", "copy of another recipe", "shared item", "report")
    engine = connect(postgres_url).execution_options(**{WRITES: True})
    with engine.begin() as db:
        for name in apart:
            db.execute(text(DAMAGES[name][0]))
    engine.dispose()
    lines = "\n".join(str(violation) for violation in check(postgres_url, quiet).violations)
    for name in apart:
        assert DAMAGES[name][1] in lines, name
