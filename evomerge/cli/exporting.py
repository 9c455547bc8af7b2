"""The command that takes something out of a search: its winner, a recipe, or all that was tried."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.cli import fetching, places
from evomerge.cli.options import Json, Search, ServerOption, StoreOption, server_of
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.store import Store


def export(
    context: typer.Context,
    name: Search,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Folder to write the merged model to; of --recipe-only also a .yaml file.",
        ),
    ] = None,
    candidate: Annotated[
        int | None, typer.Option("--candidate", help="Id of a candidate; default: the winner.")
    ] = None,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="Write the recipe; keep the test split sealed.")
    ] = False,
    to_csv: Annotated[
        Path | None, typer.Option("--csv", help="Write the search as tables to a folder instead.")
    ] = None,
    to_parquet: Annotated[
        Path | None, typer.Option("--parquet", help="The same, as Parquet.")
    ] = None,
    to_optuna: Annotated[
        str | None,
        typer.Option("--optuna", metavar="URL", help="Copy the search to a database of Optuna's."),
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    as_json: Json = False,
) -> None:
    """Merge the winner into a folder, read test once, and report.

    A server that is given does so in place of this process, unless it has done so before, and the
    folder is fetched from there. Or, of a search that may still be running, write what was tried,
    without any test score: as tables, or as a study that Optuna and its dashboard open.
    """
    from evomerge.cli import view

    ways = {"-o": out, "--csv": to_csv, "--parquet": to_parquet, "--optuna": to_optuna}
    given = [way for way, where in ways.items() if where is not None]
    if len(given) != 1:
        instead = f", not {' and '.join(given)}" if given else ""
        raise InputError(f"export: give one of {', '.join(ways)}{instead}")
    address = server_of(context)
    if out is None:
        if recipe_only or candidate is not None:
            option = "--recipe-only" if recipe_only else "--candidate"
            raise InputError(f"{option} is for -o alone: {given[0]} writes the whole search")
        if address is not None:
            raise InputError(f"{given[0]}: a server does not write it: name its store with --store")
        with places.stored(store) as opened:
            _export_history(opened, name, to_csv, to_parquet, to_optuna, as_json)
        return
    if recipe_only:
        path = _recipe(address, store, name, out, candidate)
        view.answer({"recipe": str(path)}, as_json, lambda found: view.line(found["recipe"]))
    else:
        report = _model(address, store, name, out, candidate)
        view.answer(report, as_json, lambda found: view.report(found, out))


def _recipe(
    server: str | None, store: str | None, name: str, out: Path, candidate: int | None
) -> Path:
    """Write a recipe; gives its file."""
    if server is not None:
        return fetching.recipe(server, name, out, candidate)
    from evomerge.export.export import export_recipe

    with places.stored(store) as opened:
        return export_recipe(opened, name, out, candidate)


def _model(
    server: str | None, store: str | None, name: str, out: Path, candidate: int | None
) -> dict[str, Any]:
    """Write a model; gives its report."""
    if server is not None:
        return fetching.model(server, name, out, candidate)
    from evomerge.cli import live
    from evomerge.export import export as exporting

    with places.stored(store) as opened, live.steps() as steps:
        return exporting.export(opened, name, out, candidate, steps)


def _export_history(
    store: "Store",
    name: str,
    to_csv: Path | None,
    to_parquet: Path | None,
    to_optuna: str | None,
    as_json: bool,
) -> None:
    """Write what a search tried to the one place that is given."""
    from evomerge.cli import live, view

    if to_optuna is not None:
        from evomerge.export.study import export_study

        with live.examples("trials") as progress:
            study = export_study(store, name, to_optuna, progress)
        text = f"study '{name}' in {study['url']}: {study['complete']:,} trials"
        failed = f", {study['failed']:,} more that failed" if study["failed"] else ""
        view.answer(study, as_json, lambda _: view.line(text + failed))
        return
    from evomerge.export.tables import Rows, Tables, write_csv, write_parquet

    with live.steps() as steps:
        if to_csv is not None:
            files = write_csv(Tables(Rows.of(store, name)), to_csv, steps.step)
        elif to_parquet is not None:
            files = write_parquet(Tables(Rows.of(store, name)), to_parquet, steps.step)
    found = {"files": [str(file) for file in files]}
    view.answer(found, as_json, lambda _: view.line(str(files[0].parent)))
