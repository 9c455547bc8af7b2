"""Pages as HTML: their templates, the files that they load, and their errors.

Every value is escaped, whoever wrote it; what is markup already, the charts, says so by its type.
"""

import hashlib
import os
from collections.abc import Callable, Coroutine, Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, RedirectResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

import evomerge
from evomerge.errors import EvomergeError
from evomerge.report import charts, words
from evomerge.service import access, problems
from evomerge.service.redaction import redacted

_HERE = Path(__file__).parents[1]
_FILES = {path.name: path for path in (*(_HERE / "static").iterdir(), charts.STYLE)}

_TITLES = {
    400: "Not understood",
    401: "Log in",
    403: "Not allowed",
    404: "Not found",
    409: "Not possible now",
    413: "Too large",
    422: "Something is wrong with that",
    429: "Wait a while",
    503: "Busy, or away",
}


class Files(StaticFiles):
    """What pages load: style sheets and the script."""

    def __init__(self) -> None:
        super().__init__(directory=_HERE / "static")

    def lookup_path(self, path: str) -> tuple[str, os.stat_result | None]:
        """Only what is named; the style sheet of charts lies with them."""
        found = _FILES.get(path)
        return ("", None) if found is None else (str(found), found.stat())


class PageRoute(APIRoute):
    """A route whose errors are pages too. Whoever has to log in is sent to do so."""

    def __init__(self, path: str, *arguments: Any, **options: Any) -> None:
        super().__init__(path, *arguments, **options)
        if "GET" in self.methods:
            self.methods.add("HEAD")

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Of FastAPI."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                if request.url.path not in access.PUBLIC:
                    await access.check_form(request)
                return await handle(request)
            except (EvomergeError, HTTPException, RequestValidationError) as error:
                return await run_in_threadpool(_failed, request, error)

        return handled


def page(request: Request, template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """A page of a template."""
    return HTMLResponse(_rendered(request, template, values), status)


def is_for_people(request: Request) -> bool:
    """Whether a browser shows somebody what comes of a request, which may be malformed."""
    is_api = request.scope["path"].startswith("/api/")
    return not is_api and "text/html" in request.headers.get("accept", "")


def problem_page(
    request: Request, status: int, message: str, headers: Mapping[str, str] | None = None
) -> HTMLResponse:
    """What went wrong, as a page; secrets taken out of the message."""
    title = _TITLES.get(status, "evomerge failed")
    found = page(request, "problem.html", status, title=title, message=redacted(message))
    found.headers.update(headers or {})
    return found


def unrouted(request: Request, error: Exception) -> Response:
    """What was refused before any page: for people a page too, for others as the API has it."""
    if is_for_people(request):
        return _failed(request, error)
    return problems.answer(*problems.explained(request, error))


def seen(*path: object) -> RedirectResponse:
    """Have a browser load another page, after something was done."""
    return RedirectResponse(url(*path), 303)


def url(*path: object) -> str:
    """Of a page, from the parts of its path, whatever is in them."""
    return "/" + "/".join(quote(str(part), safe="") for part in path)


def _rendered(request: Request, template: str, values: dict[str, Any]) -> str:
    state = request.state
    own = {
        "who": getattr(state, "principal", None),
        "csrf": getattr(state, "csrf", ""),
        "may_log_out": getattr(state, "token", None) is not None,
        "path": request.scope["path"],  # a Host header that is none has no URL
    }
    return _templates().get_template(template).render({**own, **values})


@cache
def _templates() -> Environment:
    found = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update({**words.FILTERS, "size": _size})
    found.globals |= {
        "url": url,
        "static": _static,
        "version": evomerge.__version__,
        "limit_words": words.LIMITS,
        "dash": words.NONE,
    }
    return found


def _size(count: float) -> str:
    """Of bytes, such as '1.25 GB'."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count:.0f} bytes"


@cache
def _static(name: str) -> str:
    """Where a file is; another address for other content, so that no browser keeps an old one."""
    content = hashlib.sha256(_FILES[name].read_bytes()).hexdigest()
    return f"/static/{name}?{content[:12]}"


def _failed(request: Request, error: Exception) -> Response:
    status, code, message, headers = problems.explained(request, error)
    if code == "unauthenticated":
        back = request.url.path if request.method == "GET" else "/"
        return RedirectResponse(f"/login?next={quote(back, safe='')}", 303)
    return problem_page(request, status, message, headers)
