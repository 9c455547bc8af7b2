"""Serving: the app and the scheduler in one process, from start to a stop that loses nothing."""

import gc
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from evomerge.errors import InputError
from evomerge.messages import one_line
from evomerge.service import access, checking
from evomerge.service.app import create_app
from evomerge.service.redaction import redact_logs
from evomerge.service.scheduler import Scheduler
from evomerge.service.settings import Settings
from evomerge.store import Store, Tokens, exists

_OPENED = {
    "": "127.0.0.1",
    "0.0.0.0": "127.0.0.1",
    "::": "::1",
}  # what is listened on: what to open
_GRACE = 10  # seconds that requests have to end
_CONNECTIONS = 2000  # beyond, everybody is told 503; each holds a file and some memory
_LANDING = 60.0  # seconds that evaluations have to land


def serve(settings: Settings, tell: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; `tell` hears where, and of what is worth knowing.

    Raises InputError where that cannot be: an address that is taken, files of TLS or folders that
    are not there, others than this machine without a token; StoreError.
    """
    _check_files(settings)
    with _bound(settings) as listening:
        exposure = _exposure(settings)
        _make(settings.data)
        with Store(settings.store, create=True) as store:
            for warning in (*store.warnings, *exposure):
                tell(warning)
            _serve(settings, listening, store, tell)


def _serve(
    settings: Settings, listening: socket.socket, store: Store, tell: Callable[[str], None]
) -> None:
    """What may be served, where it can be."""
    scheduler = Scheduler(settings, store)
    app = create_app(settings, store, scheduler)

    def end_what_lasts() -> None:
        app.state.context.broadcaster.close()
        checking.end_all()

    server = StreamingServer(_config(settings, app), end_what_lasts)
    redact_logs()
    scheduler.start()
    # What was loaded to serve is left alone: to search it takes a tenth of a second, of some
    # request in five that read much.
    gc.freeze()
    try:
        tell(f"evomerge serves {store.database.shown} on {url(settings, listening)}")
        server.run(sockets=[listening])
    finally:
        gc.unfreeze()
        if scheduler.running:
            tell("evaluations under way land; searches go on with the next server")
        scheduler.stop(_LANDING)


def url(settings: Settings, listening: socket.socket) -> str:
    """Where browsers find a server; of one at all addresses, those of this machine."""
    if settings.public_url is not None:
        return settings.public_url
    scheme = "http" if settings.tls_cert is None else "https"
    host = _OPENED.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{listening.getsockname()[1]}"


class StreamingServer(uvicorn.Server):
    """One that ends what would go on for long, as streams of events, and takes a signal for an end
    like any other."""

    def __init__(self, config: uvicorn.Config, end_what_lasts: Callable[[], None]) -> None:
        super().__init__(config)
        self._end_what_lasts = end_what_lasts

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._end_what_lasts()
        await super().shutdown(sockets)


def _config(settings: Settings, app: FastAPI) -> uvicorn.Config:
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    return uvicorn.Config(
        app,
        log_config=None,  # as everything else is logged
        access_log=False,
        server_header=False,
        proxy_headers=False,  # see middleware
        ssl_certfile=settings.tls_cert,
        ssl_keyfile=settings.tls_key,
        timeout_graceful_shutdown=_GRACE,
        limit_concurrency=_CONNECTIONS,
    )


@contextmanager
def _bound(settings: Settings) -> Iterator[socket.socket]:
    """A socket at the address of the settings."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server((settings.host, settings.port), family=family)
    except (OSError, OverflowError) as error:
        raise InputError(
            f"{settings.host}:{settings.port} cannot be served: {one_line(error)}: choose another "
            "--host or --port"
        ) from None
    with listening:
        # Accepted ones inherit it: the body of an answer does not wait until its head is
        # acknowledged, which clients put off for 40 ms. asyncio sees to it only of sockets that
        # name their protocol.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield listening


def _check_files(settings: Settings) -> None:
    if (settings.tls_cert is None) != (settings.tls_key is None):
        raise InputError("TLS needs both: give --tls-cert and --tls-key")
    for option, file in (("--tls-cert", settings.tls_cert), ("--tls-key", settings.tls_key)):
        if file is not None and not file.is_file():
            raise InputError(f"{option}: there is no file '{file}': correct the path")
    for root in settings.roots:
        if not root.is_dir():
            raise InputError(f"--root: there is no folder '{root}': make it, or correct the path")


def _exposure(settings: Settings) -> list[str]:
    """See access.check_exposure. A store that is not there yet is not made for it."""
    if not exists(settings.store):
        return access.check_exposure(settings, ())
    with Store(settings.store) as store:
        return access.check_exposure(settings, Tokens(store).all())


def _make(data: Path) -> None:
    try:
        data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--data: '{data}' cannot be made: {one_line(error)}") from None
