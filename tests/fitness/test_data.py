"""Records: the same from every format, with the line or row of whatever is wrong."""

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from evomerge.errors import TaskError
from evomerge.fitness.data import read
from evomerge.fitness.task_file import Source
from tests import tiny

SHARED = tiny.ROOT.parent / "shared" / "data"
real_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"needs the data in {SHARED}")

PAIRS = [{"q": 'a "b", c', "a": "1"}, {"q": "日本\u2028é", "a": ""}, {"q": "x\\ty ", "a": "'"}]


def fields(path: Path, **keys: Any) -> list[dict[str, Any]]:
    """The records of a file without their places."""
    return [dict(r.fields) for r in read(Source(file=path.name, **keys), path.parent, "x")]


def refusal(path: Path, **keys: Any) -> str:
    """The one-line message with which a file is refused."""
    with pytest.raises(TaskError) as caught:
        fields(path, **keys)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder: Path, records: list[dict[str, str]], ending: str) -> Path:
    """The records in the format of this ending."""
    path = folder / f"data{ending}"
    if ending.startswith(".json"):
        text = "".join(json.dumps(record) + "\n" for record in records)
    elif ending.startswith(".tsv"):
        rows = [list(records[0]), *(list(record.values()) for record in records)]
        text = "".join("\t".join(row) + "\n" for row in rows)
    if ending == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    elif ending.startswith(".csv"):
        plain = folder / "plain"
        with plain.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        data = plain.read_bytes()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    else:
        data = text.encode()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    return path


ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")


@pytest.mark.parametrize("ending", ENDINGS)
def test_records_are_the_same_from_every_format(tmp_path: Path, ending: str) -> None:
    assert fields(write(tmp_path, PAIRS, ending)) == PAIRS


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    texts=st.lists(
        st.tuples(st.text('a",\n\r\t;é日\u2028\x85 ', max_size=6), st.text(max_size=4)), min_size=1
    )
)
def test_any_texts_come_back_from_csv_and_parquet(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("data")
    records = [{"q": q, "a": a} for q, a in texts]
    assert fields(write(folder, records, ".csv")) == records
    assert fields(write(folder, records, ".parquet")) == records
    shutil.rmtree(folder)


def test_a_table_of_values_holds_what_json_would(tmp_path: Path) -> None:
    records = [{"n": 1, "x": 0.5, "yes": True, "list": ["a", "b"], "in": {"k": [1]}, "no": None}]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(records), path)
    assert fields(path) == records
    assert json.loads(json.dumps(fields(path))) == records


def test_values_that_json_has_not_are_refused_by_row_and_field(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist([{"image": None}, {"image": b"\x00"}]), path)
    assert refusal(path).startswith(f"{path}, row 2: field 'image' is bytes: only texts")


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_table_without_a_header_is_given_its_columns(tmp_path: Path, ending: str) -> None:
    separator = "," if ending == ".csv" else "\t"
    path = tmp_path / f"a{ending}"
    path.write_text(f"x{separator}1\r\ny{separator}2", encoding="utf-8", newline="")
    assert fields(path, columns=["q", "a"]) == [{"q": "x", "a": "1"}, {"q": "y", "a": "2"}]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path, PAIRS, ending)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert fields(path) == PAIRS


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "q,a\nx,1\ny\n", ", row 2: 1 field, where 2 are due: q, a"),
        ("a.csv", "q,a\nx,1,2\n", ", row 1: 3 fields, where 2 are due: q, a"),
        ("a.csv", 'q,a\n"x\ny",1\nz,2,3\n', ", row 2: 3 fields"),
        ("a.csv", "q,a\nx,1\n\n", ", row 2: 0 fields"),
        ("a.csv", 'q,a\n"x,1\n', ":2: not CSV: "),
        ("a.csv", "q,q\nx,1\n", "': column 'q' stands there twice: rename one"),
        ("a.tsv", "q\ta\nx\n", ", row 1: 1 field, where 2 are due: q, a"),
        ("a.tsv", "q\tq\n", "': column 'q' stands there twice"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}', ":2: not JSON: 'a' stands there twice"),
        ("a.jsonl", '{"a": {"b": 1, "b": 2}}', ":1: not JSON: 'b' stands there twice"),
        ("a.jsonl", "[" * 100_000, ":1: not JSON"),
        ("a.parquet", "no", "' is not Parquet: "),
        ("a.jsonl.gz", "no", "' is not a whole gzip file: "),
    ],
)
def test_a_file_that_is_broken_is_refused_where_it_is(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8", newline="")
    message = refusal(path)
    assert str(path) in message
    assert words in message


def test_a_line_of_a_packed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n[]\n'))
    assert refusal(path).startswith(f"{path}:2: not a JSON object")
    path.write_bytes(path.read_bytes()[:-9])
    assert "is not a whole gzip file" in refusal(path)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv"])
def test_another_encoding_is_refused(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes("é".encode("latin-1"))
    assert refusal(path) == f"'{path}' is not UTF-8: convert it"


def test_a_file_is_looked_up_beside_the_task_file_and_then_in_the_folder_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, elsewhere = tmp_path / "task", tmp_path / "data"
    for folder in (beside, elsewhere):
        (folder / "set").mkdir(parents=True)
    source = Source(file="set/a.jsonl")
    monkeypatch.setenv("EVOMERGE_DATA", str(elsewhere))
    with pytest.raises(TaskError, match=r"x data '.*a\.jsonl' is missing: put it"):
        read(source, beside, "x")
    (elsewhere / "set" / "a.jsonl").write_text('{"from": "the environment"}')
    assert read(source, beside, "x")[0].fields == {"from": "the environment"}
    (beside / "set" / "a.jsonl").write_text('{"from": "beside"}')
    assert read(source, beside, "x")[0].fields == {"from": "beside"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set ORG/NAME in the working directory, where `datasets` looks before the hub."""
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(PAIRS), folder / "train.parquet")
    monkeypatch.chdir(tmp_path)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return folder


def test_a_data_set_of_the_hub_holds_the_records_of_its_file(hub: Path, tmp_path: Path) -> None:
    source = Source(file="pairs.jsonl", hub="org/name", split="train", revision="main")
    found = read(source, tmp_path / "task", "x")
    assert [record.fields for record in found] == PAIRS
    assert found[1].where == "org/name@main: train, row 2"
    write(tmp_path, PAIRS, ".jsonl").rename(tmp_path / "pairs.jsonl")
    shutil.rmtree(hub)
    assert [record.fields for record in read(source, tmp_path, "x")] == PAIRS


def test_a_data_set_that_cannot_be_had_is_refused_with_what_would_do_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = Source(file="a.jsonl", hub="no-such-org/none", split="train", revision="main")
    with pytest.raises(TaskError) as caught:
        read(source, tmp_path, "task 't': train")
    message = str(caught.value)
    assert message.startswith(
        "task 't': train data 'no-such-org/none@main' cannot be had from the hub: "
    )
    assert message.endswith(
        f"its file '{tmp_path / 'a.jsonl'}' is missing: put it there, or under a folder that "
        "EVOMERGE_DATA names"
    )


@real_data
def test_the_files_of_real_benchmarks_are_read_right() -> None:
    assert len(fields(SHARED / "gsm8k" / "train.jsonl")) == 7473
    mgsm = fields(SHARED / "mgsm" / "mgsm_ja.tsv", columns=["question", "answer"])
    assert (len(mgsm), mgsm[0]["answer"]) == (250, "18")
    assert all(record["question"] and record["answer"] for record in mgsm)
    humaneval = fields(SHARED / "humaneval" / "HumanEval.jsonl.gz")
    assert (len(humaneval), humaneval[163]["task_id"]) == (164, "HumanEval/163")
