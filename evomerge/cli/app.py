"""The commands: each reads its arguments, calls one function of the package, shows the result."""

import json
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import evomerge
from evomerge.cli import exporting, following, places, reporting, serving
from evomerge.cli.database import database
from evomerge.cli.kinds import expecting
from evomerge.cli.merging import merge
from evomerge.cli.options import (
    DEFAULT_STORE,
    AllowCrimes,
    AllowPickle,
    BatchSize,
    Detach,
    Executor,
    JobFile,
    Json,
    MaxFevals,
    PopulationSize,
    RandomSeed,
    Search,
    ServerOption,
    StoragePath,
    StoreOption,
    TaskSearchPath,
    Timeout,
    UnsafeTruncateEmbeddings,
    server_of,
)
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.cli.live import Screen
    from evomerge.job import Engine, Job
    from evomerge.service.overview import Standing

app = typer.Typer(
    name="evomerge",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"evomerge {evomerge.__version__}\n")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_say_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Search for the best way to merge language models."""


@app.command()
def run(
    context: typer.Context,
    job: JobFile,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    detach: Detach = False,
    executor: Executor = None,
    max_fevals: MaxFevals = None,
    timeout: Timeout = None,
    random_seed: RandomSeed = None,
    batch_size: BatchSize = None,
    force_population_size: PopulationSize = None,
    storage_path: StoragePath = None,
    task_search_path: TaskSearchPath = None,
    as_json: Json = False,
) -> None:
    """Launch a search and conduct it to its end.

    Ctrl-C lets it be resumed. A server that is given conducts it in place of this process, which
    looks on; with Ctrl-C it goes on there. Takes a file of mergekit-evolve too, with those of its
    flags that mean something here.
    """
    from evomerge.cli import live
    from evomerge.search import launch
    from evomerge.search.setting import Setting
    from evomerge.store import Store, exists

    if timeout is not None and timeout <= 0:
        raise InputError(f"--timeout: {timeout:g}: give seconds, more than 0")
    flags = {
        "budget.candidates": max_fevals,
        "budget.hours": None if timeout is None else timeout / 3600,
        "seed": random_seed,
        "engine.batch_size": batch_size,
        "executor.kind": executor,
        "optimizer.population": force_population_size,
    }
    meant = [f"{key}={value}" for key, value in flags.items() if value is not None]
    loaded = _job(job, [*meant, *(overrides or [])], task_search_path or [])
    if (address := server_of(context)) is not None:
        following.submit(address, loaded, detach, as_json)
        return
    following.refuse_detached(detach)
    url = store or loaded.store
    if storage_path is not None:
        url = f"sqlite:///{storage_path.absolute() / 'evomerge.db'}"
    # Models and data may take a while to open: refuse a taken name before that.
    if (storage_path is None or storage_path.is_dir()) and exists(url):
        with Store(url) as opened:
            opened.refuse_taken(loaded.name)
    with _from(job), live.waiting("opening models and tasks"):
        setting = Setting.open(_with_winners(loaded, url))
    if storage_path is not None:
        storage_path.mkdir(parents=True, exist_ok=True)

    def conduct(watcher: "Screen", asked_to_stop: Callable[[], bool]) -> None:
        with _from(job):
            launch(setting, url, watcher, asked_to_stop)

    _conduct(url, loaded.name, as_json, conduct)


@app.command()
def resume(
    context: typer.Context,
    name: Search,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    detach: Detach = False,
    as_json: Json = False,
) -> None:
    """Go on with a search exactly where it was.

    What failed last in a failed one is tried again. The mode and keys of the sections optimizer,
    budget and stop may change until the finals, those of executor at any time. More
    guard.validation_looks may be asked for at any time, of a finished search too; what comes of
    them is marked post hoc.
    """
    from evomerge import search

    if (address := server_of(context)) is not None:
        following.resume(address, name, overrides or (), detach, as_json)
        return
    following.refuse_detached(detach)
    with places.stored(store) as opened:
        _conduct(
            opened.url,
            name,
            as_json,
            lambda w, stop: search.resume(name, opened, w, stop, overrides or ()),
        )


@app.command("ls")
def list_searches(
    context: typer.Context,
    store: StoreOption = None,
    server: ServerOption = None,
    as_json: Json = False,
) -> None:
    """List the searches of a store."""
    from evomerge.cli import view

    with places.opened(context, store) as place:
        rows = place.ls()
    view.answer(rows, as_json, view.ls)


@app.command()
def show(
    context: typer.Context,
    name: Search,
    store: StoreOption = None,
    server: ServerOption = None,
    as_json: Json = False,
) -> None:
    """Tell how a search stands."""
    from evomerge.cli import view

    with places.opened(context, store) as place:
        found = place.show(name)
        if found is None:
            raise InputError(f"search '{name}' {_not_begun(place.standing(name))}")
    view.answer(found, as_json, view.show)


@app.command()
def top(
    context: typer.Context,
    name: Search,
    count: Annotated[int | None, typer.Option("-n", min=1, help="How many; default: 10.")] = None,
    store: StoreOption = None,
    server: ServerOption = None,
    as_json: Json = False,
) -> None:
    """List a search's candidates, the best first.

    With --json all of them unless -n is given.
    """
    from evomerge.cli import view

    with places.opened(context, store) as place:
        rows = place.top(name, count if as_json else count or 10)
    view.answer(rows, as_json, view.top)


app.command("export")(exporting.export)
app.command()(merge)
app.command()(reporting.report)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or hub id.")],
    task: Annotated[str, typer.Option("--task", help="A task's folder, file or name.")],
    split: Annotated[str, typer.Option("--split", help="train or validation.")] = "validation",
    limit: Annotated[int | None, typer.Option(min=1, help="The first N examples only.")] = None,
    samples: Annotated[
        Path | None, typer.Option(help="Write prompts, answers and verdicts here, JSON Lines.")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Ask as a conversation; default: as the task says.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Of a task of lm-eval; default: the first that can be.")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="A key of the engine section; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda ...")] = "auto",
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Score a model on a task.

    Validation scores of a model that is a candidate of a search in the store count as its looks.
    """
    from evomerge.cli import live, view
    from evomerge.fitness.evaluate import evaluate_model
    from evomerge.fitness.task import Task
    from evomerge.job import find_task
    from evomerge.search.looks import reserve

    if samples is not None and not samples.absolute().parent.is_dir():
        raise InputError(f"--samples: there is no folder '{samples.parent}': make it first")
    opened = Task.open(find_task(task), chat, metric)
    for note in opened.notes:
        sys.stderr.write(f"{note}\n")
    section = _engine([f"device={device}", *(engine or [])])

    def reserve_look() -> None:
        if split == "validation":
            for search in reserve(store or DEFAULT_STORE, model, opened):
                text = f"a look at validation of search '{search}', which proposed this"
                sys.stderr.write(f"{text}\n")

    with expecting("model", model), live.examples(f"{opened.name} {split}") as progress:
        found = evaluate_model(model, opened, split, section, limit, progress, reserve_look)
    if samples is not None:
        view.write_lines(samples, found.samples())
    view.answer(found.document(), as_json, view.evaluation)


@app.command()
def check(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[JOB.yaml | RECIPE.yaml | task.yaml]", show_default=False),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", show_default=False)
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of job, task and suite files.")
    ] = False,
    fast: Annotated[
        bool, typer.Option("--fast", help="Of a recipe: leave out what reads all values.")
    ] = False,
    seal: Annotated[
        bool,
        typer.Option(
            "--seal",
            help="Of a task: write what searches have to know of its test split, hashes alone, "
            "beside its file, so that test itself may be kept where exports are made.",
        ),
    ] = False,
    allow_crimes: AllowCrimes = False,
    allow_pickle: AllowPickle = False,
    unsafe_truncate_embeddings: UnsafeTruncateEmbeddings = False,
    task_search_path: TaskSearchPath = None,
    store: StoreOption = None,
    as_json: Json = False,
) -> None:
    """Check a job, a recipe or a task without running it.

    Do the models fit, what does it need and give; do the splits keep apart, what is a model asked.
    Winners of earlier searches that a job names as parents are merged, if they are not yet.
    """
    from evomerge.cli import check_view, live, view
    from evomerge.job import Job, find_task, read_yaml
    from evomerge.job.files import SUITE

    if schema:
        from evomerge.fitness.task_file import TaskFile
        from evomerge.job import Suite

        document = Job.model_json_schema()
        for model in (TaskFile, Suite):
            part = model.model_json_schema()
            document["$defs"] |= part.pop("$defs", {}) | {model.__name__: part}
        document["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        sys.stdout.write(json.dumps(document, indent=2) + "\n")
        return
    if file is None:
        raise InputError("check: name a job file, a recipe or a task, or ask for --schema")
    is_file = file.suffix in (".yaml", ".yml") and file.name != SUITE
    keys = read_yaml(file).keys() if is_file else set()
    if not is_file or (keys & {"data", "dataset_path"} and not keys & {"parents", "genome"}):
        from evomerge.search.check import check_task

        with expecting("task", file):
            found = check_task(find_task(str(file)), seal)
        view.answer(found, as_json, check_view.task)
        return
    if seal:
        raise InputError(f"'{file}' is no task: --seal is for tasks: leave it out")
    if "merge_method" not in keys:
        if not keys & {"genome", *Job.model_fields}:
            raise InputError(
                f"'{file}' is neither a recipe, which has a 'merge_method', nor a job, which has "
                "'parents', 'space' and 'tasks', nor a task, which has 'data'"
            )
        if fast or allow_crimes or allow_pickle or unsafe_truncate_embeddings:
            raise InputError(f"'{file}' is a job: this option is for recipes: leave it out")
        from evomerge.search.check import check_job
        from evomerge.store import exists

        job = _job(file, overrides or [], task_search_path or [])
        exists(store or job.store)  # refuses what is no URL of a store
        with _from(file):
            job = _with_winners(job, store or job.store)
            with live.waiting("opening models and tasks, scoring a sample"):
                found = check_job(job, store or job.store)
        view.answer(found, as_json, lambda found: check_view.job(found, job.space.preset))
        return
    if overrides:
        raise InputError(f"'{file}' is a recipe: '{overrides[0]}' can override keys of jobs only")
    from evomerge.recipe import Recipe

    loaded = Recipe.from_file(file)  # before torch is loaded: a misspelt key is told at once
    from evomerge.merge.preflight import check_recipe

    with live.steps(doing="reading") as steps:
        found = check_recipe(
            loaded,
            allow_crimes=allow_crimes,
            allow_pickle=allow_pickle,
            truncate=unsafe_truncate_embeddings,
            fast=fast,
            progress=steps.written,
        )
    view.answer(found, as_json, check_view.recipe)
    errors = sum(finding["level"] == "error" for finding in found["findings"])
    if errors:
        many = f"{errors} errors" if errors > 1 else "an error"
        raise InputError(f"'{file}' would not be merged: {many}, see above")


for command in (serving.serve, following.watch, following.logs, following.pause, following.stop):
    app.command()(command)
app.add_typer(serving.token, name="token")
app.add_typer(database, name="db")


def _job(file: Path, overrides: list[str], task_folders: list[Path]) -> "Job":
    """Read a job, or a file of another program, with what it was understood to mean on stderr."""
    from evomerge.job import Job

    with expecting("job", file):
        return Job.from_file(file, overrides, task_folders, places.tell)


def _with_winners(job: "Job", url: str) -> "Job":
    """The job with the winners of earlier searches that it names as parents, merged."""
    from evomerge.cli import live
    from evomerge.search.pool import resolved

    with live.steps() as steps:
        return resolved(job, url, steps)


@contextmanager
def _from(file: Path) -> Iterator[None]:
    """What is wrong with a job is said of its file."""
    from evomerge.errors import JobError

    try:
        yield
    except JobError as error:
        text = str(error)
        raise JobError(text if text.startswith(f"{file}: ") else f"{file}: {text}") from None


def _conduct(
    url: str,
    name: str,
    as_json: bool,
    conduct: Callable[[Any, Callable[[], bool]], None],
) -> None:
    """Run a search with its progress on stderr, then show how it ended."""
    from evomerge.cli import live, view
    from evomerge.errors import ClusterLost
    from evomerge.search import Interrupted, summary
    from evomerge.store import Store, shown

    asked: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        sys.stderr.write("\nstopping after the candidates under way; again to stop at once\n")

    before = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    how = f"evomerge resume {name}" + (
        "" if url == DEFAULT_STORE else f" --store {shlex.quote(shown(url))}"
    )
    try:
        with live.watching(shown(url)) as watcher:
            conduct(watcher, lambda: bool(asked))
    except (Interrupted, KeyboardInterrupt):
        if not _is_stored(url, name):  # interrupted while models were opened
            raise KeyboardInterrupt from None
        sys.stderr.write(f"stopped; nothing is lost. Go on with: {how}\n")
        sys.exit(130)
    except ClusterLost as error:
        raise ClusterLost(f"{error}: {how}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    with Store(url, tell=places.tell) as store:  # all is done: be as patient as the search was
        found = summary.show(store, name)
    view.answer(found, as_json, view.show)


def _is_stored(url: str, name: str) -> bool:
    """Whether a search was launched; taken for granted of a store that does not answer."""
    from evomerge.errors import EvomergeError, NotFound
    from evomerge.store import Store, exists

    try:
        if not exists(url):
            return False
        with Store(url) as store:
            store.search(name)
    except NotFound:
        return False
    except EvomergeError:
        return True
    return True


def _engine(assignments: list[str]) -> "Engine":
    """The engine section with these keys. Raises JobError."""
    from pydantic import ValidationError

    from evomerge.errors import JobError
    from evomerge.job import Engine
    from evomerge.job.files import override
    from evomerge.messages import explain

    keys: dict[str, Any] = {}
    for assignment in assignments:
        override(keys, assignment)
    try:
        return Engine.model_validate(keys)
    except ValidationError as error:
        raise JobError(f"--engine: {explain(error, Engine)}") from None


def _not_begun(standing: "Standing") -> str:
    """Why there is nothing to show of a search yet, and what to do about it."""
    place = "" if standing.place is None else f", at place {standing.place}"
    words = {
        "queued": f"waits in the queue{place}: follow it with: evomerge watch {standing.name}",
        "running": f"begins just now: follow it with: evomerge watch {standing.name}",
        "paused": "was paused before it began: resume it",
        "failed": "failed before it began: correct the job, and submit it again",
        "cancelled": "was cancelled before it began: submit it again",
    }
    return words[standing.state]
