"""What of a job may change when its search is resumed. Works on plain data; opens nothing."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from evomerge.errors import JobError
from evomerge.job import Job
from evomerge.job.files import override

LOOKS = "guard.validation_looks"  # the key of a job that says how many there are

_CHANGEABLE = ("mode", "optimizer", "budget", "stop", "executor")


def changed(job: Mapping[str, Any], overrides: Sequence[str], where: str) -> Job:
    """A stored job with `key=value` overrides of what may change in mid-search. Where another kind
    of executor takes over, the rest of its section starts from the defaults: what the other kind
    was given means nothing to it.

    Raises JobError for other keys, whose change would make the scores so far mean something else,
    and for looks that are to be fewer.
    """
    data = copy.deepcopy(dict(job))
    for assignment in overrides:
        key = assignment.split("=")[0]
        if key != LOOKS and key.split(".")[0] not in _CHANGEABLE:
            raise JobError(
                f"{where}: '{assignment}': only {', '.join(_CHANGEABLE)} and {LOOKS} may change in "
                "mid-search: launch a new search"
            )
        override(data, assignment)
    if _kind(data) != _kind(job):
        data["executor"] = {}
        for assignment in overrides:
            if assignment.split("=")[0].split(".")[0] == "executor":
                override(data, assignment)
    found = Job.from_dict(data, where)
    if found.optimizer.name == "auto":
        raise JobError(f"{where}: optimizer.name: auto is settled at launch: name an optimizer")
    before, looks = job["guard"]["validation_looks"], found.guard.validation_looks
    if looks < before:
        raise JobError(
            f"{where}: {LOOKS}: {looks} is less than the {before} that there are: more may be "
            "asked for, fewer may not"
        )
    return found


def _kind(job: Mapping[str, Any]) -> Any:
    """Of executor, where it is said."""
    section = job.get("executor")
    return section.get("kind") if isinstance(section, Mapping) else None
