"""Who may use a server, and what was done through it."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import Field

from evomerge.service.access import Principal, Refused, audit, refuse, requires
from evomerge.service.api.shapes import LARGEST, Body, IdempotencyKey
from evomerge.service.context import Here
from evomerge.service.problems import declared
from evomerge.store import Audit, AuditLine, Scope, Token, Tokens

router = APIRouter(tags=["tokens"])

Admin = Annotated[Principal, requires("admin")]


class NewToken(Body):
    """A token that is to be made."""

    name: str = Field(max_length=64, description="In the audit log: who has it.")
    scopes: tuple[Scope, ...] = Field(min_length=1, max_length=4)
    days: int | None = Field(
        None, ge=1, le=36500, description="After which it expires; default: never."
    )


@dataclass(frozen=True)
class KnownToken:
    """A token, without its secret. Times are UTC, ISO 8601; used_at: to the minute."""

    name: str
    scopes: list[Scope]
    state: Literal["usable", "expired", "revoked"]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None

    @classmethod
    def of(cls, token: Token) -> "KnownToken":
        """What may be told of it."""
        return cls(
            token.name,
            sorted(token.scopes),
            token.state,
            token.created_at,
            token.expires_at,
            token.revoked_at,
            token.used_at,
        )


@dataclass(frozen=True)
class MadeToken:
    """A new token. secret: what opens the server; it is told this once."""

    token: KnownToken
    secret: str


@dataclass(frozen=True)
class AuditPage:
    """A part of the audit log, the newest first. next: for `before`, of what follows; None at the
    end."""

    items: list[AuditLine]
    next: int | None


@router.get("/tokens", dependencies=[requires("admin")], responses=declared())
def list_tokens(here: Here) -> list[KnownToken]:
    """All tokens, those that are of no use any more included."""
    return [KnownToken.of(token) for token in Tokens(here.store).all()]


@router.post("/tokens", status_code=201, responses=declared(409, 413))
def make_token(
    here: Here, who: Admin, request: Request, new: NewToken, idempotency_key: IdempotencyKey = None
) -> MadeToken:
    """Make a token, which can do nothing that whoever makes it cannot."""

    def act() -> MadeToken:
        if lacking := sorted(set(new.scopes) - who.scopes):
            refuse(request, lacking[0])
            raise Refused(
                403,
                "forbidden",
                f"'{who.name}' lacks the scope '{lacking[0]}' and cannot give it: leave it out",
            )
        lifetime = None if new.days is None else timedelta(days=new.days)
        token, secret = Tokens(here.store).create(new.name, new.scopes, lifetime)
        audit(request, "create token", new.name, scopes=sorted(new.scopes))
        return MadeToken(KnownToken.of(token), secret)

    return here.answers.once(who.name, idempotency_key, ("token", new), act)


@router.delete("/tokens/{name}", dependencies=[requires("admin")], responses=declared(404))
def revoke_token(
    here: Here, request: Request, name: Annotated[str, Path(max_length=64)]
) -> KnownToken:
    """From now on it opens nothing."""
    token = Tokens(here.store).revoke(name)
    audit(request, "revoke token", name)
    return KnownToken.of(token)


@router.get("/audit", dependencies=[requires("admin")], responses=declared())
def read_audit(
    here: Here,
    before: Annotated[
        int | None, Query(ge=1, le=LARGEST, description="Older than the line of this number.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> AuditPage:
    """Who changed what, and who was refused."""
    lines = Audit(here.store).lines(before, limit + 1)
    more = len(lines) > limit
    return AuditPage(lines[:limit], lines[limit - 1].id if more else None)
