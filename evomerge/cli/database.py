"""The commands that look after a store: each calls one function of it and shows the result."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import typer

from evomerge.cli.options import DEFAULT_STORE, Json, StoreOption
from evomerge.errors import EvomergeError

database = typer.Typer(help="Look after a store.", no_args_is_help=True)


@database.command()
def check(store: StoreOption = None, as_json: Json = False) -> None:
    """Check that nothing in a store is lost, damaged or at odds.

    Nothing is changed. Exit code 1 where something is wrong.
    """
    from evomerge.cli import live, view
    from evomerge.store import check

    with live.examples("checking") as progress:
        found = check(store or DEFAULT_STORE, progress)
    if as_json:
        view.document(asdict(found))
    else:
        for violation in found.violations:
            view.line(str(violation))
        for note in found.notes:
            view.line(f"note: {note}")
    count = len(found.violations)
    if count:
        many = f"{count:,} violations" if count > 1 else "a violation"
        raise EvomergeError(f"store '{found.url}' is not whole: {many}, see above")
    if not as_json:
        view.prose(view.stdout(), f"checked {_counted(found.checked)}")
        view.line(f"{found.url} is whole")


@database.command()
def backup(
    out: Annotated[
        str,
        typer.Option(
            "-o", "--out", metavar="FILE|URL", help="A new SQLite file, or an empty database's URL."
        ),
    ],
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Copy a store, restore it, or move it to another database.

    The copy is of one moment, and searches may go on writing. From a copy to a new file or an
    empty database the same command restores a store, or moves it between SQLite and PostgreSQL.
    """
    from evomerge.cli import live, view
    from evomerge.store import copy

    with live.examples("copying") as progress:
        copied = copy(store or DEFAULT_STORE, out, progress)
    if as_json:
        view.document(asdict(copied))
    else:
        view.prose(view.stdout(), f"copied and compared {_counted(copied.rows)}")
        view.line(copied.url)


@database.command()
def upgrade(store: StoreOption = None, as_json: Json = False) -> None:
    """Bring an older store up to date; a copy of it is kept.

    An empty PostgreSQL database becomes a store.
    """
    from evomerge.cli import live, view
    from evomerge.store import upgrade

    with live.examples("copying") as progress:
        found = upgrade(store or DEFAULT_STORE, progress)
    if as_json:
        view.document(asdict(found))
    elif found.schema is None:
        view.line(f"{found.url} is a new store")
    elif found.copy is None:
        view.line(f"{found.url} is up to date")
    else:
        view.line(f"upgraded from schema {found.schema}; the old store is {found.copy}")


_WORDS = {
    "search": ("search", "searches"),
    "generation": ("generation", "generations"),
    "candidate": ("candidate", "candidates"),
    "evaluation": ("evaluation", "evaluations"),
    "score": ("score", "scores"),
    "ledger": ("ledger row", "ledger rows"),
    "reading": ("reading", "readings"),
    "export": ("export", "exports"),
}


def _counted(rows: Mapping[str, int]) -> str:
    """Such as '1 search, 12 candidates', of the tables that people know."""
    known = [(rows[name], words) for name, words in _WORDS.items() if rows.get(name)]
    return ", ".join(f"{n:,} {words[n > 1]}" for n, words in known) or "no search"
