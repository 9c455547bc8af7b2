"""Every route of a server, by everybody who might ask for it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from httpx2 import Response

from evomerge.service import access
from evomerge.service.app import create_app
from evomerge.service.scheduler import Scheduler
from evomerge.service.settings import Settings
from evomerge.store import SCOPES, Store, Tokens
from tests.running import url

SAFE = {"GET", "HEAD", "OPTIONS"}


@dataclass(frozen=True)
class Server:
    """An app, and a token's secret for each scope alone."""

    app: FastAPI
    secrets: dict[str, str]

    def routes(self) -> Iterator[tuple[str, str, APIRoute]]:
        """Method, path with every parameter filled in, and the route, of what is not public."""
        for route in self.app.routes:
            if isinstance(route, APIRoute) and route.path not in access.PUBLIC:
                for method in sorted(route.methods):
                    yield method, re.sub(r"\{[^}]*\}", "1", route.path), route

    def client(self, address: str = "10.0.0.1") -> TestClient:
        base = "http://127.0.0.1:8765"
        return TestClient(self.app, base, client=(address, 5), follow_redirects=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("scopes")
    with Store(url(folder / "store.db"), create=True) as store:
        settings = Settings(store.url, data=folder / "data", roots=(folder,))
        app = create_app(settings, store, Scheduler(settings, store))
        yield Server(app, {s: Tokens(store).create(s, [s])[1] for s in SCOPES})


@pytest.fixture
def unguarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server without any token."""
    folder = tmp_path_factory.mktemp("unguarded")
    with Store(url(folder / "store.db"), create=True) as store:
        settings = Settings(store.url, data=folder / "data", roots=(folder,))
        yield Server(create_app(settings, store, Scheduler(settings, store)), {})


def let_in(response: Response) -> bool:
    """Whether a request got as far as being looked at."""
    to_login = response.headers.get("location", "").startswith("/login")
    return response.status_code not in (401, 403) and not to_login


def test_every_route_declares_who_may_use_it(server: Server) -> None:
    assert access.undeclared(server.app.routes) == []
    assert len(list(server.routes())) > 20


def test_whatever_changes_something_needs_more_than_leave_to_read(server: Server) -> None:
    for method, path, route in server.routes():
        scopes = access.scopes_of(route)
        assert method in SAFE or scopes & {"run", "admin", "unseal"}, f"{method} {path}"
        if re.search(r"token|audit|push", path):
            assert "admin" in scopes, f"{method} {path}"


@pytest.mark.slow
def test_nothing_is_told_to_whoever_shows_nothing(server: Server) -> None:
    client = server.client()
    for method, path, _ in server.routes():
        assert not let_in(client.request(method, path)), f"{method} {path}"


@pytest.mark.slow
@pytest.mark.parametrize("held", SCOPES)
def test_a_token_gets_through_where_it_has_the_scope_and_nowhere_else(
    server: Server, held: str
) -> None:
    client = server.client()
    client.headers["Authorization"] = f"Bearer {server.secrets[held]}"
    effective = {held, "read", "run"} if held == "admin" else {held}
    for method, path, route in server.routes():
        allowed = access.scopes_of(route) <= effective
        if allowed and issubclass(_kind(route), StreamingResponse):
            continue  # it would not end
        response = client.request(method, path)
        assert let_in(response) == allowed, f"{method} {path}: {response.status_code}"
        assert response.status_code < 500, f"{method} {path}: {response.text}"


@pytest.mark.slow
def test_no_page_of_another_site_changes_anything_at_an_unguarded_server(
    unguarded: Server,
) -> None:
    client = unguarded.client("127.0.0.1")
    forms = {"Content-Type": "application/x-www-form-urlencoded"}
    for method, path, _ in unguarded.routes():
        if method not in SAFE:
            for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
                response = client.request(method, path, json={}, headers=headers)
                assert response.status_code == 403, f"{method} {path}"
            if method == "POST":
                assert client.post(path, content=b"", headers=forms).status_code == 403, path


def test_no_session_changes_anything_without_its_csrf_token(unguarded: Server) -> None:
    client = unguarded.client()
    _, secret = Tokens(unguarded.app.state.context.store).create("all", SCOPES)
    assert client.post("/login", data={"token": secret}).status_code == 303
    assert client.get("/api/v1/searches").status_code == 200
    for method, path, _ in unguarded.routes():
        for headers in ({}, {"X-CSRF-Token": "guessed"}):
            if method not in SAFE:
                response = client.request(method, path, json={}, headers=headers)
                assert response.status_code == 403, f"{method} {path}"
                assert "the CSRF token of its session" in response.text, f"{method} {path}"


def _kind(route: APIRoute) -> type:
    found = getattr(route.response_class, "value", route.response_class)
    assert isinstance(found, type)
    return found
