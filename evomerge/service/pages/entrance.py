"""The way in, with a token, and out."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import RedirectResponse

from evomerge.service import access
from evomerge.service.access import Refused
from evomerge.service.pages.rendering import PageRoute, page, seen

router = APIRouter(route_class=PageRoute, include_in_schema=False)

Next = Annotated[str, Query(max_length=500)]


@router.get("/login")
def ask(request: Request, next: Next = "/") -> Response:
    """For a token."""
    return page(request, "login.html", next=_own(next), trouble=None)


@router.post("/login")
def login(
    request: Request,
    token: Annotated[str, Form(max_length=200)] = "",
    next: Annotated[str, Form(max_length=500)] = "/",
) -> Response:
    """To the page that was asked for."""
    found = RedirectResponse(_own(next), 303)
    try:
        access.login(request, found, token)
    except Refused as refused:
        values = {"next": _own(next), "trouble": refused.detail}
        return page(request, "login.html", refused.status_code, **values)
    return found


@router.post("/logout")
def logout(request: Request) -> Response:
    """The session is over."""
    found = seen("login")
    access.logout(request, found)
    return found


def _own(path: str) -> str:
    """A page of this server; nobody is sent elsewhere by a link to here."""
    is_own = path.startswith("/") and not path.startswith(("//", "/\\"))
    return path if is_own else "/"
