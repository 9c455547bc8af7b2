"""What a server says of itself to machines that look after it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from evomerge.store import Queue, Tokens
from tests.service.serving import Served, served


@pytest.fixture
def server(searched: Path, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, searched) as found:
        yield found


def samples(server: Served) -> dict[tuple[str, str], float]:
    """By name and the one label that counts, if any."""
    found = server.client.get("/metrics")
    assert found.status_code == 200
    return {
        (sample.name, sample.labels.get("state") or sample.labels.get("route", "")): sample.value
        for family in text_string_to_metric_families(found.text)
        for sample in family.samples
    }


def test_metrics_count_searches_candidates_and_the_queue(server: Served) -> None:
    Queue(server.store).submit("search", "new", {}, by="anna")
    row = server.store.search("tiny")
    found = samples(server)
    assert found["evomerge_searches", "finished"] == 1
    assert found["evomerge_queue", "queued"] == 1
    candidates = {state: n for (name, state), n in found.items() if name == "evomerge_candidates"}
    assert sum(candidates.values()) == len(server.store.candidates(row.id))
    assert found["evomerge_gpu_seconds_total", ""] == pytest.approx(
        server.store.device_seconds(row.id)
    )
    assert found["evomerge_leads", ""] == 0


def test_requests_are_measured_by_route_whatever_is_in_the_path(server: Served) -> None:
    for name in ("tiny", "a", "b", "c"):
        server.client.get(f"/api/v1/searches/{name}")
    server.client.get("/nowhere/at/all")
    found = samples(server)
    routes = {route for name, route in found if name == "evomerge_request_seconds_count"}
    assert routes == {"/api/v1/searches/{name}", "other"}


def test_metrics_name_no_search_and_no_score(server: Served) -> None:
    text = server.client.get("/metrics").text
    assert "tiny" not in text
    labels = set(re.findall(r"(\w+)=\"", text))
    assert labels == {"state"} or labels <= {"state", "method", "route", "status", "le"}


def test_whoever_looks_after_a_server_needs_no_token_but_for_numbers(server: Served) -> None:
    Tokens(server.store).create("anna", ["admin"])
    for path in ("/healthz", "/readyz", "/version"):
        assert server.client.get(path).status_code == 200
    assert server.client.get("/metrics").status_code == 401


def test_a_server_whose_store_is_gone_is_alive_but_not_ready(
    server: Served, tmp_path: Path
) -> None:
    server.store.database.close()
    (tmp_path / "store.db").rename(tmp_path / "elsewhere.db")
    assert server.client.get("/healthz").status_code == 200
    gone = server.client.get("/readyz")
    assert gone.status_code == 503
    assert gone.json()["error"]["code"] == "unavailable"
    for method, path in (("GET", "/readyz"), ("GET", "/api/v1/searches"), ("POST", "/login")):
        body = {"token": "evm_" + "x" * 43}
        told = server.client.request(method, path, data=body, headers=_bearer(body["token"]))
        assert told.status_code in (500, 503), told.text
        assert "store.db" not in told.text  # where it is, is nobody's business yet


def _bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}
