"""What each of several searches may have of one cluster: how many workers, and on which nodes.

A rule on frozen values: how many a search may have follows from who is there and what they ask for,
not from what was before, so nothing is given up unless something has changed. What it has decides
which of its workers stay where they are. Knows nothing of Ray, nor of how searches are heard.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_PARTS = 10_000  # of a resource, the finest that Ray counts

Amounts = Mapping[str, float]  # of resources, by Ray's names
Places = Mapping[str, int]  # workers, by node


@dataclass(frozen=True)
class Node:
    """What a node has for workers, with what they have taken of it."""

    name: str
    has: Amounts


@dataclass(frozen=True)
class Claim:
    """A search that has workers or wants some.

    priority: the higher goes first. since: when it came, in seconds. demand: of each worker, not
    empty unless `workers` is a number. workers: at most; None for as many as there is room for.
    held: the node of each worker that has a place. broken: a node for each place on which its
    workers do not start.
    """

    name: str
    priority: int
    since: float
    demand: Amounts
    workers: int | None
    held: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()


def allot(nodes: Sequence[Node], claims: Sequence[Claim]) -> dict[str, Places]:
    """The share of each search, by its name.

    A lower priority has what the higher ones leave. Among equal ones each worker in turn is for
    whoever has the smallest dominant share (Ghodsi et al., Dominant Resource Fairness, NSDI 2011,
    algorithm 1), that of the resource of which it has the largest part; where these are equal, for
    whoever came first. Nobody is kept from room that is of no use to those before.
    """
    packed = _packed(nodes, claims)
    return _spread(nodes, claims, packed) or packed


def room(nodes: Sequence[Node], claim: Claim) -> int:
    """How many workers a search could have if there were no others."""
    return sum(_packed(nodes, [claim])[claim.name].values())


class _Room:
    """What is left of nodes, in whole parts."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.left = {
            node.name: {kind: _parts(amount) for kind, amount in node.has.items() if amount}
            for node in nodes
        }
        self.all = Counter[str]()
        for parts in self.left.values():
            self.all.update(parts)


def _parts(amount: float) -> int:
    return round(_PARTS * amount)


@dataclass
class _Taker:
    """A search while it is given workers. most: on nodes where not all of the room is of use."""

    claim: Claim
    room: _Room
    placed: Counter[str] = field(default_factory=Counter)
    count: int = 0

    def __post_init__(self) -> None:
        demand = self.claim.demand.items()
        self.demand = {kind: max(1, _parts(amount)) for kind, amount in demand}
        whole = self.room.all
        parts = [part / whole[kind] for kind, part in self.demand.items() if whole[kind]]
        self.weight = max(parts, default=0.0)  # the dominant share of one worker
        broken = Counter(self.claim.broken)
        self.most = {
            node: max(0, self.holds(node) - count)
            for node, count in broken.items()
            if node in self.room.left
        }

    def rank(self) -> tuple[int, float, float, str]:
        """Who goes first is the smallest."""
        claim = self.claim
        return (-claim.priority, self.count * self.weight, claim.since, claim.name)

    def holds(self, node: str) -> int:
        """How many more a node could hold; of those that ask for nothing a great many."""
        left = self.room.left[node]
        return min(
            (left.get(kind, 0) // part for kind, part in self.demand.items()), default=_PARTS
        )

    def wasted(self, node: str) -> float:
        """How much of the cluster is on a node that these workers have no use for."""
        left, whole = self.room.left[node], self.room.all
        return sum(part / whole[kind] for kind, part in left.items() if kind not in self.demand)

    def fits(self, node: str) -> bool:
        """Whether there is room on a node for one more that is of use."""
        if node not in self.room.left or self.placed[node] >= self.most.get(node, _PARTS):
            return False
        return self.holds(node) > 0

    def take(self, node: str) -> None:
        """One more on this node."""
        self.placed[node] += 1
        self.count += 1
        left = self.room.left[node]
        for kind, part in self.demand.items():
            left[kind] -= part

    def pack(self) -> bool:
        """One more where it is least in the way: of nodes without what it has no use for, the
        fullest. Gives whether there was room."""
        fitting = [node for node in self.room.left if self.fits(node)]
        if fitting:
            self.take(min(fitting, key=lambda node: (self.wasted(node), self.holds(node))))
        return bool(fitting)

    def spread(self, count: int, evenly: Sequence[str]) -> bool:
        """So many in all, the rest evenly. Gives whether there was room."""
        seen = Counter[str]()
        for node in evenly:
            if self.count == count:
                break
            seen[node] += 1
            if seen[node] > self.placed[node] and self.fits(node):
                self.take(node)
        return self.count == count

    def evenly(self, count: int) -> list[str]:
        """The nodes in the order in which so many workers fill them evenly, while they are empty;
        those with what they have no use for last."""
        order = []
        for i, node in enumerate(self.room.left):
            most = min(self.holds(node), count)
            order += [(self.wasted(node), k / most, i, node) for k in range(1, most + 1)]
        return [node for *_, node in sorted(order)]

    @property
    def has_all(self) -> bool:
        """Whether it wants no more."""
        return self.claim.workers is not None and self.count >= self.claim.workers


def _packed(nodes: Sequence[Node], claims: Sequence[Claim]) -> dict[str, Places]:
    """Shares on as few nodes as may be, so that there is room for large workers."""
    whole = _Room(nodes)
    takers = [_Taker(claim, whole) for claim in claims]
    left = list(takers)
    while left:
        taker = min(left, key=_Taker.rank)
        if taker.has_all or not taker.pack():
            left.remove(taker)
    return {taker.claim.name: taker.placed for taker in takers}


def _spread(
    nodes: Sequence[Node], claims: Sequence[Claim], packed: Mapping[str, Places]
) -> dict[str, Places] | None:
    """As many workers for each, where they are already as far as possible, the rest evenly. None
    where that leaves no room for one of them.

    It stays the same while it is put into practice: what is done of it already is kept, and the
    rest is tried in an order that does not depend on that.
    """
    whole = _Room(nodes)
    takers = sorted((_Taker(claim, whole) for claim in claims), key=_Taker.rank)
    wanted = {name: sum(places.values()) for name, places in packed.items()}
    orders = [taker.evenly(wanted[taker.claim.name]) for taker in takers]
    held = {claim.name: Counter(claim.held) for claim in claims}
    for taker in takers:
        name = taker.claim.name
        for node in (held[name] & Counter(packed[name])).elements():
            taker.take(node)
    for taker in takers:
        name = taker.claim.name
        for node in (held[name] - Counter(packed[name])).elements():
            if taker.count < wanted[name] and taker.fits(node):
                taker.take(node)
    for taker, order in zip(takers, orders, strict=True):
        if not taker.spread(wanted[taker.claim.name], order):
            return None
    return {taker.claim.name: taker.placed for taker in takers}
