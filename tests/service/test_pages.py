"""The dashboard's pages: what they show of real searches, what they have done, and that whatever
models, tasks and people write is text there."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from fastapi.testclient import TestClient
from httpx2 import Response

from evomerge.executor import Request
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.job import Job
from evomerge.recipe import Recipe
from evomerge.search import Silent, launch
from evomerge.search.setting import Setting
from evomerge.service.app import create_app
from evomerge.service.scheduler import Scheduler
from evomerge.service.settings import Settings
from evomerge.store import Audit, Queue, Store, Tokens
from tests import tiny
from tests.dice import Rolling
from tests.golden import upgraded
from tests.running import query, url

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 191 }}'
_ALONE = {"meta", "link", "input"}  # elements that nothing ends


class Page(HTMLParser):
    """A page taken apart. elements: names and attributes; text: what can be read."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._texts: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _ALONE:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self._texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def checked(answer: Response, status: int = 200) -> Page:
    """A page without anything that its Content-Security-Policy forbids, or that would keep out
    somebody who does not see it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    page = Page(answer.text)
    for tag, attributes in page.elements:
        assert "style" not in attributes, tag
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in {"href", "src", "action"} & attributes.keys():
            target = str(attributes[name])
            assert target.startswith(("/", "#", "?")), target
            assert not target.startswith("//"), target
    (script,) = page.all("script")
    assert str(script["src"]).startswith("/static/pages.js?")
    assert not page.all("style") + page.all("img")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert len(page.all("h1")) == len(page.all("main")) == 1
    assert all("scope" in header for header in page.all("th"))
    return page


@dataclass
class Server:
    """An app over a store of the test's own; nothing works off its queue."""

    store: Store
    client: TestClient
    roots: Path

    @property
    def queue(self) -> Queue:
        return Queue(self.store)

    def see(self, path: str, status: int = 200) -> Page:
        return checked(self.client.get(path), status)

    def post(self, path: str, /, csrf: str | None = None, **form: Any) -> Response:
        """Send a form of a page, with its key."""
        if csrf is None:
            page = Page(self.client.get("/new").text)
            csrf = next(str(i["value"]) for i in page.all("input") if i.get("name") == "csrf")
        return self.client.post(path, data={"csrf": csrf, **form})

    def log_in(self, *scopes: str) -> None:
        _, secret = Tokens(self.store).create("anna", scopes)
        assert self.client.post("/login", data={"token": secret}).status_code == 303


@pytest.fixture
def serve(empty: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """What serves a copy of a store, by default an empty one."""
    opened: list[Server] = []

    def served(database: Path | None = None, **settings: Any) -> Server:
        folder = tmp_path / f"server-{len(opened)}"
        folder.mkdir()
        shutil.copyfile(database or empty, folder / "store.db")
        store = Store(url(folder / "store.db"))
        roots = (tiny.ROOT / "examples", tmp_path)
        set_up = Settings(store.url, data=folder / "data", roots=roots, **settings)
        app = create_app(set_up, store, Scheduler(set_up, store))
        where = {"client": ("127.0.0.1", 50_000), "follow_redirects": False}
        client = TestClient(app, "http://127.0.0.1:8765", **where)
        opened.append(Server(store, client, tmp_path))
        return opened[-1]

    yield served
    for server in opened:
        server.store.database.close()


class Hostile(Rolling):
    """Its models write what is no text, and so does whoever says why one has failed."""

    def __init__(self, setting: Setting, model: Path) -> None:
        super().__init__(setting)
        self.model = model

    def _evaluated(self, request: Request) -> Evaluation:
        # What the dice say depends on the recipe, and must not on the folder of the tests.
        recipe = json.dumps(request.recipe.to_dict()).replace(json.dumps(str(self.model)), '"ops"')
        found = super()._evaluated(replace(request, recipe=Recipe.from_dict(json.loads(recipe))))
        if isinstance(found, Failed):
            return Failed(EVIL, found.seconds)
        replies = {
            name: {int(at): EVIL for at in examples[: request.samples]}
            for name, examples in request.examples.items()
        }
        return Scored(found.tasks, found.merge_seconds, found.seconds, replies)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a search whose models, task, questions and failures have hostile names and
    texts."""
    folder = tmp_path_factory.mktemp("hostile")
    task = tiny.write_task(folder / "task")
    named = yaml.safe_load(task.read_text(encoding="utf-8")) | {"name": EVIL}
    task.write_text(yaml.safe_dump({**named, "prompt": "{{ prompt }}"}), encoding="utf-8")
    data = task.parent / "data" / "train.jsonl"
    lines = data.read_text(encoding="utf-8")
    data.write_text(lines.replace('"prompt": "', '"prompt": "<script>alert(3)</script>'), "utf-8")
    model = folder / '"><svg onload=alert(4)>'
    model.symlink_to(tiny.ZOO / "ops")
    parents = {"ops": {"model": str(model)}, "ja": {"model": str(tiny.ZOO / "ja")}}
    job = tiny.write_job(folder, parents=parents, budget={"candidates": 40})
    setting = Setting.open(Job.from_file(job))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Setting, "executor", lambda setting: Hostile(setting, model))
        launch(setting, url(folder / "store.db"), Silent(), lambda: False)
    return folder / "store.db"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the searches finished, whose winner was exported, stopped and failed."""
    return upgraded(tmp_path_factory.mktemp("finished")).store


def pages_of(database: Path) -> list[str]:
    """The paths of every page about the searches of a store."""
    found = ["/", "/?state=finished", "/new", "/workers", "/exports", "/compare", "/tokens"]
    found += ["/audit", "/login"]
    names = [name for (name,) in query(database, "SELECT name FROM search")]
    found += ["/compare?" + "&".join(f"name={name}" for name in names)] if names[1:] else []
    for name in names:
        parts = ("", "/population", "/guard", "/failures", "/log", "/population?sort=score")
        found += [f"/searches/{name}{part}" for part in parts]
        own = f"FROM candidate JOIN search ON search.id = search_id WHERE name = '{name}'"
        ids = [id for (id,) in query(database, f"SELECT candidate.id {own} ORDER BY 1")]
        found += [f"/searches/{name}/candidates/{id}?other={ids[-1]}" for id in (ids[0], ids[-1])]
        found += [f"/searches/{name}/candidates/{ids[-1]}/export"]
    return found


def test_a_store_without_searches_says_how_to_begin(serve: Callable[..., Server]) -> None:
    server = serve()
    assert "No search yet" in server.see("/").text
    assert "evomerge run job.yaml" in server.see("/").text
    for path in ("/new", "/workers", "/exports", "/compare", "/tokens", "/audit"):
        server.see(path)


@pytest.mark.slow
def test_every_page_of_searches_of_earlier_versions_can_be_seen(
    serve: Callable[..., Server], finished: Path
) -> None:
    server = serve(finished)
    for path in pages_of(finished):
        server.see(path)


def test_what_models_tasks_and_failures_say_is_text(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    said = " ".join(server.see(path).text for path in pages_of(hostile))
    assert EVIL in said  # the task's name, replies, reasons
    assert "<script>alert(3)</script>" in said  # the prompts
    assert "onload=alert(4)" in said  # the model's folder
    assert EVIL in server.see("/searches/tiny/failures").text


def test_what_people_write_is_text(serve: Callable[..., Server]) -> None:
    server = serve()
    form = {"by": "form", "name": EVIL, "parents": EVIL, "more": EVIL, "action": "plan"}
    page = checked(server.post("/new", **form))
    assert "alert(1)" in page.text
    page = checked(server.post("/new", by="document", document=EVIL, action="submit"), 422)
    assert [one for one in page.all("p") if one.get("class") == "trouble"]
    checked(server.client.get("/login", params={"next": EVIL}))
    checked(server.client.get(f"/searches/{quote(EVIL[:9])}"), 422)


def test_nothing_that_was_read_of_test_is_on_any_page_before_its_report_is_stored(
    serve: Callable[..., Server], finished: Path, tmp_path: Path
) -> None:
    def without(name: str, *tables: str) -> Server:
        """A server of a store whose export was ended half-way."""
        copy = tmp_path / name
        shutil.copyfile(finished, copy)
        with closing(sqlite3.connect(copy)) as connection, connection:
            for table in tables:
                connection.execute(f"DELETE FROM {table}")
        return serve(copy)

    read, unread = without("read.db", "export"), without("unread.db", "export", "reading")
    for path in pages_of(finished):
        if "finished" in path or path == "/":
            assert read.see(path).text == unread.see(path).text, path
    shown = [server.see("/searches/finished").text for server in (serve(finished), read)]
    assert ["sealed" in text for text in shown] == [False, True]


@pytest.mark.slow
def test_a_report_may_run_nothing_where_it_is_read(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    answer = server.client.get("/searches/tiny/report")
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert policy.endswith("sandbox")
    assert "<img src=x" not in answer.text
    server.see("/searches/tiny/report?candidate=999", 404)


@pytest.mark.slow
def test_the_guards_page_says_who_opened_the_seal(
    serve: Callable[..., Server], finished: Path
) -> None:
    server = serve(finished)
    page = server.see("/searches/finished/guard")
    assert "Test opened" in page.text
    assert "a command, without a server" in page.text
    row = server.store.search("finished")
    assert row.verdict is not None
    told = {"candidate": row.verdict["winner"], "recipe_only": False, "engine": {}}
    server.queue.submit("export", "finished", told, by="berta")
    assert "berta" in server.see("/searches/finished/guard").text
    for split in server.store.splits(row.id).values():
        assert split.identity[:12] in page.text


def test_a_population_is_sorted_filtered_and_seen_page_by_page(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    first = server.see("/searches/tiny/population?sort=fitness&order=ascending")
    (header,) = [one for one in first.all("th") if "aria-sort" in one]
    assert header["aria-sort"] == "ascending"
    failed = server.see("/searches/tiny/population?state=failed")
    states = [str(one.get("class")) for one in failed.all("span")]
    assert "state failed" in states
    assert "state scored" not in states
    (of_generation,) = {
        one["href"] for one in first.all("a") if "generation=3&" in str(one.get("href"))
    }
    assert "4 candidates" in server.see(f"/searches/tiny/population{of_generation}").text
    server.see("/searches/tiny/population?sort=nothing", 422)


def test_a_candidate_has_its_answers_beside_those_of_its_parents(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    best = server.store.search("tiny").verdict
    assert best is not None
    page = server.see(f"/searches/tiny/candidates/{best['winner']}")
    for heading in ("This candidate", "ops", "ja", "base", "Target", "Paired test", "Coefficients"):
        assert heading in page.text
    assert page.all("svg")


def test_a_search_is_submitted_by_a_form(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    tiny.write_task(tmp_path / "task")
    form = {
        "by": "form",
        "name": "night",
        "parents": "ops: zoo/ops\nzoo/ja\n",
        "base": "zoo/base",
        "preset": "global_task_arithmetic",
        "other_tasks": str(tmp_path / "task"),
        "optimizer": "cma-es",
        "candidates": "8",
        "hours": "0.5",
        "seed": "5",
        "more": "engine: {threads: 1}",
        "priority": "3",
    }
    written = checked(server.post("/new", action="write", **form)).text
    for line in ("name: night", "preset: global_task_arithmetic", "hours: 0.5", "threads: 1"):
        assert line in written
    answer = server.post("/new", action="submit", **form)
    assert answer.headers["location"] == "/searches/night"
    one = server.queue.of("night")
    assert one is not None
    assert one.priority == 3
    assert one.document["parents"].keys() == {"ops", "ja"}
    assert one.document["budget"]["candidates"] == 8
    assert "at place 1" in server.see("/searches/night").text
    assert "name: night" in server.see("/searches/night").text
    assert "taken" in checked(server.post("/new", action="submit", **form), 409).text
    assert [line.action for line in Audit(server.store).lines()] == ["submit"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parents": "a: zoo/ops\na: zoo/ja"}, "is there twice"),
        ({"candidates": "many"}, "'many' is no number"),
        ({"more": "- a list"}, "no keys"),
        ({"more": "a: [1"}, "not YAML"),
        ({"parents": "/etc\nzoo/ja"}, "leads out of the folders"),
    ],
)
def test_a_form_that_means_no_job_says_why(
    changes: dict[str, str], said: str, serve: Callable[..., Server]
) -> None:
    server = serve()
    form = {"by": "form", "name": "night", "parents": "zoo/ops\nzoo/ja", "candidates": "8"}
    form |= {"tasks": "ja_list_ops", **changes}
    assert said in checked(server.post("/new", action="submit", **form), 422).text
    assert said in checked(server.post("/new", action="plan", **form)).text
    assert server.queue.all() == []


def test_a_job_file_is_submitted_and_steered(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve()
    text = tiny.write_job(tmp_path, tasks=[{"task": str(tmp_path / "task")}]).read_text("utf-8")
    answer = server.post("/new", by="document", document=text, action="submit")
    assert answer.headers["location"] == "/searches/tiny"
    for action, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert server.post(f"/searches/tiny/{action}").status_code == 303
        assert f"tiny {state}" in server.see("/searches/tiny").text
    checked(server.post("/searches/tiny/stop"), 409)
    actions = [line.action for line in reversed(Audit(server.store).lines())]
    assert actions == ["submit", "pause", "resume", "cancel"]


def offered(page: Page) -> set[str]:
    """Where the forms of a page go."""
    return {str(form["action"]) for form in page.all("form")}


def test_a_search_that_waits_is_given_another_priority(
    serve: Callable[..., Server],
) -> None:
    server = serve()
    server.queue.submit("search", "tiny", {"name": "tiny"}, by="anna")
    path = "/searches/tiny/prioritize"
    assert path in offered(server.see("/searches/tiny"))
    answer = server.post(path, priority="7")
    assert (answer.status_code, answer.headers["location"]) == (303, "/searches/tiny")
    (field,) = [i for i in server.see("/searches/tiny").all("input") if i.get("name") == "priority"]
    assert field["value"] == "7"
    for wrong in ("5000", ""):
        checked(server.post(path, priority=wrong), 422)
    checked(server.post(path, csrf="guessed", priority="9"), 403)
    one = server.queue.of("tiny")
    assert one is not None
    assert one.priority == 7
    assert next(iter(Audit(server.store).lines())).action == "prioritize"
    server.post("/searches/tiny/pause")
    assert path not in offered(server.see("/searches/tiny"))


def test_an_export_is_cancelled_until_it_has_ended(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    for has_begun in (False, True):
        page = server.post("/searches/tiny/candidates/1/export", what="recipe").headers["location"]
        one = server.queue.all()[-1]
        assert not has_begun or server.queue.begin(one.id)
        assert f"{page}/cancel" in offered(server.see(page))
        checked(server.post(f"{page}/cancel", csrf="guessed"), 403)
        assert server.post(f"{page}/cancel").headers["location"] == page
        assert server.queue.get(one.id).state == "cancelled"
        assert f"{page}/cancel" not in offered(server.see(page))
        assert next(iter(Audit(server.store).lines())).action == "cancel export"
    page = server.post("/searches/tiny/candidates/1/export", what="recipe").headers["location"]
    one = server.queue.all()[-1]
    server.queue.begin(one.id)
    server.queue.end(one.id, "failed", (), "the disk is full")
    assert f"{page}/cancel" not in offered(server.see(page))
    assert "too late" in checked(server.post(f"{page}/cancel"), 409).text


def test_a_finished_search_is_allowed_more_looks_and_nothing_else(
    serve: Callable[..., Server], finished: Path
) -> None:
    server = serve(finished)
    before = server.store.search("finished").job["guard"]["validation_looks"]
    names = {i.get("name") for i in server.see("/searches/finished").all("input")}
    assert names & {"candidates", "hours", "validation_looks"} == {"validation_looks"}
    names = {i.get("name") for i in server.see("/searches/stopped").all("input")}
    assert {"candidates", "hours", "validation_looks"} <= names
    path = "/searches/finished/extend"
    checked(server.post(path, validation_looks=str(before)), 422)
    for wrong in (str(before - 1), "many"):
        checked(server.post(path, validation_looks=wrong), 422)
    assert server.queue.all() == []
    assert server.post(path, validation_looks=str(before + 2)).status_code == 303
    one = server.queue.of("finished")
    assert one is not None
    assert one.overrides == (f"guard.validation_looks={before + 2}",)


def test_a_search_is_extended_by_the_limits_that_were_changed(
    serve: Callable[..., Server], finished: Path
) -> None:
    server = serve(finished)
    page = server.see("/searches/stopped")
    before = next(i["value"] for i in page.all("input") if i.get("name") == "candidates")
    answer = checked(server.post("/searches/stopped/extend", candidates=before), 422)
    assert "every limit is what it was" in answer.text
    server.post("/searches/stopped/extend", candidates="900", hours="")
    one = server.queue.of("stopped")
    assert one is not None
    assert one.overrides == ("budget.candidates=900",)


def test_the_seal_is_opened_only_for_whoever_is_asked_twice(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    verdict = server.store.search("tiny").verdict
    assert verdict is not None
    path = f"/searches/tiny/candidates/{verdict['winner']}/export"
    assert "asked once more" in server.see(path).text
    again = checked(server.post(path, what="model"))
    assert "It cannot be undone" in again.text
    assert server.queue.all() == []
    answer = server.post(path, what="model", sure="yes")
    (one,) = server.queue.all()
    assert answer.headers["location"] == f"/searches/tiny/exports/{one.id}"
    assert one.document["recipe_only"] is False
    assert "It waits in the queue" in server.see(f"/searches/tiny/exports/{one.id}").text
    assert "model, recipe, card and report" in server.see("/exports").text


def test_a_recipe_is_exported_without_being_asked_twice(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    server.post("/searches/tiny/candidates/1/export", what="recipe")
    (one,) = server.queue.all()
    assert one.document["recipe_only"] is True


@pytest.mark.slow
def test_whoever_lacks_the_scope_for_unsealing_is_told_so(
    serve: Callable[..., Server], hostile: Path
) -> None:
    server = serve(hostile)
    server.log_in("read", "run")
    path = "/searches/tiny/candidates/1/export"
    assert "lacks the scope" in server.see(path).text
    assert "lacks the scope" in checked(server.post(path, what="model", sure="yes"), 403).text
    assert server.queue.all() == []


@pytest.mark.slow
def test_whoever_may_only_look_is_offered_nothing_else(
    serve: Callable[..., Server], finished: Path
) -> None:
    server = serve(finished)
    server.log_in("read")
    for path in pages_of(finished):
        if path in ("/new", "/tokens", "/audit"):
            assert "lacks the scope" in server.see(path, 403).text
        elif not path.endswith("/export"):
            posts = [form for form in server.see(path).all("form") if form.get("method") == "post"]
            assert {form["action"] for form in posts} <= {"/logout", "/login"}, path
    assert server.post("/searches/stopped/resume", csrf="").status_code == 403


def test_whoever_has_not_logged_in_is_sent_to_do_so_and_then_on(
    serve: Callable[..., Server], finished: Path
) -> None:
    server = serve(finished)
    _, secret = Tokens(server.store).create("anna", ["read"])
    answer = server.client.get("/searches/finished")
    assert answer.headers["location"] == "/login?next=%2Fsearches%2Ffinished"
    server.see(answer.headers["location"])
    page = checked(server.client.post("/login", data={"token": "evm_wrong"}), 401)
    assert "the token is unknown" in page.text
    answer = server.client.post("/login", data={"token": secret, "next": "/searches/finished"})
    assert answer.headers["location"] == "/searches/finished"
    assert "anna" in server.see("/searches/finished").text
    assert server.client.post("/logout").headers["location"] == "/login"
    assert server.client.get("/").status_code == 303


@pytest.mark.parametrize("elsewhere", ["//example.org", "https://example.org", "/\\example.org"])
def test_nobody_is_sent_elsewhere_by_a_link_to_here(
    elsewhere: str, serve: Callable[..., Server]
) -> None:
    server = serve()
    _, secret = Tokens(server.store).create("anna", ["read"])
    answer = server.client.post("/login", data={"token": secret, "next": elsewhere})
    assert answer.headers["location"] == "/"


def test_a_form_of_another_site_does_nothing(serve: Callable[..., Server], finished: Path) -> None:
    server = serve(finished)
    for csrf in ("", "guessed"):
        checked(server.post("/searches/stopped/resume", csrf=csrf), 403)
    assert server.queue.all() == []


def test_admins_make_tokens_whose_secret_is_shown_once_and_revoke_them(
    serve: Callable[..., Server],
) -> None:
    server = serve()
    server.log_in("admin")
    made = checked(server.post("/tokens", name="ci", scopes=["read", "run"], days="30")).text
    assert "evm_" in made
    secret = next(word for word in made.split() if word.startswith("evm_"))
    assert secret not in server.see("/tokens").text
    assert Tokens(server.store).find(secret) is not None
    checked(server.post("/tokens", name="all", scopes=["unseal"]), 403)
    server.post("/tokens/revoke", name="ci")
    assert Tokens(server.store).find(secret) is None
    log = server.see("/audit").text
    assert "create token" in log
    assert "revoke token" in log
    assert secret not in log


def test_what_is_not_there_is_a_page_too(serve: Callable[..., Server], finished: Path) -> None:
    server = serve(finished)
    for path in ("/searches/nothing", "/searches/finished/candidates/999", "/searches/nothing/log"):
        assert "Not found" in server.see(path, 404).text
    answer = server.client.get("/nowhere", headers={"Accept": "text/html"})
    assert "Not found" in checked(answer, 404).text
    assert server.client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert server.client.get("/static/../pages/words.py").status_code == 404
    assert server.client.get("/static/base.html").status_code == 404


def test_browsers_keep_files_until_they_change(serve: Callable[..., Server]) -> None:
    server = serve()
    sheets = [str(link["href"]) for link in server.see("/").all("link")]
    for sheet in sheets:
        answer = server.client.get(sheet)
        assert answer.status_code == 200
        again = server.client.get(sheet, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
