"""What every request passes before any route, and every response after it.

The Host header must be a name of this server: a page of another site whose name was made to point
here cannot ask it anything. Bodies are limited, whether or not they say how long they are. Every
response says what a browser may do with it. Proxies that are named in the settings are believed
whom they ask for. Knows nothing of routes, or of who may use them.
"""

import ipaddress
import re
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from evomerge.errors import InputError
from evomerge.service.access import LOGIN, Refused
from evomerge.service.pages.rendering import is_for_people, problem_page
from evomerge.service.problems import answer
from evomerge.service.settings import Settings

# A response that needs others, such as a report with a style of its own, brings them itself.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; object-src 'none'; form-action 'self'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: with that, browsers hide from us too where a form came from.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_LOGIN_BODY = 10_000  # bytes of the one form that is parsed for anybody
_HSTS = "max-age=31536000"
_HOST = re.compile(r"([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?")


def install(app: FastAPI, settings: Settings) -> None:
    """Put it before everything else that an app has been given. Raises InputError for a proxy that
    is no address."""
    for proxy in settings.proxies:
        _check_proxy(proxy)
    app.add_middleware(_Shield, settings=settings)
    if settings.proxies:  # outermost: what follows sees the client that the proxy saw
        app.add_middleware(ProxyHeadersMiddleware, trusted_hosts=list(settings.proxies))


def _check_proxy(proxy: str) -> None:
    try:
        network = ipaddress.ip_network(proxy)
    except ValueError:
        raise InputError(
            f"proxy '{proxy}': give its address, such as 10.0.0.2, or a network, 10.0.0.0/24"
        ) from None
    if not network.prefixlen:
        raise InputError(f"proxy '{proxy}' is everybody: give the proxy's own address")


class _Shield:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._max_body = settings.max_body
        public = urlsplit(settings.public_url or "")
        names = (settings.host, "localhost", public.hostname, *settings.hosts)
        self._names = {name.lower() for name in names if name}
        self._is_public_by_tls = public.scheme == "https"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = _host(headers.get("host", ""))
        has_begun = False

        async def send_shielded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._shield(MutableHeaders(scope=message), host, scope["scheme"])
            await send(message)

        try:
            self._check(headers, host, self._limit(scope))
            await self._app(scope, _limited(receive, self._limit(scope)), send_shielded)
        except Refused as refused:
            if has_begun:
                raise
            told = refused.status_code, refused.code, refused.detail
            await _answer(scope, *told)(scope, receive, send_shielded)
        except Exception:  # whatever nobody has foreseen: who asks gets an answer all the same
            if not has_begun:
                message = "evomerge failed: its log says why"
                await _answer(scope, 500, "internal", message)(scope, receive, send_shielded)
            raise  # for the log

    def _limit(self, scope: Scope) -> int:
        """Of the body, in bytes."""
        return min(self._max_body, _LOGIN_BODY) if scope["path"] == LOGIN else self._max_body

    def _check(self, headers: Headers, host: str, limit: int) -> None:
        if not (host in self._names or _is_address(host)):
            raise Refused(
                400,
                "bad_host",
                "this server is not known by the name of the Host header: use its address, or name "
                "it when it is started",
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise _too_large(limit)

    def _shield(self, headers: MutableHeaders, host: str, scheme: str) -> None:
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        if "etag" not in headers:
            headers.setdefault("Cache-Control", "no-store")
        # Browsers would hold it against every other program on this machine.
        if (self._is_public_by_tls or scheme == "https") and host != "localhost":
            headers.setdefault("Strict-Transport-Security", _HSTS)


def _limited(receive: Receive, limit: int) -> Receive:
    """The body as it comes in, up to a limit."""
    left = limit

    async def receive_limited() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise _too_large(limit)
        return message

    return receive_limited


def _too_large(limit: int) -> Refused:
    return Refused(413, "too_large", f"the request is larger than {limit:,} bytes: send less")


def _answer(scope: Scope, status: int, code: str, message: str) -> Response:
    """Nothing more is read from whoever gets it: their body may be anything."""
    request, headers = Request(scope), {"Connection": "close"}
    if is_for_people(request):
        return problem_page(request, status, message, headers)
    return answer(status, code, message, headers)


def _host(header: str) -> str:
    """The name or address in a Host header, without its port; empty where it is neither."""
    match = _HOST.fullmatch(header)
    return match[1].strip("[]").rstrip(".").lower() if match else ""


def _is_address(host: str) -> bool:
    """An address is no name that could be made to point elsewhere."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
