"""The one reading of the test split: of the exported files, and of the best parent.

What was read is kept in the store, by what was asked of which model. So nothing is read twice: not
by an export that was killed half-way, not by another search with the same winner or best parent.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evomerge.errors import StoreError
from evomerge.fitness.evaluate import score_alone
from evomerge.fitness.results import Scores
from evomerge.fitness.task import Task, Unsealed
from evomerge.job import Engine
from evomerge.progress import Steps
from evomerge.search.setting import Setting
from evomerge.store import CandidateRow, Coordinator, NewReading, Opening

_SCORES_DEPEND_ON = ("kind", "dtype", "context")  # keys of the engine; batches and threads do not


@dataclass(frozen=True)
class Reading:
    """What the test splits said, by task, of the exported model (ours) and of the best parent
    (theirs), and the openings under which they were read."""

    ours: dict[str, Scores]
    theirs: dict[str, Scores]
    openings: dict[str, Opening]


def read(
    setting: Setting,
    coordinator: Coordinator,
    candidate: CandidateRow,
    best_parent: str,
    folder: Path,
    steps: Steps,
) -> Reading:
    """Unseal the test splits for a candidate whose exported files are in `folder`, and score it and
    the best parent, by name, on them; of what was read before that is what counts."""
    store, row = coordinator.store, coordinator.search
    sha = candidate.recipe_sha
    if sha is None:
        raise StoreError(f"candidate {candidate.id} is infeasible and has no recipe: take another")
    asked = {task.name: _asked(task, setting.job.engine) for task in setting.tasks.values()}
    entry = {"purpose": "export", "candidate": candidate.id, "best_parent": best_parent}
    leaves: dict[str, Unsealed] = {}
    openings: dict[str, Opening] = {}
    for name, task in setting.tasks.items():
        leaves[name], openings[name] = coordinator.unseal(
            task.identity("test"), sha, asked[name], entry
        )

    def scored(subject: str, model: str, what: str) -> dict[str, Scores]:
        read = _stored(coordinator, asked, subject)
        missing = [task for name, task in setting.tasks.items() if name not in read]
        if not missing:
            steps.step(f"{what} was read on the test split before: that reading stands")
        else:
            steps.step(f"scoring {what} on the sealed test split")
            found = score_alone(model, missing, "test", setting.job.engine, leaves, steps.scored)
            new = [
                NewReading(openings[name].id, asked[name], subject, name, scores)
                for name, scores in found.items()
            ]
            coordinator.save_readings(new)
        return _stored(coordinator, asked, subject)

    ours = scored(sha, str(folder), "the exported model")
    path = setting.named.parents.get(best_parent, setting.named.base or "")
    parent = store.models(row.id)[best_parent]["sha256"]
    return Reading(ours, scored(parent, path, f"the best parent ({best_parent})"), openings)


def _stored(coordinator: Coordinator, asked: Mapping[str, str], subject: str) -> dict[str, Scores]:
    """What the store has, which may be what another process wrote down first."""
    found = {name: coordinator.store.reading(hash, subject) for name, hash in asked.items()}
    return {name: scores for name, scores in found.items() if scores is not None}


def _asked(task: Task, engine: Engine) -> str:
    """The hash of a test split as it is asked and scored; its identity is of the records alone."""
    settings = {key: getattr(engine, key) for key in _SCORES_DEPEND_ON}
    text = f"{task.content('test')}\n{json.dumps(settings, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()
