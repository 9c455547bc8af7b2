"""Jobs looked at without being run."""

from typing import Any, Literal

from fastapi import APIRouter

from evomerge.service import checking, confine
from evomerge.service.api.shapes import Asking, Body, JobDocument
from evomerge.service.problems import declared
from evomerge.service.steering import Asker

router = APIRouter(tags=["checks"])


class Unrun(Body):
    """A job that is not to be run."""

    job: JobDocument


@router.post("/plan", responses=declared(409, 413))
def plan(asker: Asking, unrun: Unrun) -> dict[str, Any]:
    """What a job means, in moments: every default written out, coordinates, generations, memory,
    what its tasks can show, what is the matter with their splits. Headers of models and records of
    tasks are read; nothing is merged or scored."""
    return _found_out(asker, "plan", unrun)


@router.post("/check", responses=declared(409, 413))
def check(asker: Asking, unrun: Unrun) -> dict[str, Any]:
    """The same, and what it takes: models are opened and one candidate is scored on a few examples,
    as `evomerge check` does. That may take minutes, and only one job is checked at a time."""
    return _found_out(asker, "check", unrun)


def _found_out(asker: Asker, what: Literal["check", "plan"], unrun: Unrun) -> dict[str, Any]:
    here = asker.here

    def act() -> dict[str, Any]:
        job = confine.submitted(unrun.job, here.settings.roots, is_admin=asker.is_admin)
        return checking.find_out(what, job.document(), here.store.url)

    return here.answers.once(asker.who.name, asker.key, (what, unrun.job), act)
