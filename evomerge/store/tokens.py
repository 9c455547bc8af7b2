"""The tokens that open a server, and what each may be used for.

A token's secret is random and long: its SHA-256, which is all that is stored, cannot be guessed
back, so no salt or slow hash is needed. Knows nothing of requests.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, TypeVar, get_args

from sqlalchemy import Connection, Row, exists, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from evomerge.errors import InputError, NotFound, StoreError, nearest
from evomerge.store import schema
from evomerge.store.database import now
from evomerge.store.store import Store

Scope = Literal["read", "run", "admin", "unseal"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_PREFIX = "evm_"
_SECRET = re.compile(r"evm_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
LOCAL = "local"  # whoever sits at the machine of a server that has no token

_RESERVED = (LOCAL, "server", "unknown")  # who else the audit log names
_USED_EVERY = timedelta(minutes=1)

_table = schema.token

T = TypeVar("T")


@dataclass(frozen=True)
class Token:
    """One token, without its secret. Times are UTC, ISO 8601; used_at: to the minute."""

    id: int
    name: str
    scopes: frozenset[Scope]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    used_at: str | None

    @property
    def state(self) -> Literal["usable", "expired", "revoked"]:
        """At this moment."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now() else "usable"


class Tokens:
    """The tokens of a store. Every method is one transaction."""

    def __init__(self, store: Store) -> None:
        self._database = store.database

    def create(
        self, name: str, scopes: Collection[str], lifetime: timedelta | None = None
    ) -> tuple[Token, str]:
        """A new one and its secret, which nobody can be told again; lifetime: default: it does not
        expire. Raises InputError for a name, scopes or lifetime that cannot be, StoreError for a
        name that is taken."""
        _check(name, scopes, lifetime)
        secret = _PREFIX + secrets.token_urlsafe(32)
        values = {
            "name": name,
            "sha256": _hashed(secret),
            "scopes": " ".join(scope for scope in SCOPES if scope in scopes),
            "created_at": now(),
            "expires_at": None if lifetime is None else _iso(datetime.now(UTC) + lifetime),
        }

        def attempt() -> Token:
            # Tried again after it was committed, it finds itself.
            with self._database.write() as db:
                own = select(_table).where(_table.c.sha256 == values["sha256"])
                if (row := db.execute(own).first()) is None:
                    db.execute(insert(_table).values(values))
                    row = db.execute(own).one()
                return _token(row)

        try:
            return self._database.persist(attempt), secret
        except IntegrityError:
            raise StoreError(
                f"token '{name}': there is one of this name, or was: choose another, which the "
                "audit log can tell from it"
            ) from None

    def all(self) -> list[Token]:
        """In the order they were made, those that are of no use any more included."""
        return [_token(row) for row in self._read(lambda db: db.execute(_in_order()).all())]

    def any(self) -> bool:
        """Whether any was ever made, usable or not."""
        return bool(self._read(lambda db: db.execute(select(exists(select(_table.c.id)))).scalar()))

    def revoke(self, name: str) -> Token:
        """From now on it opens nothing; of one that is revoked, nothing changes. Raises
        NotFound where there is none."""

        def attempt() -> Token | None:
            with self._database.write() as db:
                own = _table.c.name == name
                db.execute(
                    update(_table)
                    .where(own & _table.c.revoked_at.is_(None))
                    .values(revoked_at=now())
                )
                row = db.execute(select(_table).where(own)).first()
                return None if row is None else _token(row)

        found = self._database.persist(attempt)
        if found is None:
            names = [token.name for token in self.all()]
            remedy = nearest(name, names) if names else "there is none: evomerge token create"
            raise NotFound(f"token '{name}' is unknown: {remedy}")
        return found

    def find(self, secret: str) -> Token | None:
        """The token whose secret this is, if it is usable."""
        if not _SECRET.fullmatch(secret):
            return None
        hashed = _hashed(secret)
        row = self._one(_table.c.sha256 == hashed)
        # The index compares hashes, which nobody can steer; equal is what takes equally long.
        if row is None or not hmac.compare_digest(row.sha256, hashed):
            return None
        return _usable(row)

    def get(self, id: int) -> Token | None:
        """The token of this number, if it is usable."""
        row = self._one(_table.c.id == id)
        return None if row is None else _usable(row)

    def touch(self, token: Token) -> None:
        """Write down that it was used, at most once a minute."""
        before = _iso(datetime.now(UTC) - _USED_EVERY)
        if token.used_at is not None and token.used_at > before:
            return

        def attempt() -> None:
            with self._database.write() as db:
                stale = or_(_table.c.used_at.is_(None), _table.c.used_at <= before)
                db.execute(
                    update(_table).where((_table.c.id == token.id) & stale).values(used_at=now())
                )

        self._database.persist(attempt)

    def _one(self, condition: Any) -> Row[Any] | None:
        def first(db: Connection) -> Row[Any] | None:
            return db.execute(select(_table).where(condition)).first()

        return self._read(first)

    def _read(self, query: Callable[[Connection], T]) -> T:
        def attempt() -> T:
            with self._database.read() as db:
                return query(db)

        return self._database.persist(attempt)


def _check(name: str, scopes: Collection[str], lifetime: timedelta | None) -> None:
    if not _NAME.fullmatch(name):
        raise InputError(
            f"token '{name}': use letters, digits, '.', '_', '@' and '-', at most 64, a letter or "
            "digit first"
        )
    if name in _RESERVED:
        raise InputError(f"token '{name}' is what the audit log calls others: choose another name")
    for scope in scopes:
        if scope not in SCOPES:
            raise InputError(f"scope '{scope}' is unknown: {nearest(scope, SCOPES)}")
    if not scopes:
        raise InputError(f"token '{name}': no scope: give one or more of {', '.join(SCOPES)}")
    if lifetime is not None and lifetime <= timedelta(0):
        raise InputError(f"token '{name}' would have expired already: give a longer time")


def _in_order() -> Any:
    return select(_table).order_by(_table.c.id)


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode("ascii")).hexdigest()


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds")


def _usable(row: Row[Any]) -> Token | None:
    token = _token(row)
    return token if token.state == "usable" else None


def _token(row: Row[Any]) -> Token:
    given = row.scopes.split()
    return Token(
        row.id,
        row.name,
        frozenset(scope for scope in SCOPES if scope in given),
        row.created_at,
        row.expires_at,
        row.revoked_at,
        row.used_at,
    )
