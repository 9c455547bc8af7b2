"""Shares of a cluster: who gets what, and that nothing is given up twice on the way there."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.executor.shares import Claim, Node, Places, allot, room, taken, without

DEMANDS: list[dict[str, float]] = [
    {"CPU": 1},
    {"CPU": 0.5},
    {"CPU": 1, "GPU": 1},
    {"CPU": 1, "GPU": 2},
    {"GPU": 0.5},
    {"CPU": 1, "tape": 1},
]
nodes = st.lists(
    st.builds(
        lambda cpus, gpus, tapes: {"CPU": float(cpus), "GPU": float(gpus), "tape": float(tapes)},
        st.integers(0, 6),
        st.sampled_from([0, 0, 1, 2, 4]),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=4,
).map(lambda all: [Node(f"node {i}", has) for i, has in enumerate(all)])
claims = st.lists(
    st.tuples(
        st.integers(-1, 1), st.sampled_from(DEMANDS), st.one_of(st.none(), st.integers(1, 5))
    ),
    min_size=1,
    max_size=4,
).map(
    lambda all: [
        Claim(f"search {i}", priority, i, demand, workers)
        for i, (priority, demand, workers) in enumerate(all)
    ]
)


def counts(shares: Mapping[str, Places]) -> dict[str, int]:
    """How many workers each search may have."""
    return {name: sum(places.values()) for name, places in shares.items()}


def left(
    nodes: Sequence[Node], claims: Sequence[Claim], shares: Mapping[str, Places]
) -> list[Node]:
    """What the workers of these searches leave of nodes."""
    rest = {node.name: dict(node.has) for node in nodes}
    for claim in claims:
        for node, count in shares[claim.name].items():
            for kind, amount in claim.demand.items():
                rest[node][kind] -= count * amount
    return [Node(name, has) for name, has in rest.items()]


def of(*searches: Claim, on: Sequence[Node]) -> dict[str, int]:
    """How many workers each of them may have, by name."""
    return counts(allot(on, searches))


def test_what_is_neither_free_nor_held_by_searches_is_taken() -> None:
    one = Claim("one", 0, 0, {"CPU": 0.1, "GPU": 1}, None, held=("a", "a", "a", "b"))
    other = Claim("other", 0, 1, {"CPU": 2}, None, held=("b",))
    nodes = [Node(name, {"CPU": 8, "GPU": 4}) for name in "abc"]
    free = {"a": {"CPU": 7.7}, "b": {"CPU": 5.9, "GPU": 3, "tape": 1}}
    assert taken(nodes, free, [one, other]) == {"a": {"GPU": 1}, "b": {}}


def test_what_is_given_back_before_it_is_known_of_is_nobodys() -> None:
    one = Claim("one", 0, 0, {"GPU": 1}, None, held=("a", "a"))
    assert taken([Node("a", {"GPU": 4})], {"a": {"GPU": 4}}, [one]) == {"a": {}}


def test_what_was_taken_in_every_look_is_not_shared() -> None:
    nodes = gpus(4, 4)
    looks = [{"0": {"GPU": 3}, "1": {"GPU": 2}}, {"0": {"GPU": 2, "CPU": 1}}]
    assert without(nodes, looks) == [Node("0", {"CPU": 8, "GPU": 2}), nodes[1]]
    assert without(nodes, []) == nodes


@given(nodes, claims, st.floats(0, 1))
@settings(derandomize=True, deadline=None)
def test_who_has_what_it_may_have_keeps_it_beside_strangers(
    nodes: list[Node], claims: list[Claim], part: float
) -> None:
    strange = {node.name: {kind: part * n for kind, n in node.has.items()} for node in nodes}
    there = without(nodes, [strange])
    shares = allot(there, claims)
    held = [replace(c, held=tuple(Counter(shares[c.name]).elements())) for c in claims]
    free = {node.name: node.has for node in left(there, claims, shares)}
    again = without(nodes, [taken(nodes, free, held)])
    assert allot(again, held) == shares


def search(name: str, gpus: float = 1, priority: int = 0, workers: int | None = None) -> Claim:
    """Searches came in the order of their names."""
    return Claim(name, priority, ord(name), {"GPU": gpus}, workers)


def gpus(*each: int) -> list[Node]:
    """Nodes with so many GPUs."""
    return [Node(str(i), {"CPU": 8, "GPU": n}) for i, n in enumerate(each)]


@given(nodes, claims)
@settings(derandomize=True, deadline=None)
def test_what_is_given_fits_and_nobody_waits_for_nothing(
    nodes: list[Node], claims: list[Claim]
) -> None:
    shares = allot(nodes, claims)
    rest = left(nodes, claims, shares)
    assert all(amount >= 0 for node in rest for amount in node.has.values())
    for claim in claims:
        count = counts(shares)[claim.name]
        if claim.workers is not None:
            assert count <= claim.workers
        if count != claim.workers:
            assert room(rest, claim) == 0


@given(nodes, claims)
@settings(derandomize=True, deadline=None)
def test_a_lower_priority_changes_nothing_for_a_higher_one(
    nodes: list[Node], claims: list[Claim]
) -> None:
    found = of(*claims, on=nodes)
    for least in (0, 1):
        higher = [claim for claim in claims if claim.priority >= least]
        alone = of(*higher, on=nodes)
        assert alone == {name: found[name] for name in alone}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 6))
@settings(derandomize=True, deadline=None)
def test_equal_searches_share_equally_and_who_came_first_has_the_odd_one(
    each: list[int], searches: int
) -> None:
    found = list(of(*(search("abcdef"[i]) for i in range(searches)), on=gpus(*each)).values())
    assert sum(found) == sum(each)
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


@given(nodes, claims)
@settings(derandomize=True, deadline=None)
def test_who_has_none_was_not_passed_over_for_anybodys_second_worker(
    nodes: list[Node], claims: list[Claim]
) -> None:
    found = of(*claims, on=nodes)
    for claim in claims:
        if found[claim.name]:
            continue
        modest = [
            replace(other, workers=1)
            if other.priority == claim.priority and other is not claim
            else other
            for other in claims
            if other.priority >= claim.priority
        ]
        assert of(*modest, on=nodes)[claim.name] == 0


def test_a_place_that_is_of_no_use_is_made_up_for_elsewhere() -> None:
    broken = {"0": 1, "gone": 3}
    two = replace(search("a", workers=2), broken=broken)
    assert allot(gpus(4, 4), [two])["a"] == {"1": 2}
    assert of(replace(search("a"), broken=broken), search("b"), on=gpus(2, 2)) == {"a": 2, "b": 2}
    assert room(gpus(2), replace(two, broken={"0": 9})) == 0


class Searches:
    """Executors that hear of their shares one at a time, and workers that end when they like."""

    def __init__(self, nodes: list[Node], claims: list[Claim], chance: random.Random) -> None:
        self.nodes, self.claims, self.chance = nodes, claims, chance
        self.held = {claim.name: list(claim.held) for claim in claims}
        self.new = {claim.name: Counter[str]() for claim in claims}  # started since then
        self.ended = 0

    def shares(self) -> dict[str, Places]:
        return allot(self.nodes, self.known())

    def known(self) -> list[Claim]:
        return [replace(claim, held=tuple(self.held[claim.name])) for claim in self.claims]

    def hear(self, claim: Claim) -> None:
        """One of them is told its share, and does some of what follows from it."""
        share, held = Counter(self.shares()[claim.name]), Counter(self.held[claim.name])
        for node in (held - share).elements():
            if self.chance.random() < 0.5:
                self.held[claim.name].remove(node)
                self.ended += 1
                assert self.new[claim.name][node] <= self.held[claim.name].count(node)
        for node in (share - held).elements():
            free = left(self.nodes, self.claims, {n: Counter(h) for n, h in self.held.items()})
            there = [n for n in free if n.name == node]
            few = claim.workers is None or len(self.held[claim.name]) < claim.workers
            if few and room(there, replace(claim, workers=1)) and self.chance.random() < 0.7:
                self.held[claim.name].append(node)
                self.new[claim.name][node] += 1

    def settle(self) -> None:
        """Until everybody has what it may have."""
        for _ in range(200):
            for claim in self.chance.sample(self.claims, len(self.claims)):
                self.hear(claim)
            shares = self.shares()
            if all(Counter(self.held[name]) == Counter(share) for name, share in shares.items()):
                return
        raise AssertionError("they do not come to an end")


@pytest.mark.slow
@given(nodes, claims, claims, st.integers(0, 2**32))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_everybody_gets_there_and_nobody_gives_up_what_was_just_begun(
    nodes: list[Node], first: list[Claim], second: list[Claim], seed: int
) -> None:
    chance = random.Random(seed)
    searches = Searches(nodes, first, chance)
    searches.settle()
    stayed = searches.known()[: len(first) // 2 + 1]
    come = [replace(claim, name=f"new {claim.name}", since=99 + claim.since) for claim in second]
    searches = Searches(nodes, stayed + come, chance)
    searches.settle()
    before = {name: list(held) for name, held in searches.held.items()}
    for claim in searches.claims:
        searches.hear(claim)
    assert searches.held == before
