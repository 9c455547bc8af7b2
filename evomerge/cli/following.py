"""The commands for a search that somebody else conducts: watch it, read its log, ask it to pause or
to stop. Each works on a store and on a server, see places."""

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from evomerge.cli.options import Search, ServerOption, StoreOption
from evomerge.cli.places import Place, opened, plain, tell
from evomerge.errors import InputError, SearchFailed

if TYPE_CHECKING:
    from evomerge.cli.live import Screen
    from evomerge.cli.remote import Remote
    from evomerge.job import Job
    from evomerge.report.history import History, Point
    from evomerge.search import Status
    from evomerge.service.overview import Standing

_ROWS = 12  # generations before the present one that are shown at first
_PAUSE = 0.5  # seconds between readings of a search that does no more than go on
_TICK = 1.0  # seconds between looks at a log
_UNDER_WAY = ("queued", "running")


def watch(
    context: typer.Context,
    name: Search,
    server: ServerOption = None,
    store: StoreOption = None,
) -> None:
    """Watch a search until it ends.

    Then tells how it stands, with the exit code that `evomerge run` has: 0 when it has finished, 1
    when it has failed, 130 when it is paused. Ctrl-C ends the watching alone.
    """
    with opened(context, store) as place:
        to_the_end(place, name)


def logs(
    context: typer.Context,
    name: Search,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on until the search ends, or Ctrl-C.")
    ] = False,
    server: ServerOption = None,
    store: StoreOption = None,
) -> None:
    """Print what a search did, line by line.

    From a store, what it wrote down there: its evaluations and what was remarkable. From a server,
    what the processes say that work on it.
    """
    with opened(context, store) as place:
        mark = None
        is_over = _is_over(place, name)  # before it is read: what comes last is not missed
        while True:
            lines, mark = place.log(name, mark)
            for line in lines:
                sys.stdout.write(plain(line) + "\n")
            sys.stdout.flush()
            if lines:
                continue
            if is_over or not follow:
                return
            time.sleep(_TICK)
            is_over = _is_over(place, name)


def pause(
    context: typer.Context,
    name: Search,
    server: ServerOption = None,
    store: StoreOption = None,
) -> None:
    """Have a search pause as by Ctrl-C.

    What is under way lands; `evomerge resume` goes on with it.
    """
    with opened(context, store) as place:
        standing = place.steer(name, "pause")
        resume = f"go on with: evomerge resume {shlex.quote(name)}{place.option}"
        if standing.state == "paused":
            tell(f"search '{name}' is paused; {resume}")
        else:
            tell(f"search '{name}' pauses as soon as what is under way has landed; {resume}")


def stop(
    context: typer.Context,
    name: Search,
    server: ServerOption = None,
    store: StoreOption = None,
) -> None:
    """Have a search open no further generation.

    The finals follow, and a winner is named. A paused one does so once it is resumed.
    """
    with opened(context, store) as place:
        standing = place.steer(name, "stop")
        when = " once it is resumed" if standing.state == "paused" else ""
        tell(f"search '{name}' opens no further generation; its winner is chosen{when}")


def submit(server: str, job: "Job", detach: bool, as_json: bool) -> None:
    """Have a server conduct a search, and follow it there."""
    from evomerge.cli import view
    from evomerge.cli.remote import Remote

    with Remote(server, tell) as remote:
        asked = remote.submit(job)
        _announce(remote, job.name)
        if not detach:
            to_the_end(remote, job.name, as_json)
        elif as_json:
            view.document(asdict(asked))


def resume(server: str, name: str, overrides: Sequence[str], detach: bool, as_json: bool) -> None:
    """Have a server go on with a search, and follow it there."""
    from evomerge.cli import view
    from evomerge.cli.remote import Remote

    with Remote(server, tell) as remote:
        standing = remote.resume(name, overrides)
        _announce(remote, name)
        if not detach:
            to_the_end(remote, name, as_json)
        elif as_json:
            view.document(asdict(standing))


def refuse_detached(detach: bool) -> None:
    """Raise InputError for --detach without a server."""
    if detach:
        raise InputError("--detach: nobody would conduct it here: give --server, or leave it out")


def to_the_end(place: Place, name: str, as_json: bool = False) -> None:
    """Show a search's progress until nobody goes on with it, then how it stands. Exits 130 for one
    that is paused; raises SearchFailed."""
    from evomerge.cli import live, view

    try:
        with live.watching() as screen:
            standing = _followed(place, name, screen)
    except KeyboardInterrupt:
        look = f"evomerge watch {shlex.quote(name)}{place.option}"
        interrupted(f"search '{name}' goes on; look again with: {look}")
    command = f"{shlex.quote(name)}{place.option}"
    if standing.state == "paused":
        interrupted(f"search '{name}' is paused; go on with: evomerge resume {command}")
    if standing.state == "cancelled":
        raise SearchFailed(f"search '{name}' was taken out of the queue before it began")
    found = place.show(name)
    if standing.state == "failed":
        error = (standing.submission and standing.submission.error) or (
            found and found["stop_reason"]
        )
        raise SearchFailed(f"search '{name}' has failed: {error}: see evomerge logs {command}")
    if as_json:
        view.document(found)
    elif found is not None:
        view.show(found)


def _announce(remote: "Remote", name: str) -> None:
    look = f"evomerge watch {shlex.quote(name)}{remote.option}"
    tell(f"search '{name}' is in the queue of {remote.url}; look with: {look}")


def interrupted(text: str) -> NoReturn:
    """A last line on stderr, then the exit of what was interrupted."""
    tell(text)
    sys.exit(130)


def _is_over(place: Place, name: str) -> bool:
    return place.standing(name).state not in _UNDER_WAY


def _followed(place: Place, name: str, screen: "Screen") -> "Standing":
    """How a search stands when nobody goes on with it."""
    progress, read_at = _Progress(screen), 0.0
    standing, before = place.standing(name), None
    screen.note(_stands(name, standing))
    with closing(place.pulses(name)) as pulses:
        for pulse in pulses:
            news = (pulse.state, pulse.queued, pulse.epoch, pulse.generations, pulse.told)
            if news == before and time.monotonic() - read_at < _PAUSE:
                continue
            if before is None or news[:3] != before[:3]:
                was, standing = standing, place.standing(name)
                if was.state != standing.state:
                    screen.note(_stands(name, standing))
            if pulse.state is not None:
                progress.show(place.history(name), pulse.done)
            if standing.state not in _UNDER_WAY:
                break
            before, read_at = news, time.monotonic()
    return standing


def _stands(name: str, standing: "Standing") -> str:
    in_queue = f", number {standing.place}" if standing.place else ""
    return f"search   {name}: {standing.state}{in_queue}"


class _Progress:
    """What of a search's history is on the screen."""

    def __init__(self, screen: "Screen") -> None:
        self._screen = screen
        self._shown: set[tuple[str, object]] = set()

    def show(self, history: "History", settled: int | None) -> None:
        """Add what is new; settled: how many of all candidates are, None of an ended search."""
        for reference in history.references:
            if self._is_new("reference", reference.name):
                self._screen.reference(reference.name, reference.score)
        for alert in history.alerts:
            if self._is_new("alert", alert.kind):  # the numbers in its text change
                self._screen.note(alert.text)
        proposed = [point for point in history.points if point.kind == "proposed"]
        told = [point for point in proposed if point.told_at is not None]
        for point in told[-_ROWS:]:
            if self._is_new("generation", point.generation):
                self._screen.generation(_status(history, point, point, 0))
        begun = [point for point in proposed if point.told_at is None]
        if begun and settled is not None:
            left = sum(point.candidates for point in history.points) - settled
            self._screen.progress(_status(history, begun[-1], (told or begun)[-1], left))
        if history.stop_reason is not None and self._is_new("stopped", True):
            self._screen.stopped(history.stop_reason)

    def _is_new(self, kind: str, what: object) -> bool:
        is_new = (kind, what) not in self._shown
        self._shown.add((kind, what))
        return is_new


def _status(history: "History", point: "Point", reviewed: "Point", left: int) -> "Status":
    """At one generation; reviewed: the latest up to it that is complete; left: how many of its
    candidates are not settled."""
    from evomerge.guard.review import Used
    from evomerge.search import Status

    proposed = [one for one in history.points if one.kind == "proposed"]
    candidates = sum(one.candidates for one in proposed if one.generation <= point.generation)
    return Status(
        point.generation,
        min(max(point.candidates - left, 0), point.candidates),
        point.candidates,
        reviewed.best,
        reviewed.mean,
        point.step_size,
        reviewed.gap,
        reviewed.hypervolume,
        Used(candidates, point.examples, 0.0, 0.0),
        history.seconds_left if point == proposed[-1] else None,
    )
