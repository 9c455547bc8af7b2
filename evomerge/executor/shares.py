"""What each of several searches may have of one cluster: how many workers, and on which nodes.

A rule on frozen values: how many a search may have follows from who is there and what they ask for,
not from what was before, so nothing is given up unless something has changed. What it has decides
which of its workers stay where they are. Knows nothing of Ray, nor of how searches are heard.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace

_PARTS = 10_000  # of a resource, the finest that Ray counts
_MANY = 10_000  # workers that ask for nothing, on a node

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
    held: the node of each worker that has a place. broken: how many places for a worker are of no
    use to it, by node.
    """

    name: str
    priority: int
    since: float
    demand: Amounts
    workers: int | None
    held: tuple[str, ...] = ()
    broken: Mapping[str, int] = field(default_factory=dict)


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


def taken(
    nodes: Sequence[Node], free: Mapping[str, Amounts], claims: Sequence[Claim]
) -> dict[str, Amounts]:
    """What others than these searches' workers have of nodes that are known to be all there is.
    free: what nobody has, by node; nothing is known of one that is not there."""
    known: dict[str, Counter[str]] = {node.name: Counter() for node in nodes if node.name in free}
    for claim in claims:
        demand = _parted(claim.demand)
        for name, count in Counter(claim.held).items():
            if name in known:
                known[name].update({kind: count * part for kind, part in demand.items()})
    found: dict[str, Amounts] = {}
    for node in nodes:
        if node.name not in known:
            continue
        rest = Counter(_parted(node.has))
        rest.subtract(_parted(free[node.name]))
        rest.subtract(known[node.name])
        found[node.name] = {kind: part / _PARTS for kind, part in rest.items() if part > 0}
    return found


def without(nodes: Sequence[Node], looks: Sequence[Mapping[str, Amounts]]) -> list[Node]:
    """Nodes without what was taken of them in each of these looks; the same where there is none."""
    return [
        Node(
            node.name,
            {
                kind: amount
                - min((look.get(node.name, {}).get(kind, 0) for look in looks), default=0)
                for kind, amount in node.has.items()
            },
        )
        for node in nodes
    ]


_Left = tuple[int, ...]  # of a node, in parts, by the order of the kinds of resources


class _Room:
    """What is left of nodes, in whole parts. alike: the nodes of which the same is left, in their
    order, by what that is: there are few kinds of them, however many nodes there are."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        has = [_parted(node.has) for node in nodes]
        self.kinds = sorted({kind for parts in has for kind in parts})
        self.nodes = [node.name for node in nodes]
        self.index = {name: i for i, name in enumerate(self.nodes)}
        self.left: list[_Left] = [tuple(parts.get(k, 0) for k in self.kinds) for parts in has]
        self.all: _Left = tuple(map(sum, zip(*self.left, strict=True)))
        self.alike: dict[_Left, list[int]] = {}
        for i, left in enumerate(self.left):
            self.alike.setdefault(left, []).append(i)

    def take(self, i: int, parts: _Left) -> None:
        """So much of a node."""
        before = self.left[i]
        after = tuple(left - part for left, part in zip(before, parts, strict=True))
        self.left[i] = after
        there = self.alike[before]
        del there[bisect_left(there, i)]
        if not there:
            del self.alike[before]
        insort(self.alike.setdefault(after, []), i)


def _parted(amounts: Amounts) -> dict[str, int]:
    return {kind: round(_PARTS * amount) for kind, amount in amounts.items()}


class _Taker:
    """A search while it is given workers. Nodes are numbers here, by their order in the room."""

    def __init__(self, claim: Claim, room: _Room) -> None:
        self.claim = claim
        self.room = room
        self.count = 0
        self._placed = Counter[int]()
        demand = {kind: max(1, part) for kind, part in _parted(claim.demand).items()}
        self._had = demand.keys() <= {*room.kinds}  # everything that is asked for, by anybody
        self._parts: _Left = tuple(demand.get(kind, 0) for kind in room.kinds)
        self._weighed: dict[_Left, tuple[float, int]] = {}
        parts = [part / all for part, all in zip(self._parts, room.all, strict=True) if all]
        self._dominant = max(parts, default=0.0)  # the dominant share of one worker
        # On nodes where not all of the room is of use, the most that is.
        self._most = {
            room.index[node]: max(0, self._holds(room.index[node]) - count)
            for node, count in claim.broken.items()
            if node in room.index
        }

    @property
    def places(self) -> Places:
        """What it was given."""
        return {self.room.nodes[i]: count for i, count in self._placed.items()}

    @property
    def has_all(self) -> bool:
        """Whether it wants no more."""
        return self.claim.workers is not None and self.count >= self.claim.workers

    def rank(self) -> tuple[int, float, float, str]:
        """Who goes first is the smallest."""
        claim = self.claim
        return (-claim.priority, self.count * self._dominant, claim.since, claim.name)

    def pack(self) -> bool:
        """One more where it is least in the way: of nodes without what it has no use for, the
        fullest. Gives whether there was room."""
        found: tuple[tuple[float, int], int] | None = None
        for left, nodes in self.room.alike.items():
            weight = self._weight(left)
            if not weight[1] or (found and weight > found[0]):
                continue
            first = next((i for i in nodes if self._is_useful(i)), None)
            if first is not None and (found is None or (weight, first) < found):
                found = weight, first
        if found is None:
            return False
        self._take(found[1])
        return True

    def keep(self, count: int, nodes: Iterable[str]) -> None:
        """Workers that are there already, where there is room for them, so many in all at most."""
        for node in nodes:
            i = self.room.index.get(node)
            if i is not None and self.count < count and self._fits(i):
                self._take(i)

    def spread(self, count: int, evenly: Sequence[int]) -> bool:
        """So many in all, the rest evenly. Gives whether there was room."""
        seen = Counter[int]()
        for i in evenly:
            if self.count == count:
                break
            seen[i] += 1
            if seen[i] > self._placed[i] and self._fits(i):
                self._take(i)
        return self.count == count

    def evenly(self, count: int) -> list[int]:
        """The nodes in the order in which so many workers fill them evenly, while they are empty;
        those with what they have no use for last, and after them those that are broken in part."""
        order = []
        for i, left in enumerate(self.room.left):
            wasted, holds = self._weight(left)
            most = min(holds, count)
            first = i in self._most, wasted
            order += [(*first, k / most, i) for k in range(1, most + 1)]
        return [i for *_, i in sorted(order)]

    def _weight(self, left: _Left) -> tuple[float, int]:
        """Of a node of which so much is left: how much of the cluster is there that these workers
        have no use for, and how many more it could hold; of those that ask for nothing a great
        many."""
        found = self._weighed.get(left)
        if found is None:
            whole = zip(left, self._parts, self.room.all, strict=True)
            wasted = sum(have / all for have, part, all in whole if have and not part)
            each = [have // part for have, part in zip(left, self._parts, strict=True) if part]
            found = wasted, min(each, default=_MANY) if self._had else 0
            self._weighed[left] = found
        return found

    def _holds(self, i: int) -> int:
        return self._weight(self.room.left[i])[1]

    def _is_useful(self, i: int) -> bool:
        """Whether one more there would not be on a broken place."""
        return i not in self._most or self._placed[i] < self._most[i]

    def _fits(self, i: int) -> bool:
        return self._is_useful(i) and self._holds(i) > 0

    def _take(self, i: int) -> None:
        self._placed[i] += 1
        self.count += 1
        self.room.take(i, self._parts)


def _packed(nodes: Sequence[Node], claims: Sequence[Claim]) -> dict[str, Places]:
    """Shares on as few nodes as may be, so that there is room for large workers."""
    whole = _Room(nodes)
    takers = [_Taker(claim, whole) for claim in claims]
    turns = [(taker.rank(), taker) for taker in takers]  # no two ranks are equal
    heapify(turns)
    while turns:
        _, taker = turns[0]
        if taker.has_all or not taker.pack():
            heappop(turns)
        else:
            heapreplace(turns, (taker.rank(), taker))
    return {taker.claim.name: taker.places for taker in takers}


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
        taker.keep(wanted[name], (held[name] & Counter(packed[name])).elements())
    for taker in takers:
        name = taker.claim.name
        taker.keep(wanted[name], (held[name] - Counter(packed[name])).elements())
    for taker, order in zip(takers, orders, strict=True):
        if not taker.spread(wanted[taker.claim.name], order):
            return None
    return {taker.claim.name: taker.places for taker in takers}
