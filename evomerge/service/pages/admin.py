"""Tokens and the audit log, for admins."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Request, Response

from evomerge.service.access import requires
from evomerge.service.api import tokens
from evomerge.service.api.shapes import LARGEST
from evomerge.service.api.tokens import Admin, NewToken
from evomerge.service.context import Here
from evomerge.service.pages.rendering import PageRoute, page, seen
from evomerge.store import SCOPES, Scope

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/tokens", dependencies=[requires("admin")])
def show_tokens(request: Request, here: Here) -> Response:
    """All tokens, without their secrets."""
    return page(request, "tokens.html", found=tokens.list_tokens(here), scopes=SCOPES, made=None)


@router.post("/tokens")
def make_token(
    request: Request,
    here: Here,
    who: Admin,
    name: Annotated[str, Form(max_length=64)],
    scopes: Annotated[list[Scope], Form()],
    days: Annotated[str, Form(pattern=r"^[0-9]{0,5}$")] = "",
) -> Response:
    """A new one, whose secret this page shows once."""
    new = NewToken(name=name.strip(), scopes=tuple(scopes), days=int(days) if days else None)
    made = tokens.make_token(here, who, request, new)
    return page(request, "tokens.html", found=tokens.list_tokens(here), scopes=SCOPES, made=made)


@router.post("/tokens/revoke", dependencies=[requires("admin")])
def revoke_token(
    request: Request, here: Here, name: Annotated[str, Form(max_length=64)]
) -> Response:
    """From now on it opens nothing."""
    tokens.revoke_token(here, request, name)
    return seen("tokens")


@router.get("/audit", dependencies=[requires("admin")])
def show_audit(
    request: Request, here: Here, before: Annotated[int | None, Query(ge=1, le=LARGEST)] = None
) -> Response:
    """Who changed what, and who was refused."""
    found = tokens.read_audit(here, before, 100)
    return page(request, "audit.html", found=found, before=before)
