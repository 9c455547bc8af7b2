"""What a pool knows of each of its actors, and of what came to no end there."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from evomerge.executor import Request
from evomerge.executor.account import Account
from evomerge.executor.actor import Place


@dataclass(frozen=True)
class Loss:
    """An evaluation that came to no end.

    cause: its worker died, hung or broke, and had been of use before ("worker") or not
    ("unproven"); its device has too little memory; its node was lost; the worker was dead before it
    began, or may have been ("nobody"). seconds: from when it was sent.
    """

    cause: Literal["worker", "unproven", "memory", "node", "nobody"]
    reason: str
    seconds: float


@dataclass(eq=False)
class Slot:
    """A place in the pool, and what its actor is doing.

    doing: waiting, without an actor, for a node on which the share has a place for it; placing: its
    actor waits for room on the node. told: what comes of what the actor was told. begun: Ray's
    reference to its beginning, where it is an evaluation and the actor had not just answered.
    request: that it was sent last. since, rested: when it was told, when it came to rest last; on
    the monotonic clock. place, account: None until the actor has a place; account: of the device
    that it holds there. node: Ray's id of it, None where it waits. leaving: it ends when its
    evaluation does. merges_ahead: see Worker. landed: whether anything was evaluated at this place.
    troubles: what has come to nothing there since: requests, each counted once, and beginnings.
    """

    actor: Any = None
    doing: Literal["waiting", "placing", "opening", "idle", "evaluating"] = "waiting"
    told: Future[Any] | None = None
    begun: Any = None
    request: Request | None = None
    since: float = 0.0
    rested: float = 0.0
    place: Place | None = None
    account: Account | None = None
    node: str | None = None
    leaving: bool = False
    merges_ahead: bool = False
    landed: bool = False
    troubles: set[object] = field(default_factory=set)

    @property
    def host(self) -> str:
        """For people: where it is."""
        return f"node '{self.place.host}'" if self.place else "an unknown node"

    @property
    def is_open(self) -> bool:
        """Whether it has a worker, or will once its models are open."""
        return self.place is not None

    @property
    def is_proven(self) -> bool:
        """Whether the last that was evaluated there came to its end."""
        return self.landed and not self.troubles

    @property
    def is_sound(self) -> bool:
        """Whether it may be of use."""
        return self.is_open and (self.landed or not self.troubles)
