"""Pages of candidates are whole and stay put; fronts, leads and important coordinates are right."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from evomerge.errors import InputError
from evomerge.optimizer.importance import ped_anova
from evomerge.report.candidate import candidate
from evomerge.report.failures import failures
from evomerge.report.history import history
from evomerge.report.population import (
    SORTS,
    Member,
    front,
    importance,
    lineage,
    population,
)
from evomerge.search import summary
from evomerge.seeds import generator
from evomerge.store import Coordinator, NewCandidate, NewSplit, Store, Sums, copy
from tests.running import query, url
from tests.store.test_reading import COORDINATES, proposal, scored

JOB = {"parents": {}, "tasks": [{"task": "task", "weight": 1.0}], "budget": {}}
SPLITS = [NewSplit("task", "train", "asked", "records", ["x"])]


@pytest.fixture(scope="module")
def store(raced: Path) -> Iterator[Store]:
    with Store(url(raced)) as opened:
        yield opened


def pages(store: Store, limit: int, **chosen: Any) -> list[Member]:
    """All pages of a list, one after the other."""
    found: list[Member] = []
    after = None
    while True:
        page = population(store, "tiny", after=after, limit=limit, **chosen)
        assert len(page.items) <= limit
        found += page.items
        after = page.next
        if after is None:
            assert page.total == len(found)
            return found


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("descending", [True, False])
def test_pages_of_any_size_make_up_the_same_list(store: Store, sort: str, descending: bool) -> None:
    whole = pages(store, 500, sort=sort, descending=descending)
    assert len({member.id for member in whole}) == len(whole) > 40
    assert pages(store, 7, sort=sort, descending=descending) == whole
    values = {
        "generation": [(m.generation, m.slot) for m in whole],
        "fitness": [m.fitness for m in whole if m.fitness is not None],
        "score": [round(m.score, 9) for m in whole if m.score is not None],
        "examples": [m.n for m in whole if m.n],
        "violation": [m.violation for m in whole if m.violation is not None],
        "seconds": [round(m.seconds, 9) for m in whole if m.seconds],
    }
    if sort in values:
        found: list[Any] = values[sort]
        assert found == sorted(found, reverse=descending)


@pytest.mark.parametrize("descending", [True, False])
def test_candidates_without_a_value_come_last_either_way(store: Store, descending: bool) -> None:
    found = [m.fitness is None for m in pages(store, 500, descending=descending)]
    assert found == sorted(found)
    assert any(found)


def test_the_best_standing_is_that_of_top(store: Store) -> None:
    ranked = [member.id for member in pages(store, 9, sort="standing")]
    assert ranked == [row["id"] for row in summary.top(store, "tiny", None)]


def test_lists_are_filtered_by_state_and_generation(store: Store) -> None:
    for state in ("scored", "failed", "infeasible"):
        found = pages(store, 5, state=state)
        sql = f"SELECT COUNT(*) FROM candidate WHERE state = '{state}'"
        assert len(found) == query(Path(store.url.removeprefix("sqlite:///")), sql)[0][0]
        assert {member.state for member in found} <= {state}
    third = pages(store, 3, generation=3, sort="generation", descending=False)
    assert [(member.generation, member.slot) for member in third] == [(3, i) for i in range(8)]
    failed = pages(store, 3, generation=3, state="failed")
    assert [m.id for m in failed] == [m.id for m in third if m.state == "failed"]


def test_members_say_what_top_says(store: Store) -> None:
    rows = {row["id"]: row for row in summary.top(store, "tiny", None)}
    for member in pages(store, 500):
        row = rows[member.id]
        assert member.fitness == row["fitness"]
        assert member.scores == row["scores"]
        assert member.n == row["n"]
        assert member.seconds == pytest.approx(row["gpu_seconds"])
        if member.score is not None and member.interval is not None:
            assert member.interval[0] <= member.score <= member.interval[1]


def test_a_page_goes_on_where_it_ended_while_candidates_come(tmp_path: Path) -> None:
    with (
        Store(url(tmp_path / "store.db"), create=True) as store,
        Coordinator.launch(store, "tiny", 0, JOB, {}, [], SPLITS) as held,
    ):
        ids = held.open_generation(1, "proposed", 0.1, [proposal(i) for i in range(6)])
        for id, value in zip(ids, (0.1, 0.5, 0.3, 0.5, 0.2, 0.4), strict=True):
            held.record(id, "train", 0, scored(0), fitness=value)
        held.close_generation(1, {}, None)
        first = population(store, "tiny", limit=3)
        assert [m.id for m in first.items] == [ids[1], ids[3], ids[5]]
        new = held.open_generation(2, "proposed", 0.1, [proposal(i) for i in range(3)])
        for id, value in zip(new, (0.9, 0.35, 0.4), strict=True):
            held.record(id, "train", 0, scored(0), fitness=value)
        held.close_generation(2, {}, None)
        rest = population(store, "tiny", after=first.next, limit=50)
        assert [m.id for m in rest.items] == [new[2], new[1], ids[2], ids[4], ids[0]]


def test_a_cursor_of_another_list_is_refused(store: Store) -> None:
    cursor = population(store, "tiny", limit=1).next
    with pytest.raises(InputError, match="is none of this list"):
        population(store, "tiny", after=cursor, sort="score")
    with pytest.raises(InputError, match="is none of this list"):
        population(store, "tiny", after=cursor, descending=False)
    for nonsense in ("x", "", "W10", "ü", "eyJhIjoxfQ", "WyJmaXRuZXNzIix0cnVlLCJhIl0"):
        with pytest.raises(InputError, match="is none of this list"):
            population(store, "tiny", after=nonsense)


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({"sort": "fitnes"}, "did you mean 'fitness'"),
        ({"state": "score"}, "did you mean 'scored'"),
        ({"limit": 0}, "limit 0 is outside 1 to 500"),
        ({"limit": 501}, "limit 501 is outside"),
    ],
)
def test_what_is_no_list_is_refused(store: Store, chosen: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        population(store, "tiny", **chosen)


def test_the_front_is_that_of_the_last_review_beside_the_baselines(stacked: Path) -> None:
    with Store(url(stacked)) as opened:
        found = front(opened, "tiny")
        shown = summary.show(opened, "tiny")
    on_front = {point.candidate: point.values for point in found if point.on_front}
    assert on_front == {
        row["candidate"]: dict(zip(["score", "layers"], row["objectives"], strict=True))
        for row in shown["front"]
    }
    others = [point for point in found if not point.on_front and not point.winner]
    assert {point.label for point in others} == {"ops", "ja", "base", *shown["baselines"]}
    assert [point.candidate for point in found if point.winner] == [shown["best"]["candidate"]]


def test_with_one_objective_there_is_no_front(store: Store) -> None:
    assert front(store, "tiny") == ()


def test_lineage_names_each_incumbent_once_and_when_it_came(raced: Path, store: Store) -> None:
    found = lineage(store, "tiny")
    rows = query(raced, "SELECT number, review FROM generation WHERE review IS NOT NULL")
    incumbents = {number: json.loads(review)["incumbent"] for number, review in sorted(rows)}
    assert [lead.candidate for lead in found.leads] == [*dict.fromkeys(incumbents.values())]
    for lead in found.leads:
        first = min(number for number, id in incumbents.items() if id == lead.candidate)
        assert (lead.generation, lead.born <= lead.generation) == (first, True)
    assert found.ancestors == ()


def test_stores_of_earlier_versions_have_a_population(old: Path) -> None:
    with Store(url(old)) as opened:
        for name in ("finished", "stopped", "failed"):
            for sort in SORTS:
                page = population(opened, name, sort=sort)
                assert page.total == len(page.items) > 6
            assert front(opened, name) == ()
            assert importance(opened, name) == ()
            assert lineage(opened, name).ancestors == ()


@pytest.mark.slow
def test_another_database_says_the_same(raced: Path, postgres_url: str) -> None:
    """Everything that reports read, of a copy."""
    copy(url(raced), postgres_url, lambda done, of: None)
    with Store(url(raced)) as here, Store(postgres_url) as there:
        for sort in SORTS:
            ours, theirs = (pages(one, 11, sort=sort) for one in (here, there))
            assert [member.id for member in ours] == [member.id for member in theirs]
        assert history(here, "tiny") == history(there, "tiny")
        assert failures(here, "tiny") == failures(there, "tiny")
        assert lineage(here, "tiny") == lineage(there, "tiny")
        assert importance(here, "tiny") == importance(there, "tiny")
        assert summary.top(here, "tiny", 5) == summary.top(there, "tiny", 5)
        assert summary.show(here, "tiny") == summary.show(there, "tiny")
        for id in (1, 20):
            assert candidate(here, "tiny", id) == candidate(there, "tiny", id)
        winner = summary.show(here, "tiny")["best"]["candidate"]
        assert candidate(here, "tiny", winner) == candidate(there, "tiny", winner)


class TestImportance:
    """PED-ANOVA of points whose fitness is known."""

    def points(self, count: int = 1000) -> np.ndarray[Any, np.dtype[np.float64]]:
        return generator(0, "points").random((count, 4))

    def test_a_coordinate_that_fitness_depends_on_stands_out(self) -> None:
        points = self.points()
        found = ped_anova(points, -10 * (points[:, 2] - 0.3) ** 2 - points[:, 0] ** 2, [0] * 4)
        assert list(np.argsort(-found)[:2]) == [2, 0]
        assert found[2] > found[0] > 3 * max(found[1], found[3])

    def test_what_fitness_ignores_is_unimportant_however_many_points(self) -> None:
        points = self.points(4000)
        found = ped_anova(points, generator(1, "luck").random(4000), [0, 0, 3, 2])
        assert found.max() < 0.1 * ped_anova(points, points[:, 0], [0, 0, 3, 2])[0]

    def test_choices_count_as_such(self) -> None:
        points = self.points()
        chosen = (points[:, 1] * 3).astype(int)
        found = ped_anova(
            points, (chosen == 1) + 0.01 * generator(3, "luck").random(1000), [0, 3, 0, 0]
        )
        assert int(found.argmax()) == 1

    def test_it_depends_on_the_order_of_fitness_alone(self) -> None:
        points = self.points()
        fitness = points[:, 0] + 0.5 * points[:, 1]
        assert np.array_equal(
            ped_anova(points, fitness, [0] * 4), ped_anova(points, np.exp(9 * fitness), [0] * 4)
        )

    def test_it_ranks_as_the_reference_implementation_does(self) -> None:
        points = self.points(400)
        fitness = -3 * (points[:, 0] - 0.5) ** 2 - (points[:, 1] - 0.2) ** 2 - 0.1 * points[:, 2]
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="maximize")
        space = {f"x{i}": optuna.distributions.FloatDistribution(0, 1) for i in range(4)}
        for point, value in zip(points.tolist(), fitness.tolist(), strict=True):
            named = {f"x{i}": x for i, x in enumerate(point)}
            study.add_trial(
                optuna.trial.create_trial(params=named, distributions=space, value=value)
            )
        theirs = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
        ours = ped_anova(points, fitness, [0] * 4)
        ours /= ours.sum()
        for i in range(4):
            assert ours[i] == pytest.approx(theirs[f"x{i}"], abs=0.08)

    def test_who_left_a_race_early_says_nothing(self, tmp_path: Path) -> None:
        random = generator(3, "genotypes")
        job = {**JOB, "staging": {"stages": [1, 2], "keep": [45]}}
        with (
            Store(url(tmp_path / "store.db"), create=True) as store,
            Coordinator.launch(store, "tiny", 0, job, {}, [], SPLITS, COORDINATES) as held,
        ):
            genotypes = random.random((60, 3))
            new = [NewCandidate(i, None, g, {}, str(i)) for i, g in enumerate(genotypes)]
            ids = held.open_generation(1, "proposed", 0.1, new)
            for place, (id, genotype) in enumerate(zip(ids, genotypes, strict=True)):
                held.record(id, "train", 0, scored(0, 1), fitness=float(genotype[0]))
                if place < 45:
                    held.record(id, "train", 1, scored(1, 1), fitness=float(genotype[1]))
            held.close_generation(1, {}, None)
            found = importance(store, "tiny")
            genotypes, fitness = Sums(store, held.search.id).proposals(1, 10)
        assert found[0].coordinate == COORDINATES[1].name
        assert len(genotypes) == len(fitness) == 9  # one in five of 45

    def test_a_search_says_it_by_the_names_of_its_coordinates(self, tmp_path: Path) -> None:
        random = generator(2, "genotypes")
        with (
            Store(url(tmp_path / "store.db"), create=True) as store,
            Coordinator.launch(store, "tiny", 0, JOB, {}, [], SPLITS, COORDINATES) as held,
        ):
            genotypes = random.random((60, 3))
            new = [NewCandidate(i, None, g, {}, str(i)) for i, g in enumerate(genotypes)]
            ids = held.open_generation(1, "proposed", 0.1, new)
            for id, genotype in list(zip(ids, genotypes, strict=True))[:39]:
                held.record(id, "train", 0, scored(0, 1), fitness=-float(genotype[2]))
            held.close_generation(1, {}, None)
            assert importance(store, "tiny") == ()  # of too few
            for id, genotype in list(zip(ids, genotypes, strict=True))[39:]:
                held.record(id, "train", 0, scored(0, 1), fitness=-float(genotype[2]))
            held.close_generation(1, {}, None)
            found = importance(store, "tiny")
        assert found[0].coordinate == "ü: density"
        assert {one.coordinate for one in found} == {"a: weight", "method", "ü: density"}
        assert sum(one.value for one in found) == pytest.approx(1)
