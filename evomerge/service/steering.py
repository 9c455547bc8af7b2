"""What people may have done: searches submitted and steered, winners exported and pushed.

The API and the pages come through here, so that whatever either is asked for is checked, written
down in the audit log and done once. Whether somebody has the scope for a route is decided before;
here only what depends on what is asked for. Everything here blocks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request

from evomerge.errors import NotFound, StoreError
from evomerge.search.changes import changed
from evomerge.service import access, confine, exports, webhook
from evomerge.service.access import Principal, Refused
from evomerge.service.context import Context
from evomerge.service.idempotency import of_queue
from evomerge.service.overview import Standing, standing
from evomerge.service.problems import Busy
from evomerge.store import CandidateRow, Submission
from evomerge.store.queue import Kind

T = TypeVar("T")

_WAITING = 1000  # submissions in the queue; more are a mistake, or a nuisance to all others
_TOLD = ("candidate", "recipe_only", "repository", "private")  # of a document, to the audit log


@dataclass(frozen=True)
class Asker:
    """A request that may have something done. key: its idempotency key."""

    here: Context
    request: Request
    who: Principal
    key: str | None = None

    @property
    def is_admin(self) -> bool:
        """Whether what is left to few may be asked for."""
        return "admin" in self.who.scopes


def submit(
    asker: Asker, document: Mapping[str, Any] | str, priority: int = 0, hook: str | None = None
) -> Submission:
    """Put a search into the queue; hook: its webhook. Raises InputError for a job that cannot be,
    NameTaken, KeyReused."""

    def act() -> Submission:
        if hook is not None:
            webhook.check(hook, asker.here.settings.webhook_hosts)
        job = confine.submitted(document, asker.here.settings.roots, is_admin=asker.is_admin)
        return _submitted(asker, "search", job.name, job.document(), priority, hook)

    return _once(asker, ("submit", document, priority, hook), act)


def cancel(asker: Asker, search: str) -> Submission:
    """Take a search out of the queue that has not begun. Raises StoreError for any other."""
    one = asker.here.queue.cancel(search)
    _done(asker, "cancel", search, submission=one.id)
    return one


def cancel_export(asker: Asker, search: str, id: int) -> Submission:
    """Take an export or a push out of the queue, or have it leave what it is at. Raises NotFound;
    StoreError for one that has ended."""
    asked = exports.export(asker.here.queue, search, id).submission
    if asked.state not in ("queued", "running", "cancelled"):
        raise StoreError(f"{asked.kind} {id} of search '{search}' is {asked.state}: too late")
    one = asker.here.queue.change(id, state="cancelled")
    _done(asker, f"cancel {one.kind}", search, submission=one.id)
    return one


def prioritize(asker: Asker, search: str, priority: int) -> Submission:
    """Have a search go before those of a lower priority, and after those of a higher one, whenever
    it waits. Raises NotFound; StoreError for one that has ended."""
    one = asker.here.queue.prioritize(search, priority)
    _done(asker, "prioritize", search, submission=one.id, priority=priority)
    return one


def pause(asker: Asker, search: str) -> Standing:
    """See Queue.pause."""

    def act() -> Standing:
        asker.here.queue.pause(search, asker.who.name)
        return _steered(asker, "pause", search)

    return _once(asker, ("pause", search), act)


def stop(asker: Asker, search: str) -> Standing:
    """See Queue.stop."""

    def act() -> Standing:
        asker.here.queue.stop(search, asker.who.name)
        return _steered(asker, "stop", search)

    return _once(asker, ("stop", search), act)


def resume(asker: Asker, search: str, overrides: Sequence[str] = ()) -> Standing:
    """See Queue.resume. Raises JobError for overrides that cannot be."""

    def act() -> Standing:
        _check_overrides(asker, search, overrides)
        asker.here.queue.resume(search, asker.who.name, overrides)
        return _steered(asker, "resume", search, overrides=list(overrides))

    return _once(asker, ("resume", search, *overrides), act)


def extend(asker: Asker, search: str, overrides: Sequence[str]) -> Standing:
    """See Queue.extend; of a search that goes on under these limits, nothing changes. Raises
    JobError for overrides that cannot be."""

    def act() -> Standing:
        _check_overrides(asker, search, overrides)
        if _is_under(asker.here, search, overrides):
            return standing(asker.here.store, search)
        asker.here.queue.extend(search, asker.who.name, overrides)
        return _steered(asker, "extend", search, overrides=list(overrides))

    return _once(asker, ("extend", search, *overrides), act)


def export(
    asker: Asker, search: str, candidate: int | None, recipe_only: bool, unseal: bool
) -> Submission:
    """Have a candidate, by default the winner, exported to a folder of its own.

    The whole model is read on the sealed test split, unless it was before: that has to be asked for
    by `unseal`, and allowed by the scope of that name. Raises Refused, NotFound, StoreError for
    what cannot be exported, KeyReused.
    """

    def act() -> Submission:
        chosen = _chosen(asker.here, search, candidate)
        if not recipe_only and asker.here.store.report(chosen.id) is None:
            _check_unsealing(asker, unseal)
        # The engine says how many devices it takes.
        document = {
            "candidate": chosen.id,
            "recipe_only": recipe_only,
            "engine": asker.here.store.search(search).job["engine"],
        }
        return _submitted(asker, "export", search, document)

    return _once(asker, ("export", search, candidate, recipe_only, unseal), act)


def push(
    asker: Asker, search: str, candidate: int | None, repository: str, private: bool
) -> Submission:
    """Have what was exported uploaded to a repository of the hub, after exports that wait. Raises
    NotFound, StoreError, KeyReused."""

    def act() -> Submission:
        chosen = _chosen(asker.here, search, candidate)
        document = {"candidate": chosen.id, "repository": repository, "private": private}
        return _submitted(asker, "push", search, document)

    return _once(asker, ("push", search, candidate, repository, private), act)


def _submitted(
    asker: Asker,
    kind: Kind,
    search: str,
    document: Mapping[str, Any],
    priority: int = 0,
    hook: str | None = None,
) -> Submission:
    """Into the queue, which remembers keys for longer than this process lives."""
    if len(asker.here.queue.places()) >= _WAITING:
        raise Busy(f"{_WAITING:,} submissions wait in the queue: try again when fewer do")
    one = asker.here.queue.submit(
        kind,
        search,
        document,
        by=asker.who.name,
        priority=priority,
        webhook=hook,
        key=of_queue(asker.who.name, asker.key),
    )
    told = {key: document[key] for key in _TOLD if key in document}
    _done(asker, "submit" if kind == "search" else kind, search, submission=one.id, **told)
    return one


def _check_unsealing(asker: Asker, unseal: bool) -> None:
    if "unseal" not in asker.who.scopes:
        access.refuse(asker.request, "unseal")
        raise Refused(
            403,
            "forbidden",
            f"'{asker.who.name}' lacks the scope 'unseal', and this export would open the sealed "
            "test split: use a token that has it, or export the recipe alone",
        )
    if not unseal:
        raise StoreError(
            "this export would open the sealed test split, once and for all: say so with unseal: "
            "true, or export the recipe alone"
        )


def _once(asker: Asker, asked: object, act: Callable[[], T]) -> T:
    return asker.here.answers.once(asker.who.name, asker.key, asked, act)


def _steered(asker: Asker, action: str, search: str, **detail: Any) -> Standing:
    _done(asker, action, search, **detail)
    return standing(asker.here.store, search)


def _done(asker: Asker, action: str, search: str, **detail: Any) -> None:
    access.audit(asker.request, action, search, **detail)
    asker.here.scheduler.wake()


def _check_overrides(asker: Asker, search: str, overrides: Sequence[str]) -> None:
    """Now, while somebody can be told; where the search goes on they are checked again."""
    if not overrides:
        return
    confine.overrides(overrides, is_admin=asker.is_admin)
    try:
        job = asker.here.store.search(search).job
    except NotFound:
        if asker.here.queue.of(search) is None:
            raise
        raise StoreError(
            f"search '{search}' has not begun: cancel it and submit it with other keys instead"
        ) from None
    changed(job, overrides, f"search '{search}'")


def _is_under(here: Context, search: str, overrides: Sequence[str]) -> bool:
    """Whether a search goes on with these overrides as it is."""
    job, one = here.store.search(search).job, here.queue.of(search)
    if one is None or one.state not in ("queued", "running") or one.overrides:
        return False
    return changed(job, overrides, f"search '{search}'").document() == job


def _chosen(here: Context, search: str, candidate: int | None) -> CandidateRow:
    """What is to be exported: by default the winner."""
    row = here.store.search(search)
    if candidate is None:
        if row.verdict is None:
            raise StoreError(
                f"search '{search}' has no winner yet: wait for it, or name a candidate"
            )
        candidate = int(row.verdict["winner"])
    for found in here.store.candidates(row.id, ids=[candidate], with_genotypes=False):
        if found.state == "scored":
            return found
        raise StoreError(f"candidate {candidate} is {found.state}: take another")
    raise NotFound(f"search '{search}' has no candidate {candidate}")
