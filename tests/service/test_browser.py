"""The dashboard in a real browser, on a real server: from the form to the report.

With EVOMERGE_SCREENSHOTS set, the pictures of the docs are written anew.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.running import PATIENCE, url

playwright = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
IMAGES = tiny.ROOT / "docs" / "images"
_LONG = 1000 * 2 * PATIENCE  # milliseconds; a search and its export, on a busy machine

_SERVER = """
import sys
from pathlib import Path
from evomerge.service.server import serve
from evomerge.service.settings import Settings

store, data, port, *roots = sys.argv[1:]
settings = Settings(store, port=int(port), data=Path(data), roots=tuple(map(Path, roots)))
serve(settings, lambda said: None)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], tuple[str, Path]]]:
    """What starts a server on a new store; gives its address, and the folder that it reads."""
    started: list[subprocess.Popen[bytes]] = []

    def serve() -> tuple[str, Path]:
        folder = tmp_path_factory.mktemp("server")
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        store = url(folder / "store.db")
        roots = (str(tiny.ROOT / "examples"), str(folder))
        arguments = [store, str(folder / "data"), str(port), *roots]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("EVOMERGE_")}
        command = [sys.executable, "-c", _SERVER, *arguments]
        started.append(subprocess.Popen(command, env=environment))
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + PATIENCE
        while not _answers(address):
            assert started[-1].poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return address, folder

    yield serve
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        process.wait(PATIENCE)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/healthz") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if not shutil.which(CHROMIUM):
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[..., Any]]:
    """What opens a tab in a window of its own. In the end nothing was wrong in any of them."""
    contexts, wrong = [], []

    def opened(scheme: str = "light", width: int = 1280, height: int = 900) -> Any:
        size = {"width": width, "height": height}
        contexts.append(browser.new_context(color_scheme=scheme, viewport=size))
        page = contexts[-1].new_page()
        page.set_default_timeout(1000 * PATIENCE)
        kinds = ("error", "warning")
        page.on("console", lambda said: said.type in kinds and wrong.append(said.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        return page

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def searched(start: Callable[[], tuple[str, Path]], browser: Any) -> tuple[str, list[str]]:
    """A server after a search was submitted, watched and exported in a browser, see below; and the
    paths of its pages."""
    address, folder = start()
    task = tiny.write_task(folder / "task", train=40, validation=40, test=40)
    spoken = task.read_text(encoding="utf-8").replace("teacher_forced: true", "")
    task.write_text(spoken, encoding="utf-8")
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(_LONG)
    wrong: list[str] = []
    page.on("console", lambda said: said.type in ("error", "warning") and wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))

    page.goto(address)
    page.get_by_role("link", name="Fill in the form").click()
    more = (
        "optimizer: {name: cma-es, population: 6}\nguard: {validation_looks: 3}\n"
        "engine: {device: cpu, threads: 1}"
    )
    filled = {
        "name": "overnight",
        "parents": "ops: zoo/ops\nja: zoo/ja",
        "base": "zoo/base",
        "other_tasks": str(folder / "task"),
        "candidates": "60",
        "more": more,
    }
    for name, text in filled.items():
        page.locator(f"#by-form [name={name}]").fill(text)
    page.locator("#by-form [name=preset]").select_option("global_task_arithmetic")
    page.get_by_text("It fits.").wait_for()  # checked while it was filled in
    page.get_by_role("button", name="Submit").first.click()
    page.wait_for_url("**/searches/overnight")
    loaded = page.evaluate("performance.timeOrigin")
    page.locator("#tiles").wait_for()
    began = page.evaluate("performance.timeOrigin")  # it has loaded itself once, from the queue
    page.locator("#fitness svg").wait_for()
    page.locator("#state .finished").wait_for()
    page.get_by_text("promoted").first.wait_for()
    assert loaded < began == page.evaluate("performance.timeOrigin")  # nobody has loaded it again
    pages = ["/searches/overnight"]
    _photographed(page, "search")

    page.get_by_role("link", name="Export the winner").click()
    page.get_by_role("button", name="Export the model").click()
    assert "cannot be undone" in page.inner_text("main")
    page.get_by_role("button", name="Yes, open the seal").click()
    page.locator("#state .finished").wait_for()
    assert "Gain over the best parent" in page.inner_text("main")
    assert "model.safetensors" in page.inner_text("main")
    pages.append(page.url.removeprefix(address))
    page.get_by_role("link", name="Read the report").click()
    page.get_by_role("heading", name="overnight").first.wait_for()
    page.go_back()
    with page.expect_download() as download:
        page.get_by_role("link", name="evomerge_report.json").click()
    assert '"claim"' in Path(download.value.path()).read_text(encoding="utf-8")
    page.get_by_role("term").get_by_text("Candidate").wait_for()
    page.locator("#export dd a").first.click()
    page.get_by_role("heading", name="Sample answers").wait_for()
    assert "exported" in page.inner_text("main")
    pages.append(page.url.removeprefix(address))
    _photographed(page, "candidate")
    page.goto(address)
    page.get_by_role("link", name="overnight").wait_for()
    assert wrong == []
    context.close()
    parts = ("population", "guard", "failures", "log")
    pages += [f"/searches/overnight/{part}" for part in parts]
    pages += [f"{pages[2]}/export", f"{pages[2]}?other=1", "/searches/nothing"]
    rest = ("new", "workers", "exports", "compare", "tokens", "audit", "login")
    return address, ["/", *pages, *(f"/{part}" for part in rest)]


def _photographed(page: Any, name: str) -> None:
    if os.environ.get("EVOMERGE_SCREENSHOTS"):
        IMAGES.mkdir(exist_ok=True)
        page.screenshot(path=IMAGES / f"{name}.png")


def test_a_search_goes_from_the_form_to_the_report_in_a_browser(
    searched: tuple[str, list[str]], tab: Callable[..., Any]
) -> None:
    address, _ = searched
    page = tab()
    page.goto(f"{address}/searches/overnight/guard")
    assert "local" in page.locator("#guard").inner_text()  # who opened the seal


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault_on_any_page(
    scheme: str, searched: tuple[str, list[str]], tab: Callable[..., Any]
) -> None:
    address, paths = searched
    page = tab(scheme)
    for path in paths:
        if path == "/searches/nothing":  # whose status the console tells of
            continue
        page.goto(address + path)
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        found = axe.Axe().run(page).response["violations"]
        serious = [one["id"] for one in found if one["impact"] in ("serious", "critical")]
        assert serious == [], path


@pytest.mark.parametrize("width", [360, 1280, 2560])
def test_no_page_is_wider_than_the_window(
    width: int, searched: tuple[str, list[str]], tab: Callable[..., Any]
) -> None:
    address, paths = searched
    page = tab(width=width)
    for path in paths:
        if path == "/searches/nothing":
            continue
        page.goto(address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path


def test_the_content_is_one_key_away(
    searched: tuple[str, list[str]], tab: Callable[..., Any]
) -> None:
    address, _ = searched
    page = tab()
    page.goto(f"{address}/searches/overnight")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_a_browser_logs_in_with_a_token_and_out(
    start: Callable[[], tuple[str, Path]], tab: Callable[..., Any]
) -> None:
    address, _ = start()
    page = tab()
    page.goto(f"{address}/tokens")
    page.get_by_label("Name").fill("anna")
    page.get_by_role("checkbox", name="run submit").check()
    page.get_by_role("button", name="Make it").click()
    secret = page.get_by_label("Secret", exact=True).inner_text()
    page.goto(f"{address}/workers")
    page.get_by_label("Token").fill(secret)
    page.get_by_role("button", name="Log in").click()
    page.wait_for_url("**/workers")
    assert "anna" in page.locator("header").inner_text()
    page.goto(f"{address}/")
    page.get_by_text("Live").wait_for()
    page.get_by_role("button", name="Log out").click()
    page.wait_for_url("**/login")
