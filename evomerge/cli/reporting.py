"""The command that writes a search as one page."""

import os
from pathlib import Path
from typing import Annotated

import typer

from evomerge.cli import places
from evomerge.cli.options import Search, StoreOption
from evomerge.errors import InputError, OutputExists
from evomerge.messages import one_line


def report(
    name: Search,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="Where to, such as report.html.")
    ],
    store: StoreOption = None,
) -> None:
    """Write a search as one HTML page that needs no network.

    Of a search that may still be running. Test stays closed: its result is on the page once the
    winner has been exported. The page quotes some questions of train, and replies to them.
    """
    if os.path.lexists(out):
        raise OutputExists(f"output '{out}' is there already: name another, or remove it")
    from evomerge.cli import view
    from evomerge.report import page

    with places.stored(store) as opened:
        text = page.report(opened, name)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"output '{out}' cannot be written: {one_line(error)}") from None
    view.line(str(out))
