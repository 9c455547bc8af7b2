"""Failures are grouped by what has caused them."""

from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.fitness.results import Failed
from evomerge.report.failures import alike, failures
from evomerge.store import Coordinator, NewCandidate, Store
from tests.running import query, url


def test_every_failed_candidate_is_counted_once(raced: Path) -> None:
    with Store(url(raced)) as store:
        (found,) = failures(store, "tiny")
    rows = query(raced, "SELECT id FROM candidate WHERE state = 'failed' ORDER BY id")
    assert (found.kind, found.cause, found.count) == ("failed", "the dice say so", len(rows))
    assert found.candidates == tuple(id for (id,) in rows[:5])
    assert found.first_at <= found.last_at


def test_infeasible_genotypes_are_failures_of_their_own(stacked: Path) -> None:
    with Store(url(stacked)) as store:
        found = failures(store, "tiny")
    for kind in ("failed", "infeasible"):
        sql = f"SELECT COUNT(*) FROM candidate WHERE state = '{kind}'"
        assert sum(one.count for one in found if one.kind == kind) == query(stacked, sql)[0][0]


def test_causes_that_differ_by_numbers_and_names_alone_are_one(tmp_path: Path) -> None:
    reasons = [
        "tensor 'model.layers.3.q': 17 values are not finite",
        "tensor 'model.layers.11.k': 2,048 values are not finite",
        "out of memory: 3.5 GB are missing",
        "tensor 'lm_head': 1 values are not finite",
    ]
    job = {"parents": {}, "tasks": [], "budget": {}, "objective": "mean"}
    with (
        Store(url(tmp_path / "store.db"), create=True) as store,
        Coordinator.launch(store, "tiny", 0, job, {}, [], []) as held,
    ):
        new = [NewCandidate(i, None, np.zeros(1), {}, str(i)) for i in range(4)]
        new.append(NewCandidate(4, None, np.zeros(1), None, None, "10 layers are too many"))
        new.append(NewCandidate(5, None, np.zeros(1), None, None, "12 layers are too many"))
        ids = held.open_generation(1, "proposed", 0.1, new)
        for id, reason in zip(ids, reasons, strict=False):
            held.record(id, "train", 0, Failed(reason))
        held.close_generation(1, {}, None)
        found = failures(store, "tiny")
    assert [(one.kind, one.cause, one.count, one.candidates) for one in found] == [
        ("failed", reasons[0], 3, (ids[0], ids[1], ids[3])),
        ("infeasible", "10 layers are too many", 2, (ids[4], ids[5])),
        ("failed", reasons[2], 1, (ids[2],)),
    ]


@settings(derandomize=True, deadline=None)
@given(st.floats(0, 1e9), st.integers(0, 10**9), st.text(st.characters(exclude_characters="'")))
def test_numbers_and_names_say_nothing_of_a_cause(value: float, count: int, name: str) -> None:
    text = "layer '{}': {} of {:,} values: nothing left of h2o"
    assert alike(text.format(name, value, count)) == alike(text.format("x", 1, 2))


def test_words_do(raced: Path) -> None:
    assert alike("out of memory") != alike("out of luck")
    assert alike("h2o") != alike("h3o")


def test_stores_of_earlier_versions_have_failures(old: Path) -> None:
    with Store(url(old)) as store:
        (one,) = failures(store, "finished")
        assert (one.count, one.cause) == (1, "logits that are not finite")
        assert failures(store, "stopped") == ()
        assert failures(store, "failed")[0].count > 1
