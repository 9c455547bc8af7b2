"""The search, from launch to winner. Only this package conducts: it asks the optimizer, decodes
through the space, sends work to the executor, writes to the store and heeds the guard.

`setting` opens what a job names, `pool` merges the winners of earlier searches that it names,
`settle` decides what it leaves open, `changes` what may change later. `loop` runs generations, each
a `generation` with its `race`; `flow` takes what they want to the executor, `pace` says what that
cost; `record` keeps what was done, `standing` who leads; `finals` picks the winner. `summary` tells
how a stored search stands, `check` foretells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from evomerge.errors import JobError, SearchBusy

if TYPE_CHECKING:
    from evomerge.fitness.results import Scored
    from evomerge.guard.review import Used
    from evomerge.job import Job
    from evomerge.search.setting import Setting
    from evomerge.store import SearchRow, Store


@dataclass(frozen=True)
class Status:
    """How a running search stands.

    done, population: candidates of this generation that are scored, and all of them. shrunk: train
    score of the incumbent with the luck of the best taken out, None before a generation is
    complete; mean: of the last complete generation's candidates. gap: see guard.review.
    hypervolume: of the front; None with one objective.
    seconds_left: None until it can be told.
    """

    generation: int
    done: int
    population: int
    shrunk: float | None
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
    setting: "Setting",
    url: str,
    watcher: Watcher,
    asked_to_stop: Callable[[], bool],
    submission: int | None = None,
) -> None:
    """Start a new search in the store of this URL and conduct it to its end.

    submission: the one of the store's queue that asks for it. Raises InputError before anything is
    written when the engine refuses the models or the name is taken, Withdrawn when the submission
    is paused or cancelled by then; Interrupted when `asked_to_stop` turned true; SearchFailed.
    """
    from evomerge.search.loop import conduct
    from evomerge.search.settle import settle
    from evomerge.search.wear import sealed, wear
    from evomerge.store import Coordinator, Store, probe

    probe(url)  # before models are loaded
    executor = setting.executor()
    try:
        setting, notes = settle(setting, executor)
        with (
            Store(url, create=True, tell=watcher.note) as store,
            Coordinator.launch(
                store,
                setting.job.name,
                setting.job.seed,
                setting.document(),
                setting.versions(),
                setting.new_models(),
                setting.new_splits(),
                setting.space.coordinates,
                tell=watcher.note,
                contamination=setting.splits.contamination,
                submission=submission,
            ) as coordinator,
        ):
            if len(store.searches()) == 1:  # of a store they are told once
                for warning in store.warnings:
                    watcher.note(warning)
            for note in notes:
                coordinator.log("settled", note)
                watcher.note(note)
            for note in (setting.splits.contamination or {}).get("notes", ()):
                coordinator.log("contamination", note)
                watcher.note(note)
            for worn in wear(store, sealed(setting.tasks), apart_from=setting.job.name):
                coordinator.log("worn", str(worn))
                watcher.note(str(worn))
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
    """Go on with a search exactly where it was, a failed one too: what failed last is tried again.
    A finished one is left as it is, unless it is allowed more looks.

    overrides: `key=value` for `mode` and keys of the sections `optimizer`, `budget` and `stop`,
    which may change under way until the finals; another optimizer is told what was found so far.
    The `executor` may change at any time: no result depends on it. With more
    `guard.validation_looks`, at any time, further finalists look at validation, and the verdict
    is made anew, post hoc. Raises InputError when a model or a task is no longer what it was at
    launch, and where a limit of the budget is given that is reached already.
    """
    from evomerge.search.changes import LOOKS, changed
    from evomerge.search.looks import content
    from evomerge.search.loop import conduct
    from evomerge.search.setting import Setting, note_changes
    from evomerge.store import Coordinator

    row, where = store.search(name), f"search '{name}'"
    others = [override for override in overrides if override.split("=")[0] != LOOKS]
    steering = [override for override in others if override.split(".")[0] != "executor"]
    job = changed(row.job, overrides, where) if overrides else None
    before = row.job["guard"]["validation_looks"]
    allowed = before if job is None else job.guard.validation_looks
    more = allowed > before
    if row.state == "finished" and steering:
        raise JobError(
            f"{where} is finished, its looks are spent: launch a new one with {' '.join(steering)} "
            "and another name"
        )
    if row.state == "finished" and not more:
        return
    with Coordinator.take_over(store, name, watcher.note) as coordinator:
        if coordinator.search.job != row.job:
            raise SearchBusy(f"{where} was changed by another process just now: resume it again")
        if steering and _deciding(store, row.id):
            raise JobError(
                f"{where} is choosing its winner, and nothing may change any more: resume it "
                f"without {steering[0]}, or launch a new one with it"
            )
        if job is not None:
            _refuse_spent(store, row, job)
        setting = Setting.reopen(coordinator, job)
        if others:
            _ = setting.optimizer()  # refused before it is written down
            text = f"from here on: {', '.join(others)}"
            if steering:
                coordinator.stop(None)  # it may have stopped, and go on under another limit
            coordinator.change({**setting.document(), "guard": row.job["guard"]}, text)
            watcher.note(text)
        if more:
            coordinator.allow_looks(content(setting.tasks.values()), allowed)
            watcher.note(
                f"{allowed} looks at validation from here on, not {before}: what is found by them "
                "is post hoc"
            )
        watcher.note(note_changes(coordinator))
        executor = setting.executor()
        try:
            if row.state == "failed":
                coordinator.reopen()
            conduct(setting, coordinator, executor, watcher, asked_to_stop)
        finally:
            executor.close()


def _refuse_spent(store: "Store", row: "SearchRow", job: "Job") -> None:
    """Raise JobError where a limit is to change to one that is reached already: that would end the
    search for good, which a slip of the hand should not."""
    from evomerge.search.summary import spending

    spent, _ = spending(store, row)
    for key, allowed in job.budget:
        used = spent[key]["used"]
        if allowed is not None and allowed != spent[key]["allowed"] and used >= allowed:
            shown = f"{used:,}" if isinstance(used, int) else f"{used:.3g}"
            raise JobError(
                f"search '{row.name}': budget.{key}: {shown} are spent already: give more, or to "
                f"end it now: evomerge stop {row.name}, then resume it"
            )


def _deciding(store: "Store", search: int) -> bool:
    """Whether the finals of a search have left a trace: a mean to be judged, or the look at the
    best parent, which is their first; from outside of a search only its candidates are looked at.
    """
    final = any(generation.kind == "final" for generation in store.generations(search))
    baselines = {c.id for c in store.candidates(search, generation=0, with_genotypes=False)}
    looks = (r for r in store.ledger() if r.kind == "look" and r.search == search)
    return final or any(look.entry["candidate"] in baselines for look in looks)
