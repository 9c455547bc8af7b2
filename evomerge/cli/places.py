"""Where a search is looked after: in a store, or on a server. Commands that follow or steer one
need not know which."""

import re
import shlex
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import typer

from evomerge.cli.options import DEFAULT_STORE, server_of
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.report.history import History
    from evomerge.service.overview import Standing
    from evomerge.store import Store
    from evomerge.store.feed import Evaluated, Mark, Pulse

_TICK = 1.0  # seconds between looks at a store
_AT_ONCE = 1000  # lines of a log

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Place(Protocol):
    """A store or a server. Every method raises NotFound, or another InputError, for a search that
    is not there."""

    @property
    def option(self) -> str:
        """What other commands have to be told to come here, such as ' --store runs.db'; empty where
        they come here anyway."""
        ...

    def ls(self) -> list[dict[str, Any]]:
        """A line for each search, see summary.ls."""
        ...

    def standing(self, name: str) -> "Standing":
        """What a search is at."""
        ...

    def show(self, name: str) -> dict[str, Any] | None:
        """See summary.show; None before the search has begun."""
        ...

    def top(self, name: str, count: int | None) -> list[dict[str, Any]]:
        """Its candidates, see summary.top."""
        ...

    def history(self, name: str) -> "History":
        """Generation by generation, of a search that has begun."""
        ...

    def pulses(self, name: str) -> "Generator[Pulse]":
        """How a search goes on: at once, then whenever that changes, without an end."""
        ...

    def log(self, name: str, after: Any) -> tuple[list[str], Any]:
        """The next lines of a search's log, none where there are none yet, and how far that is;
        after: how far the lines before were, None at first."""
        ...

    def steer(self, name: str, what: Literal["pause", "stop"]) -> "Standing":
        """Ask a search to pause or to stop, see Queue."""
        ...


@contextmanager
def opened(context: typer.Context, store: str | None) -> Iterator[Place]:
    """The place that a command is for; see options.server_of. Raises InputError."""
    address = server_of(context)
    if address is None:
        with stored(store) as found:
            yield Stored(found)
    else:
        from evomerge.cli.remote import Remote

        with Remote(address, tell) as remote:
            yield remote


@contextmanager
def stored(store: str | None) -> "Iterator[Store]":
    """The store that a command is for; where none is named that of this folder. Raises InputError
    where there is none yet."""
    from evomerge.store import Store, exists

    if store is None and not exists(DEFAULT_STORE):
        raise InputError(
            "no search was launched here yet: launch one with: evomerge run JOB.yaml, or name a "
            "store with --store"
        )
    with Store(store or DEFAULT_STORE) as found:
        yield found


class Stored:
    """A store, whoever writes it."""

    def __init__(self, store: "Store") -> None:
        from evomerge.store.feed import Feed

        self._store = store
        self._feed = Feed(store)

    @property
    def option(self) -> str:
        """See Place."""
        from evomerge.store import shown

        url = self._store.url
        return "" if url == DEFAULT_STORE else f" --store {shlex.quote(shown(url))}"

    def ls(self) -> list[dict[str, Any]]:
        """See Place."""
        from evomerge.search import summary

        return summary.ls(self._store)

    def standing(self, name: str) -> "Standing":
        """See Place."""
        from evomerge.service.overview import standing

        return standing(self._store, name)

    def show(self, name: str) -> dict[str, Any] | None:
        """See Place."""
        from evomerge.errors import NotFound
        from evomerge.search import summary

        try:
            return summary.show(self._store, name)
        except NotFound:
            self.standing(name)
            return None

    def top(self, name: str, count: int | None) -> list[dict[str, Any]]:
        """See Place."""
        from evomerge.search import summary

        return summary.top(self._store, name, count)

    def history(self, name: str) -> "History":
        """See Place."""
        from evomerge.report.history import history

        return history(self._store, name)

    def pulses(self, name: str) -> "Generator[Pulse]":
        """See Place."""
        self.standing(name)
        told = None
        while True:
            pulse = self._feed.pulses()[name]
            if pulse != told:
                yield pulse
                told = pulse
            time.sleep(_TICK)

    def log(self, name: str, after: "Mark | None") -> "tuple[list[str], Mark]":
        """What the search wrote down of itself, and its evaluations; see Place."""
        from evomerge.store.feed import Mark

        begin = after or Mark(0, 0)
        news = self._feed.since(name, begin, _AT_ONCE)
        while news.more:  # both kinds of lines in their order
            rest = self._feed.since(name, news.end(begin), _AT_ONCE)
            news = replace(news, more=False).followed_by(rest)
        lines = [(line.at, f"{line.kind}: {line.text}") for line in news.lines]
        lines += [(one.recorded_at, _evaluated(one)) for one in news.evaluations]
        return [f"{at} {text}" for at, text in sorted(lines)], news.end(begin)

    def steer(self, name: str, what: Literal["pause", "stop"]) -> "Standing":
        """See Place."""
        from evomerge.store import LOCAL, Queue

        queue = Queue(self._store)
        (queue.pause if what == "pause" else queue.stop)(name, LOCAL)
        return self.standing(name)


def plain(text: str) -> str:
    """Text that others wrote, without what a terminal would obey."""
    return _CONTROL.sub("?", text)


def tell(text: str) -> None:
    """A line on stderr, where everything goes that is no result."""
    sys.stderr.write(f"{text}\n")


def _evaluated(one: "Evaluated") -> str:
    label = "" if one.label is None else f" ({one.label})"
    where = "" if one.device is None else f" on {one.device}"
    return (
        f"generation {one.generation}, candidate {one.candidate}{label}: {one.purpose}, stage "
        f"{one.stage}: {one.state} in {one.seconds:.3g} s{where}"
    )
