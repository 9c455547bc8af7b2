"""How a benchmark hands over its table: on the terminal, as JSON and Markdown, in the documents."""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from evomerge.errors import EvomergeError, InputError

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Report:
    """A finished table.

    name: of its files, and of its place in a document: between <!-- name --> and <!-- /name -->.
    notes: what was measured on what, a sentence each. data: every figure, unrounded.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    data: Mapping[str, Any]

    def publish(self, folder: Path, documents: Sequence[str]) -> None:
        """Print the table, write it to `folder`, and into the documents of the repository."""
        table = Table(title=self.title, caption=" ".join(self.notes), min_width=98)
        for index, column in enumerate(self.columns):
            table.add_column(column, no_wrap=index < 2)  # what a row is about
        for row in self.rows:
            table.add_row(*row)
        Console(width=100, highlight=False).print(table)
        text = json.dumps({**self.data, "machine": machine()}, indent=2)
        (folder / f"{self.name}.json").write_text(f"{text}\n", encoding="utf-8")
        (folder / f"{self.name}.md").write_text(self._markdown(), encoding="utf-8")
        for document in documents:
            before, after = _around(document, self.name)
            (ROOT / document).write_text(f"{before}\n{self._markdown()}{after}", encoding="utf-8")

    def _markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{' '.join(self.notes)}\n"


def arguments(prog: str, about: str | None) -> argparse.ArgumentParser:
    """A parser of what every benchmark of one table is told. about: its first line is shown."""
    parser = argparse.ArgumentParser(prog=prog, description=(about or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--update-docs", action="store_true", help="write the table into them")
    return parser


def published(
    options: argparse.Namespace, name: str, documents: Sequence[str], measure: Callable[[], Report]
) -> int:
    """Publish what is measured; gives the exit code. documents: where the table has its place."""
    documents = documents if options.update_docs else ()
    try:
        check_place(name, documents)
        options.folder.mkdir(parents=True, exist_ok=True)
        measure().publish(options.folder, documents)
    except EvomergeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def check_place(name: str, documents: Sequence[str]) -> None:
    """Raise InputError unless every document has a place for the table, before it is measured."""
    for document in documents:
        _around(document, name)


def _around(document: str, name: str) -> tuple[str, str]:
    """What comes before a table in a document, and what after, the markers included."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = (ROOT / document).read_text(encoding="utf-8")
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise InputError(f"'{document}' has no place for the table: put {start} and {end} there")
    return before + start, end + after


def machine() -> dict[str, Any]:
    """What figures depend on, beside what is measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
