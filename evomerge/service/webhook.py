"""Telling another program, over HTTP, how a submission ended.

Whoever may submit names the address, and is not thereby who may talk to what only this machine
reaches. So webhooks go out to public addresses alone, whatever their names mean by then, but for
hosts that the server was started with. Knows nothing of queues.
"""

import http.client
import ipaddress
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, urlsplit

from evomerge.errors import InputError
from evomerge.messages import one_line

_TIMEOUT = 10.0  # seconds for an attempt, from the look-up of the name to the head of the answer
_PAUSES = (0.0, 1.0, 5.0, 25.0)  # seconds before each attempt
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # RFC 4291, section 2.4: all that is given out
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: an IPv4 address in the last 32 bits


class _Late(OSError):
    """There was no answer in time."""


class _Refused(OSError):
    """A host that is none of those that webhooks may be at."""


def check(url: str, hosts: Collection[str] = ()) -> None:
    """Raise InputError for what is no address of a webhook: http(s), a host, no password; and for
    one in the server's own network whose host is none of `hosts`. What a name means is looked up
    when it is called."""
    host = _split(url).hostname or ""
    if not _is_known(host, hosts) and (host == "localhost" or not _may_be_public(host)):
        raise InputError(f"webhook '{url}': {_inside(host)}")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        well_formed = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:  # of a port
        well_formed = False
    if not well_formed or "@" in parts.netloc or not url.isascii() or not url.isprintable():
        raise InputError(f"webhook '{url}': give an address, http(s)://HOST[:PORT]/PATH")
    return parts


def post(
    url: str,
    document: Mapping[str, Any],
    pause: Callable[[float], bool],
    hosts: Collection[str] = (),
) -> str | None:
    """POST a JSON document, again after failures that may pass; redirects are not followed.

    pause: waits for so many seconds, and says whether to give up. hosts: see check. Gives why the
    document was not taken, None if it was.
    """
    why: str | None = "there was no time"
    for seconds in _PAUSES:
        if pause(seconds):
            return why
        try:
            status = _posted(url, json.dumps(document).encode(), hosts)
        except _Refused as error:
            return str(error)
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # the last of a host
            why = one_line(error) or type(error).__name__
            continue
        if 200 <= status < 300:
            return None
        why = f"it answered {status}"
        if status < 500 and status not in (408, 425, 429):
            return why  # it would say the same again
    return why


def _posted(url: str, body: bytes, hosts: Collection[str]) -> int:
    """The status of the answer, whose body nobody reads."""
    parts = _split(url)
    host, is_secured = parts.hostname or "", parts.scheme == "https"
    kind = http.client.HTTPSConnection if is_secured else http.client.HTTPConnection
    connection = kind(host, parts.port)
    deadline, is_late = time.monotonic() + _TIMEOUT, threading.Event()
    # No proxy, and no second look-up of the name, which might mean something else by then.
    sock = _connected(host, connection.port, _is_known(host, hosts), deadline)

    def give_up() -> None:
        is_late.set()
        with suppress(OSError):  # it is closed already
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # below TLS, which another thread is at

    # A time-out of the socket's is for each read, and a byte now and then might go on for ever.
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), give_up)
    timer.daemon = True
    try:
        if is_secured:
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
        timer.start()
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        connection.sock = sock
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Content-Type": "application/json", "User-Agent": "evomerge"}
        connection.request("POST", target, body, headers)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException):
        if is_late.is_set():
            raise _late() from None
        raise
    finally:
        timer.cancel()
        connection.close()
        sock.close()
    if is_late.is_set():  # the head was cut short
        raise _late()
    return status


def _late() -> _Late:
    return _Late(f"it has not answered within {_TIMEOUT:g} seconds")


def _connected(host: str, port: int, is_known: bool, deadline: float) -> socket.socket:
    """A connection to an address of a host that webhooks may be at. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in found]
    allowed = [address for address in addresses if is_known or _is_public(address)]
    if not allowed:
        raise _Refused(_inside(host))
    failure: OSError = _late()
    for address in allowed:
        if (left := deadline - time.monotonic()) <= 0:
            break
        try:
            return socket.create_connection((address, port), left)
        except OSError as error:
            failure = error
    raise failure


def _is_known(host: str, hosts: Collection[str]) -> bool:
    return host in {name.strip("[]").lower() for name in hosts}


def _may_be_public(host: str) -> bool:
    """A name may."""
    try:
        return _is_public(host)
    except ValueError:
        return True


def _is_public(address: str) -> bool:
    """Whether an address is one of the internet's. Raises ValueError for what is no address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour
        if found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is None:
            return found in _GLOBAL_V6 and found.is_global
        found = inner
    return found.is_global and not found.is_multicast


def _inside(host: str) -> str:
    return (
        f"'{host}' is in the server's own network: take a public address, or have the server "
        f"started with --webhook-host {host}"
    )
