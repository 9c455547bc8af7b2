"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_STORE = "sqlite:///evomerge.db"
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", show_default=False)]
Search = Annotated[str, typer.Argument(metavar="SEARCH", help="The search's name.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", envvar="EVOMERGE_STORE", help=f"Default: {DEFAULT_STORE}."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
