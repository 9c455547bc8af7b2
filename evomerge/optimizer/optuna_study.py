"""A finished history as a study in one of Optuna's databases, for its tools to open.

Rows are written in bulk, through Optuna's own models of its tables: `Study.add_trials` asks the
database twice for every parameter, which takes a quarter of an hour where this takes seconds.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.study import StudyDirection
from optuna.study.study import _SYSTEM_ATTR_METRIC_NAMES
from optuna.trial import TrialState

from evomerge.coordinates import Coordinate, Genotype, active
from evomerge.errors import InputError
from evomerge.messages import one_line, without_password
from evomerge.optimizer.optuna_samplers import distribution, param, quiet

_AT_ONCE = 500  # trials


@dataclass(frozen=True)
class Point:
    """One told candidate. genotype: (d,) in [0, 1]. values: of each objective, higher is better;
    None where it failed. started, ended: aware. notes: what else is known, as JSON."""

    genotype: Genotype
    values: Sequence[float] | None
    started: datetime
    ended: datetime
    notes: Mapping[str, Any]


def write_study(
    url: str,
    name: str,
    coordinates: Sequence[Coordinate],
    objectives: Sequence[str],
    points: Sequence[Point],
    notes: Mapping[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    """Write a study of this name into Optuna's database at `url`, made if there is none: whole, in
    one transaction, or not at all.

    Points become trials in their order, coordinates parameters: a share of the side in [0, 1], or
    the number of a choice; those that do not matter at a point are left out. All objectives are
    maximised. notes: of the study. progress: points written, of all. Raises InputError for a name
    that is taken and where nothing can be opened or written.
    """
    shown = without_password(url)
    with quiet(), _failing_as(f"--optuna '{shown}': no database of Optuna's can be opened there"):
        storage = RDBStorage(url)
    try:
        with _failing_as(f"--optuna '{shown}': study '{name}' is not written"):
            if name not in optuna.get_all_study_names(storage):
                with _transaction(storage) as session:
                    study = _add_study(session, name, objectives, notes)
                    for first in range(0, len(points), _AT_ONCE):
                        some = points[first : first + _AT_ONCE]
                        _add_trials(session, study, first, coordinates, some)
                        progress(first + len(some), len(points))
                return
    finally:
        storage.remove_session()
        storage.engine.dispose()
    raise InputError(
        f"--optuna '{shown}' has a study '{name}' already: name another database, or delete it: "
        f"optuna delete-study --study-name {name} --storage {shown}"
    )


@contextmanager
def _transaction(storage: RDBStorage) -> Iterator[Any]:
    """A session whose rows are all committed at the end, or none of them."""
    session = storage.scoped_session()
    try:
        yield session
        session.commit()
    except BaseException:
        session.rollback()
        raise


def _add_study(session: Any, name: str, objectives: Sequence[str], notes: Mapping[str, Any]) -> int:
    """Gives its id."""
    study = models.StudyModel(study_name=name)
    session.add(study)
    session.flush()
    id: int = study.study_id
    for number, _ in enumerate(objectives):
        direction = StudyDirection.MAXIMIZE
        session.add(models.StudyDirectionModel(study_id=id, objective=number, direction=direction))
    labels = json.dumps(list(objectives))
    session.add(
        models.StudySystemAttributeModel(
            study_id=id, key=_SYSTEM_ATTR_METRIC_NAMES, value_json=labels
        )
    )
    for key, value in notes.items():
        session.add(
            models.StudyUserAttributeModel(study_id=id, key=key, value_json=json.dumps(value))
        )
    return id


def _add_trials(
    session: Any,
    study: int,
    first: int,
    coordinates: Sequence[Coordinate],
    points: Sequence[Point],
) -> None:
    """Points as trials, numbered from `first`."""
    trials = [
        models.TrialModel(
            study_id=study,
            number=first + i,
            state=TrialState.FAIL if point.values is None else TrialState.COMPLETE,
            datetime_start=point.started,
            datetime_complete=point.ended,
        )
        for i, point in enumerate(points)
    ]
    session.add_all(trials)
    session.flush()
    kinds = [(c, distribution_to_json(distribution(c))) for c in coordinates]
    values, params, attributes = [], [], []
    for trial, point in zip(trials, points, strict=True):
        id = trial.trial_id
        for objective, value in enumerate(point.values or ()):
            stored, kind = models.TrialValueModel.value_to_stored_repr(value)
            values.append(
                {"trial_id": id, "objective": objective, "value": stored, "value_type": kind}
            )
        matters = active(point.genotype, coordinates)
        for (coordinate, kind), at, wanted in zip(
            kinds, point.genotype.tolist(), matters.tolist(), strict=True
        ):
            if wanted:
                params.append(
                    {
                        "trial_id": id,
                        "param_name": coordinate.name,
                        "param_value": float(param(coordinate, at)),
                        "distribution_json": kind,
                    }
                )
        attributes += [
            {"trial_id": id, "key": key, "value_json": json.dumps(value)}
            for key, value in point.notes.items()
        ]
    for model, rows in (
        (models.TrialValueModel, values),
        (models.TrialParamModel, params),
        (models.TrialUserAttributeModel, attributes),
    ):
        if rows:
            session.execute(model.__table__.insert(), rows)


@contextmanager
def _failing_as(what: str) -> Iterator[None]:
    """Whatever Optuna, SQLAlchemy and drivers raise becomes an InputError."""
    try:
        yield
    except Exception as error:  # their classes belong to the store, and to drivers
        raise InputError(f"{what}: {one_line(error)}") from error
