"""The commands: each reads its arguments, calls one function of the package, shows the result."""

import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.store import Store

app = typer.Typer(
    name="evomerge",
    help="Search for the best way to merge language models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DEFAULT_STORE = "sqlite:///evomerge.db"
JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", show_default=False)]
Search = Annotated[str, typer.Argument(metavar="SEARCH", help="The search's name.")]
StoreOption = Annotated[
    str | None,
    typer.Option("--store", envvar="EVOMERGE_STORE", help=f"Default: {DEFAULT_STORE}."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command()
def run(
    job: JobFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Launch a search and conduct it to its end; Ctrl-C lets it be resumed."""
    from evomerge.job import Job
    from evomerge.search import launch
    from evomerge.search.setting import Setting
    from evomerge.store import Store, exists

    loaded = Job.from_file(job, overrides or [])
    url = store or loaded.store
    if exists(url):  # models and data may take a while to open: refuse a taken name before that
        with Store(url) as opened:
            opened.refuse_taken(loaded.name)
    setting = Setting.open(loaded)
    _conduct(url, loaded.name, as_json, lambda w, stop: launch(setting, url, w, stop))


@app.command()
def resume(name: Search, store: StoreOption = None, as_json: Json = False) -> None:
    """Go on with a search exactly where it was."""
    from evomerge import search

    with _opened(store) as opened:
        _conduct(opened.url, name, as_json, lambda w, stop: search.resume(name, opened, w, stop))


@app.command("ls")
def list_searches(store: StoreOption = None, as_json: Json = False) -> None:
    """List the searches of a store."""
    from evomerge.cli import view
    from evomerge.search import summary

    with _opened(store) as opened:
        rows = summary.ls(opened)
    _answer(rows, as_json, view.ls)


@app.command()
def show(name: Search, store: StoreOption = None, as_json: Json = False) -> None:
    """Tell how a search stands."""
    from evomerge.cli import view
    from evomerge.search import summary

    with _opened(store) as opened:
        found = summary.show(opened, name)
    _answer(found, as_json, view.show)


@app.command()
def top(
    name: Search,
    count: Annotated[int | None, typer.Option("-n", min=1, help="How many; default: 10.")] = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """List a search's candidates, the best first; with --json all of them unless -n is given."""
    from evomerge.cli import view
    from evomerge.search import summary

    with _opened(store) as opened:
        rows = summary.top(opened, name, count if as_json else count or 10)
    _answer(rows, as_json, view.top)


@app.command("export")
def export_search(
    name: Search,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    candidate: Annotated[
        int | None, typer.Option("--candidate", help="Id of a candidate; default: the winner.")
    ] = None,
    recipe_only: Annotated[
        bool, typer.Option("--recipe-only", help="Write the recipe; keep the test split sealed.")
    ] = False,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Merge the winner into a folder, read the sealed test split once, and report."""
    from evomerge.cli import view
    from evomerge.export import export as exporting

    with _opened(store) as opened:
        if recipe_only:
            path = exporting.export_recipe(opened, name, out, candidate)
            _answer({"recipe": str(path)}, as_json, lambda found: view.line(found["recipe"]))
            return
        with view.steps() as steps:
            report = exporting.export(opened, name, out, candidate, steps)
    _answer(report, as_json, lambda found: view.report(found, out))


@app.command()
def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    random_seed: Annotated[int, typer.Option("--random-seed", help="Of stochastic masks.")] = 0,
    out_shard_size: Annotated[
        str, typer.Option("--out-shard-size", help="Largest file, such as 500M or 5B (bytes).")
    ] = "5B",
    as_json: Json = False,
) -> None:
    """Merge models by a mergekit recipe; a drop-in for mergekit-yaml."""
    from evomerge.cli import view
    from evomerge.merge.checkpoint import Checkpoint
    from evomerge.merge.disk import check_free, write_checkpoint
    from evomerge.merge.plan import make_plan
    from evomerge.recipe import Recipe

    began = time.perf_counter()
    shard_bytes = _bytes(out_shard_size)
    loaded = Recipe.from_file(recipe)
    check_free(out)
    models = {name: Checkpoint.open(name) for name in loaded.model_names()}
    plan = make_plan(loaded, models, random_seed)
    with view.steps() as steps:
        steps.step(f"merging {len(plan.tensors)} tensors of {len(models)} models into {out}")
        write_checkpoint(
            plan,
            models,
            out,
            shard_bytes=shard_bytes,
            progress=lambda written: steps.written(written, plan.bytes),
        )
    if not as_json:
        view.line(str(out))
        return
    found = {
        "out": str(out),
        "tensors": len(plan.tensors),
        "bytes": plan.bytes,
        "seconds": time.perf_counter() - began,
        "recipe_sha": loaded.sha({name: model.sha for name, model in models.items()}),
    }
    _answer(found, as_json, view.line)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder.")],
    task: Annotated[str, typer.Option("--task", help="A task's folder, file or name.")],
    split: Annotated[str, typer.Option("--split", help="train or validation.")] = "validation",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Score a model on a task."""
    from evomerge.cli import view
    from evomerge.fitness.evaluate import evaluate_model
    from evomerge.job import Engine, find_task

    found = evaluate_model(Path(model), find_task(task), split, Engine(device=device))
    _answer(found, as_json, view.evaluation)


@app.command()
def check(
    job: Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of job and task files.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a job without running it: models, splits, licence, memory, detectable gain, time."""
    from evomerge.cli import view
    from evomerge.job import Job

    if schema:
        from evomerge.fitness.task import TaskFile

        document = Job.model_json_schema()
        task_file = TaskFile.model_json_schema()
        document["$defs"] |= task_file.pop("$defs", {}) | {"TaskFile": task_file}
        document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    if job is None:
        raise InputError("check: name a job file, or ask for --schema")
    from evomerge.search.check import check_job

    found = check_job(Job.from_file(job, overrides or []))
    _answer(found, as_json, view.check)


@contextmanager
def _opened(store: str | None) -> Iterator["Store"]:
    from evomerge.store import Store

    with Store(store or DEFAULT_STORE) as opened:
        yield opened


def _conduct(
    url: str,
    name: str,
    as_json: bool,
    conduct: Callable[[Any, Callable[[], bool]], None],
) -> None:
    """Run a search with its progress on stderr, then show how it ended."""
    from evomerge.cli import view
    from evomerge.search import Interrupted, summary
    from evomerge.store import Store

    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        sys.stderr.write("\nstopping after the candidates under way; again to stop at once\n")

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    how = f"evomerge resume {name}" + (
        "" if url == DEFAULT_STORE else f" --store {shlex.quote(url)}"
    )
    try:
        with view.watching() as watcher:
            conduct(watcher, lambda: bool(asked))
    except (Interrupted, KeyboardInterrupt):
        sys.stderr.write(f"stopped; nothing is lost. Go on with: {how}\n")
        sys.exit(130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with Store(url) as store:
        found = summary.show(store, name)
    _answer(found, as_json, view.show)


def _answer(found: Any, as_json: bool, render: Callable[[Any], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    else:
        render(found)


def _bytes(text: str) -> int:
    """mergekit's sizes: a number with K, M or B (thousand, million, billion)."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}.get(text[-1:].upper(), 1)
    digits = text[:-1] if scale > 1 else text
    if not digits.isdigit() or int(digits) == 0:
        raise InputError(f"--out-shard-size: '{text}' is no size: write such as 500M or 5B")
    return int(digits) * scale
