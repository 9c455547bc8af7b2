"""The search, from launch to winner. Only this package conducts: it asks the optimizer, decodes
through the space, sends work to the executor, writes to the store and heeds the guard.

`setting` opens what a job names, `pool` merges the winners of earlier searches that it names,
`settle` decides what it leaves open. `loop` runs generations, each a `race`; `record` keeps what
was done, `standing` who leads; `finals` picks the winner. `summary` tells how a stored search
stands, `check` foretells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from evomerge.errors import JobError

if TYPE_CHECKING:
    from evomerge.fitness.results import Scored
    from evomerge.guard.review import Used
    from evomerge.search.setting import Setting
    from evomerge.store import Store


@dataclass(frozen=True)
class Status:
    """How a running search stands.

    done, population: candidates of this generation that are scored, and all of them. best: plain
    train score of the incumbent, with its fitness; mean: of the last complete generation's
    candidates. gap: see guard.review. hypervolume: of the front; None with one objective.
    seconds_left: None until it can be told.
    """

    generation: int
    done: int
    population: int
    best: float | None
    best_fitness: float | None
    mean: float | None
    step_size: float | None
    gap: float | None
    hypervolume: float | None
    used: "Used"
    seconds_left: float | None


class Watcher(Protocol):
    """Someone who is told how a search goes on, as it happens."""

    def opened(self, setting: "Setting") -> None:
        """Everything the job names is open and fits together."""
        ...

    def baseline(self, name: str, scored: "Scored") -> None:
        """A baseline was scored on all of train."""
        ...

    def progress(self, status: Status) -> None:
        """A candidate was scored."""
        ...

    def generation(self, status: Status) -> None:
        """A generation is complete."""
        ...

    def stopped(self, reason: str) -> None:
        """No further generation is opened; the finals follow."""
        ...

    def note(self, text: str) -> None:
        """Something that whoever looks after the search should know."""
        ...

    def finalist(self, name: str, done: int, of: int) -> None:
        """A finalist, or the best parent, is about to be scored on train or validation."""
        ...


class Silent:
    """A Watcher that looks away, for scripts that only want the result."""

    def opened(self, setting: "Setting") -> None: ...
    def baseline(self, name: str, scored: "Scored") -> None: ...
    def progress(self, status: Status) -> None: ...
    def generation(self, status: Status) -> None: ...
    def stopped(self, reason: str) -> None: ...
    def note(self, text: str) -> None: ...
    def finalist(self, name: str, done: int, of: int) -> None: ...


class Interrupted(Exception):  # not an error
    """The search was asked to stop, and did after what was under way had landed."""


def launch(
    setting: "Setting", url: str, watcher: Watcher, asked_to_stop: Callable[[], bool]
) -> None:
    """Start a new search in the store of this URL and conduct it to its end.

    Raises InputError before anything is written when the engine refuses the models or the name is
    taken; Interrupted when `asked_to_stop` turned true; SearchFailed.
    """
    from evomerge.search.loop import conduct
    from evomerge.search.setting import versions
    from evomerge.search.settle import settle
    from evomerge.store import Coordinator, Store

    executor = setting.executor()
    try:
        setting, notes = settle(setting, executor)
        with (
            Store(url, create=True) as store,
            Coordinator.launch(
                store,
                setting.job.name,
                setting.job.seed,
                setting.document(),
                versions(),
                setting.new_models(),
                setting.new_splits(),
            ) as coordinator,
        ):
            for note in notes:
                coordinator.log("settled", note)
                watcher.note(note)
            conduct(setting, coordinator, executor, watcher, asked_to_stop)
    finally:
        executor.close()


def resume(
    name: str,
    store: "Store",
    watcher: Watcher,
    asked_to_stop: Callable[[], bool],
    overrides: Sequence[str] = (),
) -> None:
    """Go on with a search exactly where it was. A finished one is left as it is.

    overrides: `key=value` for keys of the sections `optimizer`, `budget` and `stop`, which may
    change under way until the finals; another optimizer is told what was found so far. Raises
    InputError when a model or a task is no longer what it was at launch.
    """
    from evomerge.search.loop import conduct
    from evomerge.search.setting import Setting, note_changes
    from evomerge.search.settle import changed
    from evomerge.store import Coordinator

    row = store.search(name)
    if row.state == "finished":
        if overrides:
            changed(row.job, overrides, f"search '{name}'")
            raise JobError(
                f"search '{name}' is finished, its looks are spent: launch a new one with "
                f"{' '.join(overrides)} and another name"
            )
        return
    with Coordinator.take_over(store, name) as coordinator:
        if overrides and _deciding(store, row.id):
            raise JobError(
                f"search '{name}' is choosing its winner, and nothing may change any more: "
                f"resume it without {overrides[0]}, or launch a new one with it"
            )
        job = changed(row.job, overrides, f"search '{name}'") if overrides else None
        setting = Setting.reopen(coordinator, job)
        if overrides:
            _ = setting.optimizer()  # refused before it is written down
            text = f"from here on: {', '.join(overrides)}"
            coordinator.stop(None)  # it may have stopped, and go on under another limit
            coordinator.change(setting.document(), text)
            watcher.note(text)
        watcher.note(note_changes(coordinator))
        if row.state == "failed":
            coordinator.stop(None)
            coordinator.finish("open", None)
        executor = setting.executor()
        try:
            conduct(setting, coordinator, executor, watcher, asked_to_stop)
        finally:
            executor.close()


def _deciding(store: "Store", search: int) -> bool:
    """Whether the finals of a search have left a trace: a mean to be judged, or the look at the
    best parent, which is their first; from outside of a search only its candidates are looked at.
    """
    final = any(generation.kind == "final" for generation in store.generations(search))
    baselines = {c.id for c in store.candidates(search) if c.generation == 0}
    looks = (r for r in store.ledger() if r.kind == "look" and r.search == search)
    return final or any(look.entry["candidate"] in baselines for look in looks)
