"""The API over a finished search, and over a queue."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.search import summary
from evomerge.service import access, checking, steering
from evomerge.service.folders import export_folder, log_file
from evomerge.service.problems import Busy
from evomerge.store import Audit, Queue, Submission, Tokens, queue
from tests import tiny
from tests.service.serving import Served, served

KEY = "Idempotency-Key"


@pytest.fixture
def server(searched: Path, tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, searched) as found:
        yield found


@pytest.fixture(scope="module")
def reader(searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Of tests that change nothing."""
    with served(tmp_path_factory.mktemp("read"), searched) as found:
        yield found


@pytest.fixture
def job(searched: Path) -> dict[str, Any]:
    """A job that the server may run."""
    document = yaml.safe_load((searched.parent / "job.yaml").read_text())
    return document | {"name": "another"}


def _winner(server: Served) -> int:
    row = server.store.search("tiny")
    assert row.verdict
    return int(row.verdict["winner"])


# --- reading -------------------------------------------------------------------------------------


def test_searches_are_listed_with_what_their_winners_are_worth(reader: Served) -> None:
    found = reader.get("/searches")
    assert (found["total"], found["next"]) == (1, None)
    (one,) = found["items"]
    row = reader.store.search("tiny")
    assert row.verdict
    assert (one["name"], one["state"], one["submission"]) == ("tiny", "finished", None)
    assert one["validation"]["value"] == row.verdict["estimates"]["validation"]["value"]
    assert one["gain"]["value"] == row.verdict["validation_gain"]["value"]
    assert one["spent"]["candidates"] == {"used": 8, "allowed": 8}
    assert reader.get("/searches?state=queued")["items"] == []


def test_a_search_is_shown_as_the_command_line_shows_it(reader: Served) -> None:
    found = reader.get("/searches/tiny")
    assert found["summary"] == json.loads(json.dumps(summary.show(reader.store, "tiny")))
    assert found["job"] == reader.store.search("tiny").job


def test_candidates_come_page_by_page_each_once(reader: Served) -> None:
    whole = reader.get("/searches/tiny/candidates?sort=fitness&limit=500")
    seen, cursor = [], None
    while True:
        query = {"sort": "fitness", "limit": 3} | ({"cursor": cursor} if cursor else {})
        page = reader.get("/searches/tiny/candidates", params=query)
        seen += page["items"]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == whole["items"]
    assert len({one["id"] for one in seen}) == whole["total"]


@pytest.mark.parametrize(
    "part", ["history", "front", "lineage", "gap", "costs", "failures", "importance", "exports"]
)
def test_every_part_of_a_search_can_be_asked_for(reader: Served, part: str) -> None:
    assert reader.get(f"/searches/tiny/{part}") is not None
    assert reader.refused(404, "GET", f"/searches/unknown/{part}") == "not_found"


def test_a_candidate_is_told_in_full_and_in_parts(reader: Served) -> None:
    id = _winner(reader)
    whole = reader.get(f"/searches/tiny/candidates/{id}")
    assert whole["winner"]
    assert reader.get(f"/searches/tiny/candidates/{id}/scores") == whole["tasks"]
    assert reader.get(f"/searches/tiny/candidates/{id}/samples") is not None
    beside = reader.get(f"/searches/tiny/candidates/{id}/comparison")
    assert beside == {"comparisons": whole["comparisons"], "difference": None}
    recipe = reader.client.get(f"/api/v1/searches/tiny/candidates/{id}/recipe")
    assert recipe.headers["content-type"] == "application/yaml"
    assert yaml.safe_load(recipe.text)["merge_method"]
    others = reader.get("/searches/tiny/candidates?sort=generation&order=ascending")["items"]
    other = next(one["id"] for one in others if one["state"] == "scored" and one["id"] != id)
    with_other = reader.get(f"/searches/tiny/candidates/{id}/comparison?other={other}")
    assert f"--- {other}" in with_other["difference"]


def test_what_is_not_there_is_not_found(reader: Served) -> None:
    for path in ("/searches/other", "/searches/tiny/candidates/99999", "/searches/tiny/exports/7"):
        assert reader.refused(404, "GET", path) == "not_found"
    assert reader.refused(404, "GET", "/nowhere") == "not_found"
    assert reader.refused(405, "DELETE", "/searches") == "method_not_allowed"


def test_what_makes_no_sense_is_refused_in_one_line(reader: Served) -> None:
    found = reader.client.get("/api/v1/searches/tiny/candidates?limit=0")
    assert found.status_code == 422
    assert found.json()["error"] == {
        "code": "invalid",
        "message": "query.limit: '0': input should be greater than or equal to 1",
    }
    path = "/searches/tiny/candidates"
    assert reader.refused(422, "GET", f"{path}?limt=3") == "invalid"
    assert reader.refused(422, "GET", path, params={"cursor": "nonsense"}) == "invalid"
    assert reader.refused(422, "POST", "/searches", json={"job": {}, "more": 1}) == "invalid"


def test_what_was_made_says_where_it_is_and_a_path_which_methods_it_has(
    server: Served, job: dict[str, Any]
) -> None:
    made = server.client.post("/api/v1/searches", json={"job": job})
    assert made.headers["Location"] == "/api/v1/searches/another"
    other = server.client.put("/api/v1/searches")
    assert (other.status_code, other.headers["Allow"]) == (405, "GET, HEAD, POST")


def test_whatever_can_be_got_has_a_head(server: Served) -> None:
    for path in ("/healthz", "/metrics", "/api/v1/searches", "/api/v1/openapi.json"):
        got, head = server.client.get(path), server.client.head(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["Content-Type"] == got.headers["Content-Type"], path
    assert server.client.head("/api/v1/searches/nothing").status_code == 404
    assert server.client.head("/api/v1/events").status_code == 405  # it would not end
    assert "head" not in server.get("/openapi.json")["paths"]["/api/v1/searches"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/version", "/", "/login"])
def test_what_can_be_read_can_be_asked_after(reader: Served, path: str) -> None:
    found = reader.client.head(path)
    assert (found.status_code, found.content) == (200, b"")


def test_of_a_long_queue_a_page_reads_no_more_than_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def counted(row: Any) -> Submission:
        read.append(row)
        return whole(row)

    whole = queue._submission
    with served(tmp_path) as here:
        for n in range(30):
            here.context.queue.submit("search", f"s{n}", {"name": f"s{n}"}, by="ada")
        monkeypatch.setattr(queue, "_submission", counted)
        assert len(here.get("/searches?limit=5")["items"]) == 5
        assert here.get("/searches/s29")["place"] == 30
        assert here.get("/workers")["waiting"] == 30
        assert here.client.get("/exports").status_code == 200
    assert len(read) < 10


def test_who_has_jobs_looked_at_leaves_room_for_all_other_requests() -> None:
    with ExitStack() as taken:
        for _ in range(3):
            assert checking._asked.acquire(blocking=False)
            taken.callback(checking._asked.release)
        with pytest.raises(Busy, match="try again in a minute"):
            checking.find_out("plan", {}, "sqlite:///none.db")


def test_more_than_anybody_needs_does_not_wait(
    server: Served, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "_WAITING", 1)
    assert server.client.post("/api/v1/searches", json={"job": job}).status_code == 201
    body = {"job": job | {"name": "yet-another"}}
    assert server.refused(503, "POST", "/searches", json=body) == "busy"


def test_a_root_that_is_gone_takes_no_tasks_of_others_with_it(tmp_path: Path) -> None:
    written = tmp_path / "task" / "task.yaml"
    written.parent.mkdir()
    written.write_text("name: a\n")
    with served(tmp_path, roots=(tmp_path / "gone", tmp_path)) as here:
        assert {one["task"] for one in here.get("/tasks")} >= {"ja_list_ops", str(written.parent)}
        assert here.client.get("/new").status_code == 200


def test_what_a_path_takes_is_told_to_those_alone_who_may_ask(tmp_path: Path) -> None:
    with served(tmp_path) as here:
        Tokens(here.store).create("a", ["run"])
        assert here.refused(401, "GET", "/searches?x=1") == "unauthenticated"
        assert here.refused(401, "POST", "/searches/a/pause?x=1") == "unauthenticated"


def test_tasks_spaces_and_workers_are_listed(reader: Served, searched: Path) -> None:
    tasks = {one["task"]: one for one in reader.get("/tasks")}
    assert tasks["ja_list_ops"]["shipped"]
    assert tasks["mergebench"]["kind"] == "suite"
    assert not tasks[str(searched.parent / "task")]["shipped"]
    spaces = {one["preset"]: one for one in reader.get("/spaces")}
    assert spaces["sakana_ps"]["about"]
    assert spaces["sakana_ps"]["space"]["kind"] == "weight"
    assert reader.get("/workers") == {"leads": False, "waiting": 0, "processes": [], "workers": []}


def test_searches_are_compared(reader: Served) -> None:
    found = reader.get("/compare", params={"name": ["tiny", "tiny"]})
    assert [one["search"] for one in found["searches"]] == ["tiny", "tiny"]


# --- submitting and steering ---------------------------------------------------------------------


def test_a_job_is_submitted_as_keys_or_as_yaml(server: Served, job: dict[str, Any]) -> None:
    found = server.client.post("/api/v1/searches", json={"job": job, "priority": 3})
    assert found.status_code == 201, found.text
    assert (found.json()["state"], found.json()["by"]) == ("queued", "local")
    text = yaml.safe_dump(job | {"name": "third"})
    assert server.client.post("/api/v1/searches", json={"job": text}).status_code == 201
    first, second = server.get("/searches?state=queued")["items"]
    assert {first["name"], second["name"]} == {"another", "third"}
    shown = server.get("/searches/another")
    assert (shown["state"], shown["place"], shown["summary"]) == ("queued", 1, None)
    assert shown["job"]["budget"] == {"candidates": 8}
    actions = {(line.action, line.subject) for line in Audit(server.store).lines()}
    assert {("submit", "another"), ("submit", "third")} <= actions


def test_a_request_that_is_sent_again_is_served_once(server: Served, job: dict[str, Any]) -> None:
    for _ in range(2):
        found = server.client.post("/api/v1/searches", json={"job": job}, headers={KEY: "a"})
        assert (found.status_code, found.json()["id"]) == (201, 1)
    other = {"job": job | {"name": "other"}}
    assert server.refused(409, "POST", "/searches", json=other, headers={KEY: "a"}) == "conflict"
    for _ in range(2):
        paused = server.client.post("/api/v1/searches/another/pause", headers={**_JSON, KEY: "b"})
        assert paused.json()["state"] == "paused"
    assert server.refused(409, "POST", "/searches/another/pause", headers=_JSON) == "conflict"
    assert [line.action for line in Audit(server.store).lines()].count("pause") == 1


_JSON = {"Content-Type": "application/json"}


def test_the_queue_remembers_keys_when_the_server_does_not(
    searched: Path, job: dict[str, Any], tmp_path: Path
) -> None:
    ids = []
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with served(tmp_path / "a", searched) as server:
        found = server.client.post("/api/v1/searches", json={"job": job}, headers={KEY: "a"})
        ids.append(found.json()["id"])
    shutil.copyfile(tmp_path / "a" / "store.db", searched.parent / "again.db")
    with served(tmp_path / "b", searched.parent / "again.db") as server:
        found = server.client.post("/api/v1/searches", json={"job": job}, headers={KEY: "a"})
        ids.append(found.json()["id"])
    assert ids[0] == ids[1]


def test_a_search_in_the_queue_is_paused_resumed_and_cancelled(
    server: Served, job: dict[str, Any]
) -> None:
    server.client.post("/api/v1/searches", json={"job": job})
    for action, state in (("pause", "paused"), ("resume", "queued")):
        found = server.client.post(f"/api/v1/searches/another/{action}", headers=_JSON)
        assert (found.status_code, found.json()["state"]) == (200, state), found.text
    more = {"overrides": ["budget.candidates=9"]}
    assert server.refused(409, "POST", "/searches/another/extend", json=more) == "conflict"
    cancelled = server.client.delete("/api/v1/searches/another")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelled")
    assert server.refused(409, "DELETE", "/searches/tiny") == "conflict"
    assert server.refused(404, "DELETE", "/searches/other") == "not_found"
    assert server.get("/searches/another")["state"] == "cancelled"


@pytest.mark.slow
def test_what_waits_is_given_another_place(server: Served, job: dict[str, Any]) -> None:
    for name in ("first", "second"):
        server.client.post("/api/v1/searches", json={"job": job | {"name": name}})
    assert server.get("/searches/second")["place"] == 2
    moved = server.client.patch("/api/v1/searches/second", json={"priority": 5})
    assert (moved.status_code, moved.json()["priority"]) == (200, 5), moved.text
    assert server.get("/searches/second")["place"] == 1
    assert next(line.action for line in Audit(server.store).lines()) == "prioritize"
    server.client.delete("/api/v1/searches/first")
    again = server.client.delete("/api/v1/searches/first")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    for status, name in ((409, "first"), (404, "tiny"), (404, "other")):
        server.refused(status, "PATCH", f"/searches/{name}", json={"priority": 5})
    wrong = {"priority": 5000}
    assert server.refused(422, "PATCH", "/searches/second", json=wrong) == "invalid"


@pytest.mark.parametrize("has_begun", [False, True])
def test_an_export_that_has_not_ended_is_cancelled(server: Served, has_begun: bool) -> None:
    path = "/searches/tiny/exports"
    made = server.client.post(f"/api/v1{path}", json={"recipe_only": True}).json()
    id = made["submission"]["id"]
    if has_begun:
        assert Queue(server.store).begin(id) is not None
    for _ in range(2):
        found = server.client.delete(f"/api/v1{path}/{id}")
        assert (found.status_code, found.json()["submission"]["state"]) == (200, "cancelled")
    assert Queue(server.store).waiting() == []
    assert server.refused(404, "DELETE", f"{path}/999") == "not_found"
    other, _ = _exported(server)
    assert server.refused(409, "DELETE", f"{path}/{other}") == "conflict"


def test_extending_to_limits_that_are_in_force_changes_nothing(server: Served) -> None:
    server.client.post("/api/v1/searches/tiny/resume", headers=_JSON)
    same = {"overrides": ["budget.candidates=8"]}
    found = server.client.post("/api/v1/searches/tiny/extend", json=same)
    assert (found.status_code, found.json()["state"]) == (200, "queued"), found.text
    (one,) = Queue(server.store).waiting()
    assert one.overrides == ()
    for _ in range(2):
        server.client.post("/api/v1/searches/tiny/extend", json={"overrides": ["budget.hours=2"]})
    (one,) = Queue(server.store).waiting()
    assert one.overrides == ("budget.hours=2",)


def test_a_finished_search_is_neither_paused_nor_extended(server: Served) -> None:
    for action in ("pause", "stop"):
        assert server.refused(409, "POST", f"/searches/tiny/{action}", headers=_JSON) == "conflict"
    wrong = {"overrides": ["seed=4"]}
    assert server.refused(422, "POST", "/searches/tiny/extend", json=wrong) == "invalid"


def test_a_job_that_cannot_be_is_refused_before_it_is_queued(
    server: Served, job: dict[str, Any]
) -> None:
    outside = job | {"base": {"model": "/etc"}}
    for wrong in (outside, {"name": "x"}, "name: [", job | {"name": "../x"}):
        assert server.refused(422, "POST", "/searches", json={"job": wrong}) == "invalid"
    for address in ("file:///etc/passwd", "http://127.0.0.1:8765/", "http://169.254.169.254/"):
        hook = {"job": job, "webhook": address}
        assert server.refused(422, "POST", "/searches", json=hook) == "invalid"
    assert server.refused(409, "POST", "/searches", json={"job": job | {"name": "tiny"}})
    assert Queue(server.store).all() == []


@pytest.mark.slow
def test_a_plan_says_what_a_job_means_without_running_it(
    server: Served, job: dict[str, Any]
) -> None:
    found = server.client.post("/api/v1/plan", json={"job": job})
    assert found.status_code == 200, found.text
    plan = found.json()
    assert plan["job"]["engine"]["threads"] == 1
    assert (plan["population"], plan["generations"]) == (4, {"candidates": 2})
    assert plan["dimensions"] == len(server.store.coordinates(server.store.search("tiny").id))
    assert plan["tasks"].keys() == {"ja_list_ops", "ja_transcription"}
    assert Queue(server.store).all() == []
    missing = job | {"parents": {"a": {"model": str(tiny.ROOT)}, "b": {"model": "no/where"}}}
    assert server.refused(422, "POST", "/plan", json={"job": missing}) == "invalid"


# --- exports -------------------------------------------------------------------------------------


def test_the_seal_is_opened_on_request_by_those_who_may_alone(server: Served) -> None:
    tokens = Tokens(server.store)
    secrets = {
        name: tokens.create(name, scopes)[1]
        for name, scopes in {"runner": ("read", "run"), "opener": ("run", "unseal")}.items()
    }
    who = {name: {"Authorization": f"Bearer {secret}"} for name, secret in secrets.items()}
    path = "/searches/tiny/exports"
    unseal = {"unseal": True}
    assert server.refused(403, "POST", path, json=unseal, headers=who["runner"]) == "forbidden"
    assert server.refused(409, "POST", path, json={}, headers=who["opener"]) == "conflict"
    recipe = server.client.post(f"/api/v1{path}", json={"recipe_only": True}, headers=who["runner"])
    assert recipe.status_code == 202
    whole = server.client.post(f"/api/v1{path}", json=unseal, headers=who["opener"])
    assert whole.status_code == 202
    assert whole.json()["candidate"] == _winner(server)
    assert len(server.get(path, headers=who["runner"])) == 2


def test_files_of_an_export_are_had_by_their_names_and_nothing_else(
    server: Served, tmp_path: Path
) -> None:
    id, folder = _exported(server)
    base = f"/searches/tiny/exports/{id}/files"
    (folder / "deep").mkdir()
    (folder / "deep" / "b.bin").write_bytes(bytes(range(100)))
    (folder / "link").symlink_to("/etc/passwd")
    (folder / "linked").symlink_to("/etc")
    listed = server.get(base)
    assert [one["name"] for one in listed] == ["a.txt", "deep/b.bin"]
    assert [one["size"] for one in listed] == [5, 100]
    for name in ("link", "linked/passwd", "../../../store.db", "..%2f..%2fstore.db", "deep", ""):
        assert server.refused(404, "GET", f"{base}/{name}") == "not_found"
    found = server.client.get(f"/api/v1{base}/deep/b.bin", headers={"Range": "bytes=10-19"})
    assert (found.status_code, found.content) == (206, bytes(range(10, 20)))
    assert found.headers["content-disposition"] == 'attachment; filename="b.bin"'


def test_a_file_that_the_client_has_is_not_sent_again(server: Served) -> None:
    id, folder = _exported(server)
    path = f"/api/v1/searches/tiny/exports/{id}/files/a.txt"
    etag = server.client.get(path).headers["etag"]
    assert server.client.get(path, headers={"If-None-Match": etag}).status_code == 304
    (folder / "a.txt").write_text("another")
    assert server.client.get(path, headers={"If-None-Match": etag}).text == "another"


def _exported(server: Served) -> tuple[int, Path]:
    """An export that has finished, of one file, a.txt."""
    found = server.client.post("/api/v1/searches/tiny/exports", json={"recipe_only": True})
    export = found.json()
    id = int(export["submission"]["id"])
    assert server.refused(404, "GET", f"/searches/tiny/exports/{id}/files") == "not_found"
    folder = export_folder(server.settings.data, "tiny", export["candidate"], recipe_only=True)
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("hello")
    queue = Queue(server.store)
    queue.begin(id)
    queue.end(id, "finished", (), None, {})
    return id, folder


# --- logs, tokens --------------------------------------------------------------------------------


def test_a_log_is_read_in_whole_lines_from_where_one_left_off(server: Served) -> None:
    assert server.get("/searches/tiny/log")["text"] == ""
    path = log_file(server.settings.data, "tiny")
    path.parent.mkdir()
    lines = [f"line {i} für alle\n" for i in range(100)]
    path.write_text("".join(lines) + "half a li")
    text, offset = "", 0
    while part := server.get(f"/searches/tiny/log?offset={offset}&limit=50"):
        text, offset = text + part["text"], part["next"]
        if not part["text"]:
            break
    assert text == "".join(lines)
    last = server.get("/searches/tiny/log?limit=60")
    assert last["text"] == "".join(lines[-2:])
    path.write_text("begun anew\n")
    assert server.get(f"/searches/tiny/log?offset={offset}")["text"] == "begun anew\n"


@pytest.mark.slow
def test_a_secret_in_a_log_is_not_cut_in_two_wherever_it_is_read_from(server: Served) -> None:
    path = log_file(server.settings.data, "tiny")
    path.parent.mkdir()
    path.write_text("one\ntoken hf_abcdefghijklmnop\nthree\n")
    for limit in (1, 7, 20, 100):
        seen = set()
        for offset in range(path.stat().st_size + 1):
            part = server.get(f"/searches/tiny/log?offset={offset}&limit={limit}")
            seen.update(part["text"].splitlines())
            assert part["offset"] >= offset
        assert seen == {"one", "token hf_***", "three"}
    with path.open("a") as lines:
        lines.write("hf_abcdefghijkl")
    begin = path.stat().st_size - 3
    waiting = server.get(f"/searches/tiny/log?offset={begin}")
    assert (waiting["text"], waiting["next"]) == ("", begin)


def test_a_line_without_end_is_not_read_whole(server: Served) -> None:
    path = log_file(server.settings.data, "tiny")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("begun\n" + "x" * 10_000_000 + "\nafter it\n")
    parts = [server.get("/searches/tiny/log?offset=0&limit=1")]
    while parts[-1]["text"]:
        parts.append(server.get(f"/searches/tiny/log?offset={parts[-1]['next']}&limit=1"))
    assert "".join(part["text"] for part in parts) == "begun\n***\nafter it\n"


def test_a_log_shows_no_secrets(server: Served) -> None:
    path = log_file(server.settings.data, "tiny")
    path.parent.mkdir()
    path.write_text("token hf_abcdefghijklmnop\n")
    assert server.get("/searches/tiny/log")["text"] == "token hf_***\n"


def test_tokens_are_made_told_once_and_revoked(server: Served) -> None:
    new = {"name": "anna", "scopes": ["admin"], "days": 3}
    made = server.client.post("/api/v1/tokens", json=new)
    assert made.status_code == 201
    headers = {"Authorization": f"Bearer {made.json()['secret']}"}
    (known,) = server.get("/tokens", headers=headers)
    assert known["name"] == "anna"
    assert "secret" not in known
    more = {"name": "more", "scopes": ["unseal"]}
    assert server.refused(403, "POST", "/tokens", json=more, headers=headers) == "forbidden"
    page = server.get("/audit?limit=1", headers=headers)
    assert [line["action"] for line in page["items"]] == ["refused"]
    older = server.get(f"/audit?before={page['next']}", headers=headers)
    assert [line["action"] for line in older["items"]] == ["create token"]
    revoked = server.client.delete("/api/v1/tokens/anna", headers=headers)
    assert revoked.json()["state"] == "revoked"
    assert server.refused(401, "GET", "/searches", headers=headers) == "unauthenticated"


# --- the whole -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_route_says_what_it_answers_and_whom_it_serves(reader: Served) -> None:
    schema = reader.get("/openapi.json")
    public = {"/healthz", "/readyz", "/version"}
    for path, methods in schema["paths"].items():
        for method, route in methods.items():
            where = f"{method} {path}"
            assert route["description"], where
            statuses = set(route["responses"])
            assert statuses & {"200", "201", "202"}, where
            if path not in public:
                assert {"400", "401", "403", "422", "429", "503"} <= statuses, where
                assert route["security"], where
            problems = [
                response["content"]["application/json"]["schema"]["$ref"]
                for status, response in route["responses"].items()
                if status.startswith("4") and status != "416"
            ]
            assert set(problems) == {"#/components/schemas/Problem"}, where


@pytest.mark.slow
def test_the_document_lists_every_route_with_its_method(reader: Served) -> None:
    paths = reader.get("/openapi.json")["paths"]
    routes = {
        f"{method.upper()} {path.removeprefix('/api/v1')}"
        for path, methods in paths.items()
        for method in methods
    }
    text = (tiny.ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"`((?:GET|POST|PATCH|DELETE) [^`]+)`", text))
    assert listed == {"GET /api/v1/openapi.json", *routes}


def test_no_route_is_open_to_anybody_without_being_meant_to(reader: Served) -> None:
    assert access.undeclared(reader.app.routes) == []


def test_before_an_export_no_test_score_is_told_anywhere(reader: Served) -> None:
    id = _winner(reader)
    parts = ("", "/history", "/gap", "/costs", f"/candidates/{id}", f"/candidates/{id}/scores")
    texts = [json.dumps(reader.get(f"/searches/tiny{part}")) for part in parts]
    assert not any('"split": "test"' in text or "test_scores" in text for text in texts)
    assert reader.get("/searches/tiny")["summary"]["estimates"]["test"] is None
