"""Who is let in, by token, by session and at the machine itself, and who is not."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Form, Request, Response
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.service import access, sessions
from evomerge.service.settings import Settings
from evomerge.store import SCOPES, Audit, Store, Tokens
from tests.running import url
from tests.service.serving import served

JSON = {"Content-Type": "application/json"}


@dataclass
class Server:
    """An app with a route for each scope, and its store."""

    app: FastAPI
    store: Store
    tokens: Tokens

    def client(self, address: str = "127.0.0.1", host: str = "127.0.0.1:8765") -> TestClient:
        scheme = "https" if host.startswith("https://") else "http"
        base = f"{scheme}://{host.removeprefix('https://')}"
        return TestClient(self.app, base, client=(address, 50_000), follow_redirects=False)

    def token(self, *scopes: str, name: str = "anna") -> dict[str, str]:
        """The headers of who has a new token."""
        return bearer(self.tokens.create(name, scopes)[1])

    def logged_in(self, *scopes: str, **where: str) -> TestClient:
        client = self.client(**where)
        _, secret = self.tokens.create("anna", scopes)
        assert client.post("/login", data={"token": secret}).status_code == 200
        return client

    def audited(self) -> list[tuple[str, str, str]]:
        """Oldest first."""
        return [(a.who, a.action, a.subject) for a in reversed(Audit(self.store).lines())]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def app_with_routes() -> FastAPI:
    app = FastAPI()
    for scope in SCOPES:
        _add(app, scope)

    @app.post("/form", dependencies=[access.requires("run")])
    def form(word: str = Form()) -> str:
        return word

    @app.post("/login")
    def login(request: Request, response: Response, token: str = Form()) -> str:
        return access.login(request, response, token).name

    @app.post("/logout")
    def logout(request: Request, response: Response) -> None:
        access.logout(request, response)

    return app


def _add(app: FastAPI, scope: Any) -> None:
    @app.get(f"/{scope}")
    def look(
        request: Request, who: Annotated[access.Principal, access.requires(scope)]
    ) -> dict[str, Any]:
        csrf = access.csrf_token(request)
        return {"name": who.name, "scopes": sorted(who.scopes), "at": who.address, "csrf": csrf}

    @app.post(f"/{scope}", dependencies=[access.requires(scope)])
    def act(request: Request) -> str:
        access.audit(request, "act", scope)
        return "done"

    @app.delete(f"/{scope}", dependencies=[access.requires(scope)])
    def remove() -> str:
        return "gone"


@pytest.fixture
def serve(empty: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    opened: list[Store] = []

    def started(**settings: Any) -> Server:
        shutil.copyfile(empty, tmp_path / "store.db")
        store = Store(url(tmp_path / "store.db"))
        opened.append(store)
        app = app_with_routes()
        access.install(app, Settings(store.url, **settings), store)
        return Server(app, store, Tokens(store))

    yield started
    for store in opened:
        store.database.close()


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    return serve()


# --- tokens --------------------------------------------------------------------------------------


SETS = [set(chosen) for n in range(1, 5) for chosen in itertools.combinations(SCOPES, n)]


@pytest.mark.parametrize("scopes", SETS, ids=lambda scopes: "-".join(sorted(scopes)))
def test_a_token_opens_what_its_scopes_say_and_nothing_else(
    shared: Server, scopes: set[str]
) -> None:
    headers = shared.token(*scopes, name="-".join(sorted(scopes)))
    client = shared.client("10.1.2.3")
    for wanted in SCOPES:
        included = wanted in ("read", "run") and "admin" in scopes
        expected = 200 if wanted in scopes or included else 403
        assert client.get(f"/{wanted}", headers=headers).status_code == expected
        assert client.delete(f"/{wanted}", headers=headers).status_code == expected


@given(
    credentials=st.one_of(
        st.from_regex(r"evm_[A-Za-z0-9_-]{43}", fullmatch=True),
        st.text(st.characters(min_codepoint=33, max_codepoint=126)),
    ),
    scheme=st.sampled_from(["Bearer", "bearer", "Basic", "Token", ""]),
    scope=st.sampled_from(SCOPES),
    address=st.ip_addresses(),
)
@hypothesis_settings(derandomize=True, deadline=None, max_examples=40)
def test_no_random_credentials_open_anything(
    shared: Server, credentials: str, scheme: str, scope: str, address: Any
) -> None:
    headers = {"Authorization": f"{scheme} {credentials}"}
    response = shared.client(str(address)).get(f"/{scope}", headers=headers)
    assert response.status_code in (401, 429)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that has tokens."""
    with Store(url(tmp_path_factory.mktemp("access") / "store.db"), create=True) as store:
        app = app_with_routes()
        access.install(app, Settings(store.url), store)
        Tokens(store).create("first", ["read"])
        yield Server(app, store, Tokens(store))


def test_a_revoked_or_expired_token_opens_nothing_from_the_next_request_on(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.client()
    revoked = server.token("read", name="revoked")
    expiring = bearer(server.tokens.create("expiring", ["read"], timedelta(hours=1))[1])
    assert client.get("/read", headers=revoked).status_code == 200
    assert client.get("/read", headers=expiring).status_code == 200
    server.tokens.revoke("revoked")
    monkeypatch.setattr("evomerge.store.tokens.now", lambda: "9999")
    assert client.get("/read", headers=revoked).status_code == 401
    assert client.get("/read", headers=expiring).status_code == 401


def test_a_refusal_says_what_is_lacking_and_how_to_ask(server: Server) -> None:
    headers, client = server.token("run"), server.client()
    without = client.get("/read")
    assert without.status_code == 401
    assert without.headers["www-authenticate"] == "Bearer"
    lacking = client.get("/read", headers=headers)
    assert lacking.json()["detail"] == "'anna' lacks the scope 'read': use a token that has it"


def test_changes_and_refusals_are_audited_and_no_secret_is_in_any_line(server: Server) -> None:
    _, secret = server.tokens.create("anna", ["run"])
    client, bad = server.client("10.1.2.3"), "evm_" + "x" * 43
    client.post("/run", headers=bearer(secret))
    client.post("/unseal", headers=bearer(secret))
    client.get("/read", headers=bearer(bad))
    client.get("/read")  # by whom nobody can say, as often as they like
    assert server.audited() == [
        ("anna", "act", "run"),
        ("anna", "refused", "POST /unseal"),
        ("unknown", "refused", "GET /read"),
    ]
    lines = repr(Audit(server.store).lines())
    assert secret not in lines
    assert bad not in lines
    assert "10.1.2.3" in lines


def test_who_is_refused_again_and_again_fills_no_audit_log(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: clock[0])
    _, secret = server.tokens.create("anna", ["read"])
    client = server.client()
    for _ in range(5):
        client.post("/run", headers=bearer(secret))
    client.post("/admin", headers=bearer(secret))
    once = [("anna", "refused", "POST /run"), ("anna", "refused", "POST /admin")]
    assert server.audited() == once
    clock[0] = 61
    client.post("/run", headers=bearer(secret))
    assert server.audited() == [*once, once[0]]


def test_secrets_in_what_is_audited_are_taken_out(server: Server) -> None:
    seen: list[str] = []

    @server.app.post("/odd", dependencies=[access.requires("run")])
    def odd(request: Request) -> None:
        said = ["hf_" + "A" * 30, {"deep": "evm_" + "y" * 43}]
        access.audit(request, "odd", "https://u:pw123@h/", said=said, n=1)
        seen.append("done")

    server.client().post("/odd", json={})
    (line,) = Audit(server.store).lines()
    assert line.subject == "https://u:***@h/"
    assert line.detail == {"said": ["hf_***", {"deep": "evm_***"}], "n": 1}


def test_failed_tokens_are_limited_by_address_and_a_good_one_is_not(server: Server) -> None:
    good, client = server.token("read"), server.client("10.0.0.1")
    bad = bearer("evm_" + "x" * 43)
    statuses = [client.get("/read", headers=bad).status_code for _ in range(12)]
    assert statuses == [401] * 10 + [429] * 2
    limited = client.get("/read", headers=bad)
    assert limited.status_code == 429
    assert 0 < int(limited.headers["retry-after"]) <= 30
    assert client.post("/login", data={"token": "x"}).status_code == 429
    assert client.get("/read", headers=good).status_code == 200
    assert len(server.audited()) == 10


def test_addresses_of_one_ipv6_network_count_as_one_and_mapped_ones_as_ipv4(
    server: Server,
) -> None:
    server.token("read")
    bad = bearer("evm_" + "x" * 43)
    for host in range(10):
        server.client(f"2001:db8::{host:x}").get("/read", headers=bad)
        server.client("::ffff:10.0.0.1").get("/read", headers=bad)
    assert server.client("2001:db8::ffff").get("/read", headers=bad).status_code == 429
    assert server.client("2001:db8:0:1::1").get("/read", headers=bad).status_code == 401
    assert server.client("10.0.0.1").get("/read", headers=bad).status_code == 429
    assert server.client("::ffff:10.0.0.2").get("/read", headers=bad).status_code == 401


def test_failures_are_forgiven_with_time_and_do_not_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: clock[0])
    failures = sessions.Failures()
    for _ in range(30):
        failures.add("a")
    assert failures.wait("a") == 30
    clock[0] = 30
    assert failures.wait("a") == 0
    failures.add("a")
    assert failures.wait("a") == 30
    clock[0] = 1000
    for number in range(20_000):
        failures.add(str(number))
    assert len(failures._left) == 4096
    assert failures.wait("19999") == 0


# --- at the machine itself -----------------------------------------------------------------------


def test_without_any_token_whoever_sits_at_the_machine_may_do_everything(server: Server) -> None:
    client = server.client()
    assert client.get("/unseal").json()["name"] == "local"
    assert client.get("/unseal").json()["scopes"] == sorted(SCOPES)
    assert client.post("/admin", json={}).status_code == 200
    assert client.delete("/admin").status_code == 200
    assert server.client("::1", "[::1]:8765").get("/read").status_code == 200
    assert server.client("127.0.0.1", "localhost:9000").get("/read").status_code == 200


def test_once_a_token_was_made_the_machine_itself_needs_one_even_if_it_is_revoked(
    server: Server,
) -> None:
    client = server.client()
    assert client.get("/read").status_code == 200
    server.token("read")
    assert client.get("/read").status_code == 401
    server.tokens.revoke("anna")
    assert client.get("/read").status_code == 401


@pytest.mark.parametrize(
    ("address", "host", "headers"),
    [
        ("10.0.0.1", "127.0.0.1:8765", {}),
        ("127.0.0.1", "evomerge.example", {}),
        ("127.0.0.1", "10.0.0.1:8765", {}),
        ("127.0.0.1", "0.0.0.0:8765", {}),
        ("127.0.0.1", "127.0.0.1:8765", {"X-Forwarded-For": "10.0.0.1"}),
        ("127.0.0.1", "127.0.0.1:8765", {"Forwarded": "for=10.0.0.1"}),
        ("127.0.0.1", "127.0.0.1:8765", {"Via": "1.1 proxy"}),
        ("127.0.0.1", "127.0.0.1:8765", {"Authorization": "Basic YTpi"}),
        ("unix", "127.0.0.1:8765", {}),
    ],
)
def test_whoever_may_come_from_elsewhere_is_not_taken_for_local(
    server: Server, address: str, host: str, headers: dict[str, str]
) -> None:
    assert server.client(address, host).get("/read", headers=headers).status_code == 401


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0"},
        {"host": "10.0.0.1"},
        {"public_url": "https://evomerge.example"},
        {"proxies": ("127.0.0.1",)},
    ],
)
def test_a_server_that_others_can_reach_takes_nobody_for_local(
    serve: Callable[..., Server], settings: dict[str, Any]
) -> None:
    assert serve(**settings).client().get("/read").status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {**JSON, "Origin": "http://evil.example"},
        {**JSON, "Origin": "null"},
        {**JSON, "Origin": "http://127.0.0.1:3000"},
        {**JSON, "Origin": "https://127.0.0.1:8765"},
        {**JSON, "Sec-Fetch-Site": "cross-site"},
        {**JSON, "Sec-Fetch-Site": "same-site"},
    ],
)
def test_what_a_page_of_another_site_could_send_changes_nothing(
    server: Server, headers: dict[str, str]
) -> None:
    response = server.client().post("/run", content=b"{}", headers=headers)
    assert response.status_code == 403
    assert "not accepted" in response.json()["detail"]
    assert server.audited() == []


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH"])
def test_other_methods_from_another_site_are_refused_by_their_origin(
    server: Server, method: str
) -> None:
    server.app.api_route("/any", methods=[method], dependencies=[access.requires("run")])(
        lambda: "done"
    )
    client = server.client()
    assert client.request(method, "/any").status_code == 200
    evil = {"Origin": "http://evil.example"}
    assert client.request(method, "/any", headers=evil).status_code == 403


def test_other_sites_may_link_here_but_not_ask_for_anything_themselves(server: Server) -> None:
    client = server.client()
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    image = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}
    assert client.get("/read", headers=link).status_code == 200
    assert client.get("/read", headers=image).status_code == 403
    assert client.get("/read", headers=own).status_code == 200


def test_a_form_of_our_own_page_carries_the_token_that_lets_it_through(server: Server) -> None:
    client = server.client()
    csrf = client.get("/read").json()["csrf"]
    assert client.post("/form", data={"word": "yes", "csrf": csrf}).json() == "yes"
    files = {"word": (None, "yes"), "csrf": (None, csrf)}  # multipart
    assert client.post("/form", files=files).json() == "yes"
    assert client.post("/form", data={"word": "yes", "csrf": "x" + csrf}).status_code == 403
    assert client.post("/form", data={"word": "yes", "csrf": "é"}).status_code == 403


# --- sessions ------------------------------------------------------------------------------------


def test_a_session_may_do_what_its_token_may(server: Server) -> None:
    client = server.logged_in("read", "run")
    seen = client.get("/read").json()
    assert seen["name"] == "anna"
    assert client.post("/run", headers={"X-CSRF-Token": seen["csrf"]}).status_code == 200
    assert client.post("/form", data={"word": "yes", "csrf": seen["csrf"]}).json() == "yes"
    assert client.get("/admin").status_code == 403
    assert ("anna", "login", "anna") in server.audited()


@pytest.mark.parametrize(
    "headers", [{}, JSON, {"X-CSRF-Token": ""}, {"X-CSRF-Token": "x" * 43}, {"Origin": "null"}]
)
def test_a_session_changes_nothing_without_its_csrf_token(
    server: Server, headers: dict[str, str]
) -> None:
    client = server.logged_in("run")
    assert client.post("/run", content=b"{}", headers=headers).status_code == 403


def test_the_csrf_token_of_another_session_and_another_origin_do_not_help(server: Server) -> None:
    client = server.logged_in("read", "run")
    other = server.client()
    _, secret = server.tokens.create("bert", ["read"])
    other.post("/login", data={"token": secret})
    theirs, own = other.get("/read").json()["csrf"], client.get("/read").json()["csrf"]
    assert client.post("/run", headers={"X-CSRF-Token": theirs}).status_code == 403
    evil = {"X-CSRF-Token": own, "Origin": "http://evil.example"}
    assert client.post("/run", headers=evil).status_code == 403


def test_the_cookie_is_kept_from_scripts_and_other_sites_and_from_plain_http_under_tls(
    server: Server,
) -> None:
    _, secret = server.tokens.create("anna", ["read"])
    plain = server.client().post("/login", data={"token": secret}).headers["set-cookie"]
    assert plain.startswith("evomerge_8765=")
    assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(plain.split("; "))
    assert "Domain" not in plain
    assert secret not in plain
    secure = server.client(host="https://evomerge.example")
    cookie = secure.post("/login", data={"token": secret}).headers["set-cookie"]
    assert cookie.startswith("__Host-evomerge_8765=")
    assert {"HttpOnly", "Path=/", "SameSite=strict", "Secure"} <= set(cookie.split("; "))


def test_every_login_gives_another_session_and_never_one_that_was_offered(server: Server) -> None:
    _, secret = server.tokens.create("anna", ["read"])

    def after(cookie: str) -> str:
        """The cookie of a login that came with another."""
        headers = {"Cookie": f"evomerge_8765={cookie}"}
        response = server.client().post("/login", data={"token": secret}, headers=headers)
        return response.cookies["evomerge_8765"]

    def opens(cookie: str) -> bool:
        headers = {"Cookie": f"evomerge_8765={cookie}"}
        return server.client().get("/read", headers=headers).status_code == 200

    first = after("chosen-by-another")
    assert opens(first)
    assert not opens("chosen-by-another")
    second = after(first)
    assert opens(second)
    assert not opens(first)


def test_a_login_with_a_bad_token_or_from_another_site_opens_no_session(server: Server) -> None:
    _, secret = server.tokens.create("anna", ["read"])
    client = server.client()
    bad = client.post("/login", data={"token": "evm_" + "x" * 43})
    assert bad.status_code == 401
    evil = client.post("/login", data={"token": secret}, headers={"Origin": "http://evil.example"})
    assert evil.status_code == 403
    assert not client.cookies
    assert client.get("/read").status_code == 401


def test_a_session_ends_with_a_logout_and_with_its_token(server: Server) -> None:
    client = server.logged_in("read")
    cookie = client.cookies["evomerge_8765"]
    client.post("/logout")
    assert not client.cookies
    client.cookies.set("evomerge_8765", cookie)
    assert client.get("/read").status_code == 401
    _, secret = server.tokens.create("bert", ["read"])
    other = server.client()
    other.post("/login", data={"token": secret})
    assert other.get("/read").status_code == 200
    server.tokens.revoke("bert")
    assert other.get("/read").status_code == 401


def test_sessions_end_when_idle_and_at_last_however_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    hour, clock = 3600.0, [0.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: clock[0])
    kept = sessions.Sessions()
    idle, busy = kept.open(1), kept.open(2)
    for at in range(1, 7 * 24 + 1):
        clock[0] = at * hour
        assert kept.use(busy.id) == busy
    assert kept.use(idle.id) is None
    clock[0] = (7 * 24 + 1) * hour
    assert kept.use(busy.id) is None


def test_a_token_has_a_bounded_number_of_sessions_and_others_keep_theirs() -> None:
    kept = sessions.Sessions()
    other = kept.open(2)
    opened = [kept.open(1) for _ in range(25)]
    assert [kept.use(session.id) for session in opened[:5]] == [None] * 5
    assert all(kept.use(session.id) for session in opened[5:])
    assert kept.use(other.id) == other
    assert len({session.id for session in opened}) == 25


def test_a_stream_that_is_open_for_long_ends_with_its_token(server: Server) -> None:
    held: list[bool] = []

    @server.app.get("/events", dependencies=[access.requires("read")])
    def events(request: Request) -> None:
        held.append(access.still(request, "read"))
        server.tokens.revoke("anna")
        held.append(access.still(request, "read"))

    server.client().get("/events", headers=server.token("read"))
    assert held == [True, False]


def test_a_local_stream_ends_when_the_first_token_is_made(server: Server) -> None:
    held: list[bool] = []

    @server.app.get("/events", dependencies=[access.requires("read")])
    def events(request: Request) -> None:
        held.append(access.still(request, "read"))
        server.token("read")
        held.append(access.still(request, "read"))

    server.client().get("/events")
    assert held == [True, False]


# --- what is declared, and where one may serve ---------------------------------------------------


def test_a_route_without_a_scope_is_named(server: Server) -> None:
    documented = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
    assert set(access.undeclared(server.app.routes)) == documented
    server.app.get("/open")(lambda: "all of it")
    assert "/open" in access.undeclared(server.app.routes)


def test_the_scope_is_found_where_a_dependency_of_a_dependency_requires_it() -> None:
    app = FastAPI()

    def inner(who: Annotated[access.Principal, access.requires("admin")]) -> str:
        return who.name

    @app.get("/deep", dependencies=[Depends(inner)])
    def deep() -> None: ...

    (route,) = [route for route in app.routes if getattr(route, "path", "") == "/deep"]
    assert access.scopes_of(route) == {"admin"}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"host": "0.0.0.0"}, "0.0.0.0"),
        ({"host": "::"}, "::"),
        ({"host": "gpubox"}, "gpubox"),
        ({"public_url": "https://evomerge.example"}, "https://evomerge.example"),
        ({"proxies": ("127.0.0.1",)}, "a reverse proxy"),
    ],
)
def test_serving_others_without_a_usable_token_is_refused_in_one_line(
    server: Server, changes: dict[str, Any], where: str
) -> None:
    settings = replace(Settings(server.store.url), **changes)
    with pytest.raises(InputError) as refused:
        access.check_exposure(settings, server.tokens.all())
    assert str(refused.value) == (
        f"serving on {where} needs a token that says who may: make one with: evomerge token create "
        "NAME, or serve on 127.0.0.1"
    )
    server.token("read")
    server.tokens.revoke("anna")
    with pytest.raises(InputError):
        access.check_exposure(settings, server.tokens.all())
    server.token("read", name="bert")
    access.check_exposure(settings, server.tokens.all())


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "tls_cert": Path("cert.pem")}, False),
        ({"public_url": "https://evomerge.example", "proxies": ("10.0.0.2",)}, False),
        ({"public_url": "http://evomerge.example"}, True),
    ],
)
def test_serving_others_without_tls_is_warned_of(
    server: Server, changes: dict[str, Any], warned: bool
) -> None:
    server.token("read")
    settings = replace(Settings(server.store.url), **changes)
    warnings = access.check_exposure(settings, server.tokens.all())
    assert bool(warnings) == warned
    assert all("without TLS" in warning for warning in warnings)


# --- forms of strangers --------------------------------------------------------------------------

_NO_FORM = {"content": b"%" * 1000, "headers": {"Content-Type": "multipart/form-data"}}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/new", "/searches/a/extend", "/api/v1/searches/a/pause"])
def test_a_form_is_parsed_for_nobody_who_is_not_known(tmp_path: Path, path: str) -> None:
    with served(tmp_path) as here:
        known = here.client.post(path, **_NO_FORM)  # 'local' is
        assert known.status_code == 400
        assert path.startswith("/api") or "Not understood" in known.text
        Tokens(here.store).create("a", ["run"])
        found = here.client.post(path, **_NO_FORM, follow_redirects=False)
        assert found.status_code == (401 if path.startswith("/api") else 303)
        bad = {**_NO_FORM["headers"], "Authorization": "Bearer evm_no"}
        found = here.client.post(path, content=b"", headers=bad, follow_redirects=False)
        assert found.status_code == (401 if path.startswith("/api") else 303)


def test_what_is_parsed_for_anybody_is_short(tmp_path: Path) -> None:
    with served(tmp_path) as here:
        assert here.client.post("/login", content=b"%" * 20_000).status_code == 413
