"""What requests of several modules are made of."""

from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query, Request
from fastapi.dependencies.utils import get_flat_dependant
from pydantic import BaseModel, ConfigDict, Field

from evomerge.errors import InputError, nearest
from evomerge.service.access import Principal, requires
from evomerge.service.context import Here
from evomerge.service.steering import Asker

LARGEST = 2**31 - 1  # number that every database has room for

# Of the hub, OWNER/NAME. Browsers, whose forms have it too, want every hyphen in brackets escaped.
REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9._\-]{0,95}/[A-Za-z0-9][A-Za-z0-9._\-]{0,95}$"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of a search

SearchName = Annotated[str, Path(pattern=NAME, description="The name of a search.")]
CandidateId = Annotated[int, Path(ge=1, le=LARGEST, description="The number of a candidate.")]
SubmissionId = Annotated[int, Path(ge=1, le=LARGEST, description="The number of a submission.")]
Cursor = Annotated[
    str | None,
    Query(max_length=1000, description="`next` of the page before; default: from the beginning."),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern=r"^[!-~]{1,255}$",
        description="Sent again under the same key, a request is not done again: its first answer "
        "is given.",
    ),
]
Priority = Annotated[int, Field(ge=-1000, le=1000, description="Higher goes first.")]
Overrides = Annotated[
    tuple[Annotated[str, Field(max_length=1000)], ...],
    Field(max_length=50, description="`key=value`, such as budget.candidates=900."),
]
JobDocument = Annotated[
    dict[str, Any] | str,
    Field(
        description="The job: its keys, or the YAML of a job file or of one of mergekit-evolve. "
        "Relative paths are looked up from the server's first root."
    ),
]


def _asking(
    here: Here,
    request: Request,
    who: Annotated[Principal, requires("run")],
    idempotency_key: IdempotencyKey = None,
) -> Asker:
    return Asker(here, request, who, idempotency_key)


# Of routes that have something done; they need the scope 'run'.
Asking = Annotated[Asker, Depends(_asking)]


async def known_keys(request: Request) -> None:
    """Raise InputError for a key of a query that its route does not read: a misspelt filter would
    be none."""
    parameters = get_flat_dependant(request.scope["route"].dependant).query_params
    known = {parameter.alias for parameter in parameters}
    for key in request.query_params:
        if key not in known:
            remedy = nearest(key, known) if known else "this path takes none"
            raise InputError(f"query.{key}: unknown key: {remedy}")


class Body(BaseModel):
    """What is sent: without keys that nobody reads."""

    model_config = ConfigDict(frozen=True, extra="forbid")
