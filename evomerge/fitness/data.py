"""Records: read from files and from data sets of the hub, each with the place where it stands.

Knows nothing of tasks: of splits, of what is asked of a record, or of who may see it. Owns pyarrow
and datasets, which are loaded only where a source needs them.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any

from evomerge.errors import TaskError
from evomerge.fitness.task_file import Source, ending
from evomerge.messages import one_line

# Names the folder where files are that are not beside their task file.
FOLDER = "EVOMERGE_DATA"


@dataclass(frozen=True)
class Record:
    """where: the file and line, or row from 1 (a header is none). fields: plain data, as JSON has
    it; of a .csv or .tsv file texts alone."""

    where: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Origin:
    """Where the records of a split come from.

    file: as the task file names it. hub, config, split: a data set of the hub. Of both, either
    holds the same records. rows: the place of each record there, from 0; None where they were
    processed, so that nobody can tell.
    """

    file: str | None
    hub: str | None
    config: str | None
    split: str | None
    rows: tuple[int, ...] | None


def read(source: Source, folder: Path, whose: str) -> list[Record]:
    """The records of a source, in its order.

    folder: that of the task file. whose: what lacks them if they are missing, such as "task
    'gsm8k': train". Raises TaskError, which names the file, its line, and the remedy.
    """
    if source.file is not None:
        path = find(source.file, folder)
        if path is not None:
            return _of_file(path, source)
        if source.hub is None:
            raise TaskError(f"{whose} data {_missing(source.file, folder)}")
    return _of_hub(source, folder, whose)


def find(file: str, folder: Path) -> Path | None:
    """Where a file lies, beside the task file or in the folder of the environment."""
    roots = [folder, *(Path(root).expanduser() for root in [os.environ.get(FOLDER)] if root)]
    return next((root / file for root in roots if (root / file).is_file()), None)


def _missing(file: str, folder: Path) -> str:
    remedy = "" if Path(file).is_absolute() else f", or under a folder that {FOLDER} names"
    return f"'{folder / file}' is missing: put it there{remedy}"


def _of_file(path: Path, source: Source) -> list[Record]:
    kind = ending(path.name)
    if kind == ".parquet":
        return _of_parquet(path)
    text = _text(path)
    if kind == ".csv":
        return _of_table(path, _csv_rows(path, text), source.columns)
    if kind == ".tsv":
        return _of_table(path, _tsv_rows(text), source.columns)
    return _of_lines(path, text)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.lower().endswith(".gz") else data
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise TaskError(f"'{path}' is not a whole gzip file: {one_line(error)}") from None
    except OSError as error:
        raise TaskError(f"'{path}' cannot be read: {one_line(error)}") from None


def _text(path: Path) -> str:
    try:
        return _bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TaskError(f"'{path}' is not UTF-8: convert it") from None


# --- JSON Lines ----------------------------------------------------------------------------------


def _of_lines(path: Path, text: str) -> list[Record]:
    # Not splitlines: a JSON string may hold U+2028 and other breaks that are none in JSONL.
    lines = text.removesuffix("\n").split("\n") if text else []
    wheres = (f"{path}:{number}" for number in range(1, len(lines) + 1))
    return [Record(where, _object(where, line)) for where, line in zip(wheres, lines, strict=True)]


def _object(where: str, line: str) -> dict[str, Any]:
    if not line.strip():
        raise TaskError(f"{where}: the line is empty: remove it")
    try:
        found = _JSON.decode(line)
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: not JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise TaskError(f"{where}: not a JSON object: give fields such as prompt and answer")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"'{_twice([key for key, _ in pairs])}' stands there twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_distinct)


def _twice(names: Sequence[str]) -> str:
    """The first of the names that are there more than once."""
    return next(name for name in names if names.count(name) > 1)


# --- tables of texts -----------------------------------------------------------------------------


def _csv_rows(path: Path, text: str) -> Iterator[Sequence[str]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise TaskError(
            f"{path}:{reader.line_num}: not CSV: {one_line(error)}: mend it, or write .jsonl"
        ) from None


def _tsv_rows(text: str) -> Iterator[Sequence[str]]:
    """Nothing is quoted: a quotation mark is a character like others."""
    lines = text.removesuffix("\n").split("\n") if text else []
    return (line.removesuffix("\r").split("\t") for line in lines)


def _of_table(path: Path, rows: Iterator[Sequence[str]], columns: Sequence[str]) -> list[Record]:
    names = columns or next(rows, ())
    if len(set(names)) < len(names):
        raise TaskError(f"'{path}': column '{_twice(list(names))}' stands there twice: rename one")
    records = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        if len(row) != len(names):
            fields = "field" if len(row) == 1 else "fields"
            raise TaskError(
                f"{where}: {len(row)} {fields}, where {len(names)} are due: {', '.join(names)}"
            )
        records.append(Record(where, dict(zip(names, row, strict=True))))
    return records


# --- tables of values ----------------------------------------------------------------------------

_EXTRA = "pip install 'evomerge[tasks]'"


def _of_parquet(path: Path) -> list[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise TaskError(f"'{path}': Parquet is read by pyarrow: {_EXTRA}") from None
    try:
        rows = parquet.read_table(pyarrow.BufferReader(_bytes(path))).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"'{path}' is not Parquet: {one_line(error)}") from None
    return _of_rows(str(path), rows)


def _of_hub(source: Source, folder: Path, whose: str) -> list[Record]:
    """Through the hub's cache; offline where HF_HUB_OFFLINE or HF_DATASETS_OFFLINE says so. Code
    that a data set brings along is never run."""
    name = f"{source.hub}@{source.revision}"
    instead = f"; its file {_missing(source.file, folder)}" if source.file else ""
    try:
        import datasets
    except ImportError:
        raise TaskError(
            f"{whose} data '{name}' of the hub are read by datasets: {_EXTRA}{instead}"
        ) from None
    try:
        found = datasets.load_dataset(
            source.hub, source.config, split=source.split, revision=source.revision
        )
        # As a table of Arrow, so that nothing is decoded and values are those of a Parquet file.
        rows = found.with_format("arrow")[:].to_pylist()
    except Exception as error:  # of many libraries: network, cache, formats
        raise TaskError(
            f"{whose} data '{name}' cannot be had from the hub: {one_line(error)}{instead}"
        ) from None
    return _of_rows(f"{name}: {source.split}", rows)


def _of_rows(name: str, rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    records = []
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        fields = {key: _plain(value, where, key) for key, value in row.items()}
        records.append(Record(where, fields))
    return records


def _plain(value: Any, where: str, field: str) -> Any:
    """A value of a table as JSON has it."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        return [_plain(inner, where, field) for inner in value]
    if isinstance(value, dict):
        return {str(key): _plain(inner, where, field) for key, inner in value.items()}
    raise TaskError(
        f"{where}: field '{field}' is {type(value).__name__}: only texts, numbers, dates and lists "
        "or mappings of them are read: leave the column out"
    )
