"""How progress looks, on stderr: live on a terminal, plain lines elsewhere.

Knows how to draw, not what is true.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from evomerge.cli.view import constraint, grid, percent, prose, span

if TYPE_CHECKING:
    from evomerge.fitness.results import Scored
    from evomerge.job import Job
    from evomerge.progress import Steps
    from evomerge.search import Status
    from evomerge.search.setting import Setting

_ROWS = 12  # generations that the live table shows
_UNLIMITED = 100_000  # of a line of a log: programs read it line by line


def _err() -> Console:
    width = None if sys.stderr.isatty() else _UNLIMITED
    return Console(stderr=True, width=width, highlight=False)


class Screen:
    """A Watcher that draws. store: where the search is kept that this process conducts; None where
    it looks on."""

    def __init__(self, console: Console, live: Live | None, store: str | None) -> None:
        self._console = console
        self._live = live
        self._store = store
        self._rows: list[Status] = []
        self._references: list[str] = []
        self._weights: dict[str, float] = {}

    def opened(self, setting: "Setting") -> None:
        job = setting.job
        self._weights = dict(setting.weights)
        space = job.space.preset or job.space.kind
        lines = [
            f"search   {job.name}, seed {job.seed}",
            f"store    {self._store}",
            f"mode     {job.mode}, {_where(job)}",
            f"space    {space}: {len(setting.space.coordinates)} coordinates, by "
            f"{job.optimizer.name}",
            f"parents  {', '.join(setting.named.parents)}"
            + (f" over {Path(setting.named.base).name}" if setting.named.base else ""),
        ]
        for task, sizes in setting.sizes.items():
            lines.append(
                f"task     {task}: {len(setting.driving[task])} train examples drive the search, "
                f"{len(setting.monitor[task])} watch it, {len(setting.validation[task])} "
                f"validation, {sizes['test']} sealed"
            )
        lines += [note for task in setting.tasks.values() for note in task.notes]
        if job.objective != "mean":
            lines.append(f"climbs   {', '.join(job.objectives) or job.objective}")
        for kept in job.constraints:
            lines.append(f"keeps    {constraint(kept.model_dump())}")
        limits = [f"{v:,} {k.replace('_', ' ')}" for k, v in job.budget if v is not None]
        lines.append(f"budget   {', '.join(limits)}")
        for text in lines:
            prose(self._console, text, hang=9)
        if self._live is not None:
            self._live.update(_meanwhile("scoring the baselines"))

    def baseline(self, name: str, scored: "Scored") -> None:
        self.reference(name, scored.score(self._weights))

    def reference(self, name: str, score: float) -> None:
        """A baseline has this score on all of train."""
        reference = f"{name} {percent(score)}"
        self._references.append(reference)
        if self._live is None:
            self._console.print(f"baseline {reference} of train")
        else:
            self._refresh(None)

    def progress(self, status: "Status") -> None:
        if self._live is not None:
            self._refresh(status)

    def generation(self, status: "Status") -> None:
        self._rows.append(status)
        if self._live is None:
            pairs = zip(_columns(status), _cells(status), strict=True)
            prose(self._console, "; ".join(f"{name} {value}" for name, value in pairs))
        else:
            self._refresh(None)

    def stopped(self, reason: str) -> None:
        self._console.print(f"stopped: {reason}")

    def note(self, text: str) -> None:
        prose(self._console, text)

    def finalist(self, name: str, done: int, of: int) -> None:
        self._console.print(f"finals   {name} ({done + 1} of {of})")

    def _refresh(self, current: "Status | None") -> None:
        if self._live is None:
            return
        shown = [*self._rows[-_ROWS:], *([current] if current is not None else [])]
        table = grid(*_columns(shown[-1])) if shown else grid()
        for status in shown:
            table.add_row(*_cells(status), style="dim" if status is current else None)
        references = Text("train scores of the baselines: " + ", ".join(self._references), "dim")
        self._live.update(Group(references, table))


def _columns(status: "Status") -> list[str]:
    """Of the table of generations; with several objectives the front's hypervolume for the step."""
    progress = "step" if status.hypervolume is None else "hypervolume"
    return ["generation", "shrunk", "mean", "gap", progress, "candidates", "examples", "time left"]


def _cells(status: "Status") -> list[str]:
    number = f"{status.generation}"
    if status.done < status.population:
        number += f" ({status.done}/{status.population})"
    gap = "-" if status.gap is None else f"{100 * status.gap:+.1f}"
    progress = "-" if status.step_size is None else f"{status.step_size:.3f}"
    if status.hypervolume is not None:
        progress = f"{status.hypervolume:.4g}"
    return [
        number,
        percent(status.shrunk),
        percent(status.mean),
        gap,
        progress,
        f"{status.used.candidates:,}",
        f"{status.used.example_evaluations:,}",
        span(status.seconds_left),
    ]


def _where(job: "Job") -> str:
    """Where a job's candidates are scored."""
    section = job.executor
    if section.kind == "inline":
        return "in this process"
    address = section.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        cluster = "a Ray cluster that is started here"
    elif address == "auto":
        cluster = "the Ray cluster of this machine"
    else:
        cluster = f"the Ray cluster {address}"
    workers = "as many workers as there is room for"
    if section.workers != "auto":
        workers = f"{section.workers:,} worker{'s' * (section.workers > 1)} at most"
    return f"{workers} on {cluster}"


def _meanwhile(doing: str) -> Text:
    return Text(f"{doing} ...", "dim")


@contextmanager
def watching(store: str | None = None) -> Iterator[Screen]:
    """Progress of a search, live on a terminal, plain lines elsewhere; store: see Screen."""
    console = _err()
    if not console.is_terminal:
        yield Screen(console, None, store)
        return
    at_first = None if store is None else _meanwhile("opening models and tasks")
    with Live(at_first, console=console, refresh_per_second=4) as live:
        yield Screen(console, live, store)


@contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Says what takes a while, where someone looks on."""
    console = _err()
    if not console.is_terminal:
        yield
        return
    with Live(_meanwhile(doing), console=console, transient=True):
        yield


@contextmanager
def examples(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Progress over examples, with the time left, where someone looks on."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _err()
    bar = Progress(
        TextColumn(doing),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task(doing, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def steps(quiet: bool = False, doing: str = "writing") -> Iterator["Steps"]:
    """Progress of a merge, an export or a check. A bar is there only while what it counts goes
    on."""
    from rich.filesize import decimal
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from evomerge.progress import Steps

    console = _err()
    console.quiet = quiet
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )

    def counted(what: str, words: Callable[[int], str]) -> Callable[[int, int], None]:
        task = bar.add_task(what, start=False, visible=False, count="")

        def told(done: int, total: int) -> None:
            if bar.tasks[task].start_time is None or bar.tasks[task].finished:
                bar.reset(task)  # whatever came before took its time, too
            count = f"{words(done)} of {words(total)}"
            bar.update(task, completed=done, total=total, visible=done < total, count=count)

        return told

    with bar:
        yield Steps(
            lambda text: prose(console, text),
            counted(doing, decimal),
            counted("examples", "{:,}".format),
        )
