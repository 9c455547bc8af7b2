"""What every request passes, and what every response says to a browser: over real connections."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import pytest
import uvicorn
from fastapi import FastAPI, Form, Request
from fastapi.responses import HTMLResponse
from fastapi.testclient import TestClient

from evomerge.errors import InputError
from evomerge.service import middleware
from evomerge.service.redaction import redact_logs, redacted
from evomerge.service.settings import Settings

STRICT = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; object-src 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def app(**settings: Any) -> FastAPI:
    made = FastAPI()

    @made.get("/page")
    def page(request: Request) -> dict[str, Any]:
        client = request.client and request.client.host
        return {"client": client, "scheme": request.url.scheme}

    @made.post("/echo")
    async def echo(request: Request) -> int:
        return len(await request.body())

    @made.post("/json")
    def parsed(body: dict[str, Any]) -> int:
        return len(body)

    @made.post("/form")
    def form(word: Annotated[str, Form()]) -> int:
        return len(word)

    @made.get("/report")
    def report() -> HTMLResponse:
        own = {"Content-Security-Policy": "sandbox", "Cache-Control": "no-cache"}
        return HTMLResponse("<p>", headers=own)

    @made.get("/broken")
    def broken() -> None:
        raise RuntimeError("evm_" + "z" * 43)

    middleware.install(made, Settings("sqlite:///x.db", **settings))
    return made


def client(host: str = "127.0.0.1:8765", **settings: Any) -> TestClient:
    scheme = "https" if host.startswith("https://") else "http"
    base = f"{scheme}://{host.removeprefix('https://')}"
    return TestClient(app(**settings), base, client=("10.0.0.1", 5), raise_server_exceptions=False)


# --- what responses say --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/page", "127.0.0.1", 200),
        ("GET", "/nowhere", "127.0.0.1", 404),
        ("POST", "/page", "127.0.0.1", 405),
        ("POST", "/json", "127.0.0.1", 422),
        ("GET", "/broken", "127.0.0.1", 500),
        ("GET", "/page", "evil.example", 400),
    ],
)
def test_every_response_keeps_scripts_frames_and_guesses_of_its_kind_away(
    method: str, path: str, host: str, status: int
) -> None:
    response = client(host).request(method, path)
    assert response.status_code == status
    assert STRICT.items() <= dict(response.headers).items()
    assert "strict-transport-security" not in response.headers


def test_a_response_with_a_policy_of_its_own_keeps_it() -> None:
    headers = client().get("/report").headers
    assert headers["content-security-policy"] == "sandbox"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-content-type-options"] == "nosniff"


def test_under_tls_browsers_are_told_to_stay_with_it_but_never_for_localhost() -> None:
    name = "strict-transport-security"
    assert client("https://127.0.0.1").get("/page").headers[name] == "max-age=31536000"
    proxied = client("evomerge.example", public_url="https://evomerge.example")
    assert proxied.get("/page").headers[name] == "max-age=31536000"
    assert name not in client("https://localhost").get("/page").headers


def test_a_failure_says_nothing_of_its_cause_to_whoever_asked() -> None:
    response = client().get("/broken")
    assert response.json() == {
        "error": {"code": "internal", "message": "evomerge failed: its log says why"}
    }


# --- the Host header -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST:9000", "localhost.", "[::1]:8765", "10.1.2.3", "gpubox"],
)
def test_a_server_answers_to_its_addresses_and_names(host: str) -> None:
    settings = {"hosts": ("gpubox",)}
    response = client(**settings).get("/page", headers={"Host": host})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[::1",
        "",
        "a@localhost:b",
    ],
)
def test_a_name_that_was_made_to_point_here_is_refused(host: str) -> None:
    response = client().get("/page", headers={"Host": host})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "bad_host"


def test_the_name_that_a_proxy_serves_under_is_a_name_of_the_server() -> None:
    made = client(public_url="https://Evomerge.example/base")
    assert made.get("/page", headers={"Host": "evomerge.example"}).status_code == 200


# --- bodies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/echo", "/json", "/form"])
def test_a_body_larger_than_allowed_is_refused_by_what_it_says_of_itself(path: str) -> None:
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    response = client(max_body=1000).post(path, content=b"x" * 1001, headers=form)
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/echo", "text/plain"),
        ("/json", "application/json"),
        ("/form", "application/x-www-form-urlencoded"),
        ("/form", "multipart/form-data; boundary=x"),
    ],
)
def test_a_body_that_does_not_say_how_long_it_is_is_refused_once_it_is_too_long(
    path: str, kind: str
) -> None:
    pieces = (b"x" * 100 for _ in range(10_000))
    response = client(max_body=1000).post(path, content=pieces, headers={"Content-Type": kind})
    assert response.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "host", "status", "said"),
    [
        ("POST", "/form", "127.0.0.1:8765", 413, "larger than 1,000 bytes"),
        ("GET", "/page", "evil.example", 400, "the Host header"),
        ("GET", "/page", "[::1", 400, "the Host header"),
        ("GET", "/broken", "127.0.0.1:8765", 500, "its log says why"),
    ],
)
def test_a_browser_is_shown_a_page_of_what_was_refused(
    method: str, path: str, host: str, status: int, said: str
) -> None:
    headers = {"Accept": "text/html,*/*;q=0.8", "Host": host}
    body = b"x" * 1001 if method == "POST" else b""
    response = client(max_body=1000).request(method, path, content=body, headers=headers)
    assert response.status_code == status
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["connection"] == "close"
    assert STRICT.items() <= dict(response.headers).items()
    assert "<h1>" in response.text
    assert said in response.text


def test_a_program_is_told_as_ever_what_was_refused() -> None:
    large = {"content": b"x" * 1001}
    for path, accept in (("/form", "*/*"), ("/api/v1/searches", "text/html")):
        response = client(max_body=1000).post(path, headers={"Accept": accept}, **large)
        assert response.json()["error"]["code"] == "too_large"


def test_a_body_as_large_as_allowed_is_read_whole() -> None:
    made = client(max_body=1000)
    assert made.post("/echo", content=b"x" * 1000).json() == 1000
    assert made.post("/echo", content=(b"x" * 100 for _ in range(10))).json() == 1000


# --- over a socket -------------------------------------------------------------------------------


class Handler(logging.Handler):
    """Keeps the lines that are logged."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextmanager
def serving(app: FastAPI) -> Iterator[int]:
    """The port of a real server."""
    config = uvicorn.Config(app, port=0, proxy_headers=False, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(
            target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True
        )
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


def sent(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


@pytest.fixture
def logged() -> Iterator[Callable[[str, logging.Formatter], Handler]]:
    added: list[tuple[logging.Logger, Handler, int]] = []

    def listen(name: str, formatter: logging.Formatter) -> Handler:
        logger, handler = logging.getLogger(name), Handler(formatter)
        added.append((logger, handler, logger.level))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return handler

    yield listen
    for logger, handler, level in added:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_chunks_hosts_proxies_and_logs_of_a_real_server(
    logged: Callable[[str, logging.Formatter], Handler],
) -> None:
    secret = "evm_" + "s" * 43
    line = '%(client_addr)s - "%(request_line)s" %(status_code)s'
    visits = logged("uvicorn.access", uvicorn.logging.AccessFormatter(line, use_colors=False))
    errors = logged("uvicorn.error", logging.Formatter("%(message)s"))
    redact_logs()
    with serving(app(max_body=1000, proxies=("127.0.0.1",))) as port:
        host = f"Host: localhost:{port}\r\nConnection: close\r\n".encode()
        chunks = b"200\r\n" + b"x" * 0x200 + b"\r\n"
        chunked = b"POST /echo HTTP/1.1\r\n" + host + b"Transfer-Encoding: chunked\r\n\r\n"
        assert sent(port, chunked + chunks + b"0\r\n\r\n")[::2] == (200, b"512")
        status, headers, _ = sent(port, chunked + chunks * 2 + b"0\r\n\r\n")
        assert status == 413
        assert STRICT.items() <= headers.items()
        proxied = b"X-Forwarded-For: 6.6.6.6, 10.9.8.7\r\nX-Forwarded-Proto: https\r\n\r\n"
        _, headers, body = sent(port, b"GET /page HTTP/1.1\r\n" + host + proxied)
        assert json.loads(body) == {"client": "10.9.8.7", "scheme": "https"}
        named = f"GET /page?token={secret} HTTP/1.1\r\n".encode()
        assert sent(port, named + host + b"\r\n")[0] == 200
        assert sent(port, b"GET /broken HTTP/1.1\r\n" + host + b"\r\n")[0] == 500
        assert sent(port, b"GET /page HTTP/1.0\r\n\r\n")[0] == 400  # without any host
    assert any("10.9.8.7" in line for line in visits.lines)
    assert any("GET /page?token=evm_*** HTTP/1.1" in line for line in visits.lines)
    assert any("RuntimeError: evm_***" in line for line in errors.lines)
    assert "sss" not in "".join(visits.lines)
    assert "zzz" not in "".join(errors.lines)


def test_without_a_trusted_proxy_nobody_says_for_whom_they_ask() -> None:
    claims = {"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https"}
    for settings in ({}, {"proxies": ("10.0.0.2", "10.1.0.0/16")}):
        seen = client(**settings).get("/page", headers=claims).json()
        assert seen == {"client": "10.0.0.1", "scheme": "http"}
    trusted = client(proxies=("10.0.0.0/24",)).get("/page", headers=claims).json()
    assert trusted == {"client": "127.0.0.1", "scheme": "https"}


@pytest.mark.parametrize("proxy", ["*", "proxy.example", "0.0.0.0/0", "::/0", "10.0.0.1/24", ""])
def test_a_proxy_that_could_be_anybody_is_refused(proxy: str) -> None:
    with pytest.raises(InputError, match="proxy '"):
        app(proxies=(proxy,))


# --- secrets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Authorization: Bearer abcdefghijk", "Authorization: Bearer ***"),
        ("token=evm_" + "a-_9" * 10 + "abc&x=1", "token=evm_***&x=1"),
        ("hf_" + "A" * 34 + " is refused", "hf_*** is refused"),
        ("postgresql://anna:p@ss/w:rd@db/evo", "postgresql://anna:***@db/evo"),
        ("https://:secret@host/x", "https://:***@host/x"),
        ("postgresql://h/d?user=u&password=secret", "postgresql://h/d?user=u&password=***"),
        ("http://127.0.0.1:8765/searches", "http://127.0.0.1:8765/searches"),
        ("the method evm_x and hf_home", "the method evm_x and hf_home"),
    ],
)
def test_what_is_secret_is_taken_out_of_a_text_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize("part", ["://a:", "://", "://a:@ ", "bearer ", "evm_", "?password="])
def test_text_that_was_made_to_take_long_takes_no_longer_than_other_text(part: str) -> None:
    begun = time.process_time()
    redacted(part * (200_000 // len(part)))
    assert time.process_time() - begun < 10  # a minute, were it in proportion to its square


def test_the_tokens_of_the_environment_are_taken_out_whatever_they_look_like(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "correct horse battery")
    assert redacted("it said: correct horse battery!") == "it said: ***!"
    monkeypatch.setenv("HF_TOKEN", "")
    assert redacted("anything") == "anything"


def test_exceptions_and_arguments_of_any_kind_are_logged_without_secrets(
    logged: Callable[[str, logging.Formatter], Handler],
) -> None:
    handler = logged("uvicorn", logging.Formatter("%(message)s"))
    redact_logs()
    redact_logs()
    assert len(handler.filters) == 1
    error = ValueError("postgresql://u:hunter22@h/db")
    try:
        raise error
    except ValueError:
        logging.getLogger("uvicorn").exception("%s for %d: %r", "evm_" + "k" * 43, 3, error)
    (line,) = handler.lines
    assert line.startswith("evm_*** for 3: ValueError('postgresql://u:***@h/db')")
    assert "hunter22" not in line
