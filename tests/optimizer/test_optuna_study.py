"""A history as a study of Optuna's: what Optuna itself reads back from its own database."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from evomerge.coordinates import Coordinate, When
from evomerge.errors import InputError
from evomerge.optimizer.optuna_study import Point, write_study

COORDINATES = (
    Coordinate("ja: layer 0 weight", 0.5),
    Coordinate("method", 0.25, choices=2, ordered=False),
    Coordinate("depth", 0.5, choices=3),
    Coordinate("density", 0.5, when=When(1, frozenset({1}))),
)
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def point(*genotype: float, values: tuple[float, ...] | None = (0.5,), **notes: object) -> Point:
    """A candidate that took a minute."""
    return Point(np.array(genotype), values, START, START + timedelta(minutes=1), notes)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a database that is not there yet."""
    return f"sqlite:///{tmp_path / 'optuna.db'}"


def write(url: str, points: Sequence[Point], objectives: Sequence[str] = ("told",)) -> None:
    """A study 'one'."""
    write_study(url, "one", COORDINATES, objectives, points, {"seed": 7}, lambda done, of: None)


def trials(url: str) -> list[FrozenTrial]:
    """As Optuna loads them."""
    return optuna.load_study(study_name="one", storage=url).trials


def test_optuna_reads_the_very_trials_that_its_own_way_would_have_written(
    url: str, tmp_path: Path
) -> None:
    points = [
        point(0.1 + 0.2, 0.75, 0.9, 0.25, slot=0, fitness=0.1 + 0.2),
        point(5e-324, 0.25, 0.1, 1.0, values=(-1e300,), slot=1),
        point(1.0, 0.25, 0.5, 0.0, values=None, reason="too deep"),
    ]
    write(url, points)
    kinds = {
        "ja: layer 0 weight": optuna.distributions.FloatDistribution(0, 1),
        "method": optuna.distributions.CategoricalDistribution(range(2)),
        "depth": optuna.distributions.IntDistribution(0, 2),
        "density": optuna.distributions.FloatDistribution(0, 1),
    }
    params = [
        {"ja: layer 0 weight": 0.1 + 0.2, "method": 1, "depth": 2, "density": 0.25},
        {"ja: layer 0 weight": 5e-324, "method": 0, "depth": 0},  # the density does not matter
        {"ja: layer 0 weight": 1.0, "method": 0, "depth": 1},
    ]
    theirs = optuna.create_study(
        study_name="one", direction="maximize", storage=f"sqlite:///{tmp_path / 'theirs.db'}"
    )
    for one, given in zip(points, params, strict=True):
        trial = optuna.create_trial(
            state=TrialState.FAIL if one.values is None else TrialState.COMPLETE,
            values=one.values,
            params=given,
            distributions={name: kinds[name] for name in given},
            user_attrs=dict(one.notes),
        )
        trial.datetime_start = one.started.astimezone().replace(tzinfo=None)
        trial.datetime_complete = one.ended.astimezone().replace(tzinfo=None)
        theirs.add_trial(trial)
    assert trials(url) == theirs.trials
    study = optuna.load_study(study_name="one", storage=url)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert (study.best_trial.number, study.user_attrs) == (0, {"seed": 7})


def test_several_objectives_are_all_maximised_and_have_their_names(url: str) -> None:
    points = [point(0.5, 0.25, 0.5, 0.5, values=values) for values in ((1.0, -7.0), (0.5, -3.0))]
    write(url, points, ["score", "length"])
    study = optuna.load_study(study_name="one", storage=url)
    assert study.metric_names == ["score", "length"]
    assert [t.values for t in study.best_trials] == [[1.0, -7.0], [0.5, -3.0]]


@pytest.mark.slow
def test_trials_keep_their_order_beyond_what_is_written_at_once(url: str) -> None:
    told: list[tuple[int, int]] = []
    points = [point(i / 700, 0.25, 0.5, 0.5, values=(i,), number=i) for i in range(700)]
    write_study(url, "one", COORDINATES, ["told"], points, {}, lambda *at: told.append(at))
    found = trials(url)
    assert [t.number for t in found] == [t.user_attrs["number"] for t in found] == [*range(700)]
    assert told == [(500, 700), (700, 700)]


def test_optuna_goes_on_with_the_study(url: str) -> None:
    write(url, [point(0.5, 0.75, 0.5, 0.5)])
    study = optuna.load_study(
        study_name="one", storage=url, sampler=optuna.samplers.RandomSampler(0)
    )
    trial = study.ask()
    trial.suggest_float("ja: layer 0 weight", 0.0, 1.0)
    study.tell(trial, 0.75)
    assert study.best_trial.number == 1


def test_study_that_is_there_is_refused_with_what_to_do(url: str) -> None:
    write(url, [point(0.5, 0.25, 0.5, 0.5)])
    before = trials(url)
    with pytest.raises(InputError, match="has a study 'one' already: name another database, or"):
        write(url, [])
    assert trials(url) == before


def test_study_joins_others_in_the_same_database(url: str) -> None:
    optuna.create_study(study_name="other", storage=url)
    write(url, [point(0.5, 0.25, 0.5, 0.5)])
    assert optuna.get_all_study_names(url) == ["other", "one"]


def test_study_that_cannot_be_written_leaves_nothing(url: str) -> None:
    points = [point(0.5, 0.25, 0.5, 0.5) for _ in range(600)]
    points.append(point(0.5, 0.25, 0.5, 0.5, no_json={1, 2}))
    with pytest.raises(InputError, match="study 'one' is not written: Object of type set"):
        write(url, points)
    assert optuna.get_all_study_names(url) == []
    write(url, points[:1])
    assert len(trials(url)) == 1


@pytest.mark.parametrize("bad", ["no url", "sqlite:////no/such/folder/x.db", "nonsense://host/x"])
def test_place_that_is_no_database_is_refused_in_one_line(bad: str) -> None:
    with pytest.raises(InputError, match="no database of Optuna's can be opened there") as found:
        write(bad, [])
    assert "\n" not in str(found.value)
