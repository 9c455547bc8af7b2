"""Who may do what: tokens, sessions of the pages, and who sits at this machine.

    access.install(app, settings, store)    # once; what follows finds it in app.state.access

    @router.post("/searches", dependencies=[access.requires("run")])
    def submit(request: Request) -> ...:    # or a parameter: Annotated[Principal, requires("run")]
        access.audit(request, "submit", name, priority=3)

A principal is whoever holds a token (`Authorization: Bearer evm_...`), whoever has logged in to the
pages with one (a cookie), or, on loopback and as long as no token was ever made, 'local'. Whatever
changes something must come from a page of ours: by cookie it needs the session's CSRF token (form
field `csrf`, or header X-CSRF-Token; templates get it from `csrf_token`), by 'local' that token or
`Content-Type: application/json`. A refusal is a `Refused`, an HTTPException with a `code`.

Every route but those of PUBLIC declares a scope; `undeclared` names those that do not. Knows
nothing of what is done behind a route.
"""

import hmac
import ipaddress
import logging
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from evomerge.errors import InputError, StoreError, StoreUnavailable
from evomerge.service.redaction import redacted, redacted_within
from evomerge.service.sessions import Failures, Refusals, Session, Sessions
from evomerge.service.settings import Settings
from evomerge.store import LOCAL, SCOPES, Audit, Scope, Store, Token, Tokens

# What anybody may ask for. /login and /logout look after themselves.
LOGIN = "/login"
PUBLIC = frozenset({"/healthz", "/readyz", "/version", LOGIN, "/logout", "/static"})

CSRF_FIELD, CSRF_HEADER = "csrf", "X-CSRF-Token"

_SUBJECT = 2000  # characters of a line of the audit log: a path may be longer than anybody reads
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_FORMS = frozenset({"application/x-www-form-urlencoded", "multipart/form-data"})
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_INCLUDED: Mapping[Scope, tuple[Scope, ...]] = {"admin": ("read", "run")}

_log = logging.getLogger(__name__)
# In the schema of the API too, so that clients know how to ask.
_bearer = HTTPBearer(scheme_name="token", bearerFormat="evm_...", auto_error=False)


@dataclass(frozen=True)
class Principal:
    """Who asks. name: the token's, or 'local'. scopes: with those that others include. address: of
    the client, as far as proxies are trusted."""

    name: str
    scopes: frozenset[Scope]
    address: str


class Refused(HTTPException):
    """A request that is not served. code: unauthenticated | forbidden | forged | too_many_tries."""

    def __init__(
        self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, headers)
        self.code = code


class _Requires:
    """The dependency that `requires` gives."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> Principal:
        access: Access = request.app.state.access
        secret = None if bearer is None else bearer.credentials
        csrf = await _csrf_given(request) if secret is None else None
        return await run_in_threadpool(access.admit, request, self.scope, secret, csrf)


def requires(scope: Scope) -> Any:
    """A FastAPI dependency: a Principal that has the scope. Raises Refused."""
    return Depends(_Requires(scope))


def install(app: FastAPI, settings: Settings, store: Store) -> None:
    """Let the routes of an app ask who somebody is."""
    app.state.access = Access(settings, store)


async def check_form(request: Request) -> None:
    """Raise Refused for a form that comes from nobody who is known. To be asked before anything
    parses it: that is slow, and would be done for anybody."""
    if request.method not in _SAFE and _media_type(request) in _FORMS:
        access: Access = request.app.state.access
        bearer = await _bearer(request)
        secret = None if bearer is None else bearer.credentials
        await run_in_threadpool(access.check_known, request, secret)


def audit(request: Request, action: str, subject: str, **detail: Any) -> None:
    """Write a line about what a request has changed, or was refused; detail: plain data. Blocks."""
    access: Access = request.app.state.access
    principal: Principal | None = getattr(request.state, "principal", None)
    access.write(principal or _unknown(request), action, subject, detail)


def refuse(request: Request, scope: Scope) -> None:
    """Write down that whoever was admitted lacks a scope for what they ask for. Blocks."""
    access: Access = request.app.state.access
    access.refuse(request, request.state.principal, scope)


def login(request: Request, response: Response, secret: str) -> Principal:
    """Open a session for whoever knows the secret of a token; the response gets its cookie.
    Blocks. Raises Refused."""
    access: Access = request.app.state.access
    return access.login(request, response, secret)


def logout(request: Request, response: Response) -> None:
    """End the session that a request comes from, if any. Raises Refused where another site asks
    for that."""
    access: Access = request.app.state.access
    access.logout(request, response)


def csrf_token(request: Request) -> str:
    """What forms of a page carry; of a request that `requires` has admitted."""
    token: str = request.state.csrf
    return token


def still(request: Request, scope: Scope) -> bool:
    """Whether the principal of a request that is being answered for long, such as a stream of
    events, would still be admitted. Blocks."""
    access: Access = request.app.state.access
    return access.still(request, scope)


def scopes_of(route: BaseRoute) -> frozenset[Scope]:
    """The scopes that a route declares, all of which it needs."""
    if not isinstance(route, APIRoute):
        return frozenset()
    needed = (inner.call for inner in _within(route.dependant))
    return frozenset(call.scope for call in needed if isinstance(call, _Requires))


def undeclared(routes: Iterable[BaseRoute]) -> list[str]:
    """The paths that are open to anybody without being meant to."""
    paths = ((getattr(route, "path", ""), route) for route in routes)
    return [path for path, route in paths if path not in PUBLIC and not scopes_of(route)]


def check_exposure(settings: Settings, tokens: Iterable[Token]) -> list[str]:
    """What to warn of before serving under these settings. Raises InputError where others than
    this machine would be served, and no token says who they are."""
    exposed = not _is_loopback(settings.host)
    if not exposed and settings.public_url is None and not settings.proxies:
        return []
    where = settings.host if exposed else settings.public_url or "a reverse proxy"
    if not any(token.state == "usable" for token in tokens):
        raise InputError(
            f"serving on {where} needs a token that says who may: make one with: evomerge token "
            "create NAME, or serve on 127.0.0.1"
        )
    secured = settings.tls_cert is not None or _scheme(settings.public_url) == "https"
    if secured:
        return []
    return [
        f"serving on {where} without TLS: tokens can be read on the way: give --tls-cert and "
        "--tls-key, or put a reverse proxy before it and say so with --public-url https://..."
    ]


class Access:
    """What one server knows of those who ask; see the module for its doors. Thread-safe."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._tokens = Tokens(store)
        self._audit = Audit(store)
        self._sessions = Sessions()
        self._failures = Failures()
        self._refusals = Refusals()
        self._local_csrf = secrets.token_urlsafe(32)
        self._has_tokens = False
        # A cookie belongs to a host, whatever the port; two servers would end each other's.
        self._cookie = f"evomerge_{settings.port}"
        self._public = settings.public_url and _origin(settings.public_url)
        # Behind a proxy, everybody comes from loopback.
        self._may_be_local = (
            _is_loopback(settings.host) and settings.public_url is None and not settings.proxies
        )

    def admit(
        self, request: Request, scope: Scope, secret: str | None, csrf: str | None
    ) -> Principal:
        """Whoever sends a request, if they have the scope. secret: of a token that came with it;
        csrf: the CSRF token that did."""
        if secret is not None:
            principal = self._of_token(request, self._known(request, secret))
        else:
            principal = self._of_session(request, csrf) or self._as_local(request, csrf)
        request.state.principal = principal
        if scope not in principal.scopes:
            self.refuse(request, principal, scope)
            raise Refused(
                403,
                "forbidden",
                f"'{principal.name}' lacks the scope '{scope}': use a token that has it",
            )
        return principal

    def check_known(self, request: Request, secret: str | None) -> None:
        if secret is not None:
            self._known(request, secret)
        elif self._session(request) is None and not self._is_local(request):
            raise _stranger()

    def still(self, request: Request, scope: Scope) -> bool:
        principal: Principal = request.state.principal
        number: int | None = request.state.token
        if number is None:
            return not self._any_token()
        token = self._tokens.get(number)
        return token is not None and scope in principal.scopes

    def login(self, request: Request, response: Response, secret: str) -> Principal:
        self._check_origin(request)
        token = self._known(request, secret.strip())
        principal = self._of_token(request, token)
        name = self._cookie_name(request)
        self._sessions.close(request.cookies.get(name, ""))
        response.set_cookie(
            name,
            self._sessions.open(token.id).id,
            path="/",
            secure=self._is_secure(request),
            httponly=True,
            samesite="strict",
        )
        self.write(principal, "login", principal.name, {})
        return principal

    def logout(self, request: Request, response: Response) -> None:
        self._check_origin(request)
        name = self._cookie_name(request)
        self._sessions.close(request.cookies.get(name, ""))
        response.delete_cookie(
            name, path="/", secure=self._is_secure(request), httponly=True, samesite="strict"
        )

    def write(
        self, principal: Principal, action: str, subject: str, detail: Mapping[str, Any]
    ) -> None:
        plain = {key: redacted_within(value) for key, value in detail.items()}
        shown = redacted(subject)[:_SUBJECT]
        self._audit.write(principal.name, principal.address, action, shown, plain)

    def refuse(self, request: Request, principal: Principal, scope: Scope) -> None:
        """Write down that it lacks a scope: of a token and route a line a minute."""
        route = f"{request.method} {request.scope['route'].path}"
        if self._refusals.is_first(principal.name, route, scope):
            subject = f"{request.method} {request.url.path}"
            self.write(principal, "refused", subject, {"lacks": scope})

    def _known(self, request: Request, secret: str) -> Token:
        """The usable token of this secret. Only what fails is limited: nobody is shut out by
        whoever else is behind the same address."""
        if (token := self._tokens.find(secret)) is not None:
            return token
        unknown = _unknown(request)
        network = _network(unknown.address)
        if wait := self._failures.wait(network):
            raise Refused(
                429,
                "too_many_tries",
                "too many failed tries from this address: wait and try again",
                {"Retry-After": str(math.ceil(wait))},
            )
        self._failures.add(network)
        self.write(unknown, "refused", f"{request.method} {request.url.path}", {"token": "bad"})
        raise _unauthenticated("the token is unknown, revoked or expired: ask for another")

    def _of_token(self, request: Request, token: Token) -> Principal:
        request.state.token, request.state.csrf = token.id, ""
        try:
            self._tokens.touch(token)
        except (StoreError, StoreUnavailable) as error:
            # A store that is full, say, can still be read, and should be.
            _log.warning("the use of token '%s' was not written down: %s", token.name, error)
        scopes = token.scopes.union(*(_INCLUDED.get(scope, ()) for scope in token.scopes))
        return Principal(token.name, scopes, _address(request))

    def _of_session(self, request: Request, csrf: str | None) -> Principal | None:
        """Whoever has logged in; None where nobody has."""
        session = self._session(request)
        if session is None:
            return None
        token = self._tokens.get(session.token)
        if token is None:
            self._sessions.close(session.id)
            return None
        if request.method not in _SAFE:
            self._check_origin(request)
            if not _equal(csrf, session.csrf):
                raise _forged("it lacks the CSRF token of its session: load the page again")
        principal = self._of_token(request, token)
        request.state.csrf = session.csrf
        return principal

    def _session(self, request: Request) -> Session | None:
        id = request.cookies.get(self._cookie_name(request))
        return None if id is None else self._sessions.use(id)

    def _as_local(self, request: Request, csrf: str | None) -> Principal:
        """Whoever sits at this machine. Raises Refused for anybody else."""
        if not self._is_local(request):
            raise _stranger()
        is_safe = request.method in _SAFE
        # A link from elsewhere may be followed; what else other sites ask for is none of theirs.
        if not (is_safe and request.headers.get("sec-fetch-mode", "navigate") == "navigate"):
            self._check_origin(request)
        if not is_safe:
            # A form of another site may post, but not JSON; other methods it has none.
            is_json = request.method != "POST" or _media_type(request) == "application/json"
            if not is_json and not _equal(csrf, self._local_csrf):
                raise _forged("send Content-Type: application/json, or load the page again")
        request.state.token, request.state.csrf = None, self._local_csrf
        return Principal(LOCAL, frozenset(SCOPES), _address(request))

    def _is_local(self, request: Request) -> bool:
        headers = request.headers
        return (
            self._may_be_local
            and _is_loopback(_address(request))
            and _is_loopback(request.url.hostname or "")
            and "authorization" not in headers
            and not any(name in headers for name in _FORWARDED)
            and not self._any_token()
        )

    def _any_token(self) -> bool:
        """Whether any was ever made: one that has expired must not open what it once closed."""
        self._has_tokens = self._has_tokens or self._tokens.any()
        return self._has_tokens

    def _check_origin(self, request: Request) -> None:
        """Raises Refused for what a page of another site has sent."""
        origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
        own = {_origin(str(request.url)), self._public}
        if (origin is not None and origin not in own) or site not in (None, "same-origin", "none"):
            raise _forged("it comes from a page of another site")

    def _is_secure(self, request: Request) -> bool:
        return "https" in (request.url.scheme, _scheme(self._settings.public_url))

    def _cookie_name(self, request: Request) -> str:
        # Browsers take a cookie of this prefix from nobody but this very host, by TLS.
        return ("__Host-" if self._is_secure(request) else "") + self._cookie


async def _csrf_given(request: Request) -> str | None:
    """The CSRF token that came with a request that changes something."""
    if request.method in _SAFE:
        return None
    if (header := request.headers.get(CSRF_HEADER)) is not None:
        return header
    if _media_type(request) not in _FORMS:
        return None
    await check_form(request)
    field = (await request.form()).get(CSRF_FIELD)
    return field if isinstance(field, str) else None


def _within(dependant: Dependant) -> Iterator[Dependant]:
    yield dependant
    for inner in dependant.dependencies:
        yield from _within(inner)


def _stranger() -> Refused:
    return _unauthenticated("log in, or send a token: Authorization: Bearer evm_...")


def _unauthenticated(message: str) -> Refused:
    return Refused(401, "unauthenticated", message, {"WWW-Authenticate": "Bearer"})


def _forged(message: str) -> Refused:
    return Refused(403, "forged", f"the request was not accepted: {message}")


def _equal(given: str | None, expected: str) -> bool:
    """In a time that says nothing of where they differ."""
    return given is not None and hmac.compare_digest(
        given.encode(errors="replace"), expected.encode()
    )


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _address(request: Request) -> str:
    return "unknown" if request.client is None else request.client.host


def _unknown(request: Request) -> Principal:
    return Principal("unknown", frozenset(), _address(request))


def _network(address: str) -> str:
    """What counts as one address: of IPv6, whoever has one has 2^64 of them."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        mapped = found.ipv4_mapped
        return str(mapped or ipaddress.ip_network((int(found), 64), strict=False))
    return address


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _scheme(url: str | None) -> str:
    return "" if url is None else urlsplit(url).scheme


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}".lower()
