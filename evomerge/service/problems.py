"""What went wrong, as the API says it: one shape for every error, whatever raised it.

    {"error": {"code": "not_found", "message": "store 'evomerge.db' has no search 'a': ..."}}

A code is for programs, a message for people; neither says more than the exception did. Knows
nothing of routes.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from evomerge.errors import (
    EvomergeError,
    InputError,
    NotFound,
    StoreError,
    StoreUnavailable,
)
from evomerge.service.redaction import redacted

_log = logging.getLogger(__name__)

_SAFE = frozenset({"GET", "HEAD"})
_RETRY_AFTER = "5"  # seconds


@dataclass(frozen=True)
class Error:
    """code: bad_host | unauthenticated | forbidden | forged | not_found | method_not_allowed |
    conflict | too_large | invalid | too_many_tries | internal | damaged | unavailable | busy."""

    code: str
    message: str


@dataclass(frozen=True)
class Problem:
    """The body of every response with a status from 400 on."""

    error: Error


class Busy(EvomergeError):
    """The server has as much to do as it takes on; asked again in a while, it will do it."""


_MEANING = {
    400: "It is malformed, or its Host header does not name this server.",
    401: "No token, or one that is of no use.",
    403: "The token lacks the scope, or the request comes from another site.",
    404: "There is no such thing.",
    405: "This path has other methods.",
    409: "The state of things does not allow it.",
    413: "The body is too large.",
    422: "What was sent is wrong.",
    429: "Too many failed tries.",
    503: "The store is away, or the server is busy.",
}
# What the router says of paths that it does not know.
_UNROUTED = {
    404: "there is nothing at this path: see /api/v1/openapi.json",
    405: "this path has other methods: see /api/v1/openapi.json",
}
_FOR_ANYBODY = "the server cannot use its store: its log says why"
_ANYWHERE, _GUARDED = (400,), (401, 403, 422, 429, 503)


def declared(*others: int, public: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: those of every route, those of every one that needs a scope,
    which public ones do not, and these."""
    everywhere = _ANYWHERE if public else (*_ANYWHERE, *_GUARDED)
    return {status: _described(status) for status in sorted({*everywhere, *others})}


def _described(status: int) -> dict[str, Any]:
    # By name: of a model, FastAPI would build a validator for each status of each route.
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {
        "description": _MEANING[status],
        "content": {"application/json": {"schema": schema}},
    }


def install(app: FastAPI) -> None:
    """Have an app answer with problems."""

    def problem(request: Request, error: Exception) -> Response:
        return answer(*explained(request, error))

    for kind in (EvomergeError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, problem)


def answer(
    status: int, code: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    """A problem as a response; secrets taken out of the message."""
    body = jsonable_encoder(Problem(Error(code, redacted(message))))
    return JSONResponse(body, status, dict(headers or {}))


def explained(request: Request, error: Exception) -> tuple[int, str, str, Mapping[str, str] | None]:
    """Status, code, message and headers."""
    if isinstance(error, HTTPException):
        code = getattr(error, "code", None) or HTTPStatus(error.status_code).name.lower()
        detail = _UNROUTED.get(error.status_code) if type(error) is HTTPException else None
        headers = error.headers if error.status_code != 405 else {"Allow": _allowed(request)}
        return error.status_code, code, detail or str(error.detail), headers
    if isinstance(error, RequestValidationError):
        return 422, "invalid", _first(error.errors()), None
    status, code = _status(request, error)
    if status >= 500:
        _log.error("%s %s: %s", request.method, request.url.path, error)
    # Where the store is, and what is the matter with it, is for those who are let in.
    told = str(error) if status < 500 or _is_let_in(request) else _FOR_ANYBODY
    return status, code, told, {"Retry-After": _RETRY_AFTER} if status == 503 else None


def _is_let_in(request: Request) -> bool:
    """Whether it is known who asks, see access."""
    return getattr(request.state, "principal", None) is not None


def _allowed(request: Request) -> str:
    """The methods of all routes of a path: the router tells those of the first."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    here = [route for route in routes if route.matches(request.scope)[0] != Match.NONE]
    return ", ".join(sorted({method for route in here for method in route.methods or ()}))


def _status(request: Request, error: Exception) -> tuple[int, str]:
    if isinstance(error, StoreUnavailable):
        return 503, "unavailable"
    if isinstance(error, Busy):
        return 503, "busy"
    if isinstance(error, NotFound):
        return 404, "not_found"
    if isinstance(error, StoreError):
        # Reading cannot be in conflict with anything, nor can finding out who asks: what cannot be
        # read is damaged.
        changes = request.method not in _SAFE and _is_let_in(request)
        return (409, "conflict") if changes else (500, "damaged")
    return (422, "invalid") if isinstance(error, InputError) else (500, "internal")


def _first(errors: Iterable[Mapping[str, Any]]) -> str:
    """The first thing that is wrong with a request: where, the value, what it should be."""
    first = next(iter(errors))
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{where}: required, and missing"
    if first["type"] == "json_invalid":
        return f"{where}: not JSON: {first['ctx']['error']}"
    value = repr(first["input"])
    shown = value if len(value) <= 80 else value[:79] + "…"
    message = first["msg"]
    return f"{where}: {shown}: {message[:1].lower()}{message[1:]}"
