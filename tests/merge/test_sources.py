"""References: folders, hub ids, adapters, and how they are told apart."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.sources import open_model
from tests.merge.test_adapters import write_adapter

WEIGHTS = "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "fedcba9876543210fedcba9876543210fedcba98"


class Hub(BaseHTTPRequestHandler):
    """The few answers of a hub that a download asks for. Folders of its `root` are repositories:
    ORG/NAME/REVISION; `v1` is OLDER, `main` is COMMIT."""

    root: ClassVar[Path]
    asked: ClassVar[list[str]]
    address: ClassVar[str]

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(path)
        parts = path.split("/")
        api = parts[:2] == ["api", "models"]
        org, name, kind, revision, *file = parts[2:] if api else parts
        if org == "locked":
            self.refuse(403, "GatedRepo")
        elif org == "broken":
            self.refuse(500, "")
        elif not (self.root / org / name).is_dir():
            self.refuse(404, "RepoNotFound")
        elif revision not in ("main", "v1", COMMIT, OLDER):
            self.refuse(404, "RevisionNotFound")
        else:
            commit = OLDER if revision in ("v1", OLDER) else COMMIT
            folder = self.root / org / name / ("v1" if commit == OLDER else "main")
            if kind == "revision":
                self.send(json.dumps({"id": f"{org}/{name}", "sha": commit}).encode(), {})
            elif kind == "tree":
                self.send(json.dumps(tree(folder)).encode(), {})
            else:
                data = folder.joinpath(*file).read_bytes()
                tag = hashlib.sha1(data).hexdigest()
                headers = {"ETag": f'"{tag}"', "X-Repo-Commit": commit}
                self.send(data, headers, with_body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, data: bytes, headers: dict[str, str], with_body: bool = True) -> None:
        self.send_response(200)
        for name, value in headers.items() | {("Content-Length", str(len(data)))}:
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def tree(folder: Path) -> list[dict[str, Any]]:
    """What the hub says of a repository's files."""
    return [
        {
            "type": "file",
            "path": path.relative_to(folder).as_posix(),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


# Opens each reference in turn; the library reads its environment only once.
OPEN = """
import json, sys
from evomerge.errors import ModelError
from evomerge.merge.sources import open_model
found = {}
for allow_pickle, reference in json.load(sys.stdin):
    try:
        model = open_model(reference, allow_pickle=allow_pickle)
        found[reference] = [model.uri, model.revision, model.sha, sorted(model.files)]
    except ModelError as error:
        found[reference] = str(error)
print(json.dumps(found))
"""


def opened_there(references: list[tuple[bool, str]], home: Path, **settings: str) -> dict[str, Any]:
    """What comes of opening these references with this cache and these settings of the hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ended = subprocess.run(
        [sys.executable, "-c", OPEN],
        env=kept | {"HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **settings},
        input=json.dumps(references),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


REFERENCES = [
    (False, "org/a"),
    (False, "org/a@v1"),
    (False, f"org/a@{OLDER}"),
    (False, "org/a+org/adapter"),
    (False, "org/adapter"),
    (False, "org/a@v9"),
    (False, "org/nothing"),
    (False, "locked/model"),
    (False, "broken/model"),
    (False, "org/pickled"),
    (True, "org/pickled@main"),
    (False, "org/stray"),
]


@pytest.fixture(scope="module")
def hub(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[Hub]]:
    """A hub on this machine."""
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(models["a"], root / "org/a/main")
    (root / "org/a/main/README.md").write_text("---\nlicense: mit\n---\n")
    (root / "org/a/main/training_args.bin").write_bytes(b"no model")
    shutil.copytree(models["b"], root / "org/a/v1")
    write_adapter(root / "org/adapter/main", models["a"], base_model_name_or_path="org/a")
    write_adapter(root / "org/stray/main", models["a"], base_model_name_or_path=str(models["a"]))
    pickled = Path(shutil.copytree(models["b"], root / "org/pickled/main"))
    torch.save(load_file(pickled / WEIGHTS), pickled / "pytorch_model.bin")
    (pickled / WEIGHTS).unlink()

    class ThisHub(Hub):
        asked: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), ThisHub)
    ThisHub.root, ThisHub.address = root, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ThisHub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def downloaded(
    hub: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, list[str]]:
    """What came of REFERENCES, the cache they filled, and what the hub was asked for."""
    home = tmp_path_factory.mktemp("home")
    found = opened_there(REFERENCES, home, HF_ENDPOINT=hub.address)
    return found, home, list(hub.asked)


@pytest.mark.slow
def test_a_hub_id_is_its_newest_commit(downloaded: Any, models: dict[str, Path]) -> None:
    found, _, _ = downloaded
    assert found["org/a"][:3] == [f"org/a@{COMMIT}", COMMIT, Checkpoint.open(models["a"]).sha]


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["v1", OLDER])
def test_a_revision_is_resolved_to_its_commit(
    downloaded: Any, models: dict[str, Path], revision: str
) -> None:
    uri, commit, sha, _ = downloaded[0][f"org/a@{revision}"]
    assert (uri, commit, sha) == (f"org/a@{OLDER}", OLDER, Checkpoint.open(models["b"]).sha)


@pytest.mark.slow
def test_an_adapter_on_the_hub_is_applied_to_its_base(downloaded: Any) -> None:
    found, _, _ = downloaded
    both = f"org/a@{COMMIT}+org/adapter@{COMMIT}"
    for reference in ("org/a+org/adapter", "org/adapter"):
        assert found[reference][:2] == [both, COMMIT]
        assert "+adapter_model.safetensors" in found[reference][3]
    assert found["org/adapter"][2] == found["org/a+org/adapter"][2] != found["org/a"][2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("org/a@v9", "no revision 'v9'"),
        ("org/nothing", "no such repository on the hub"),
        ("locked/model", "gated"),
        ("broken/model", "the hub cannot be reached"),
        ("org/pickled", "`evomerge merge --allow-pickle`"),
        ("org/stray", "names a folder"),
    ],
)
def test_what_the_hub_refuses_is_one_line(downloaded: Any, reference: str, words: str) -> None:
    message = downloaded[0][reference]
    assert words in message
    assert reference in message
    assert "\n" not in message


@pytest.mark.slow
def test_pickled_weights_are_downloaded_only_where_they_may_be_read(downloaded: Any) -> None:
    found, _, asked = downloaded
    assert found["org/pickled@main"][:2] == [f"org/pickled@{COMMIT}", COMMIT]
    assert "pytorch_model.bin" in found["org/pickled@main"][3]
    assert f"org/a/resolve/{COMMIT}/README.md" in asked
    assert not any(path.startswith("org/a/") and path.endswith(".bin") for path in asked)


@pytest.mark.slow
def test_what_was_downloaded_opens_offline(downloaded: Any, hub: Any) -> None:
    found, home, _ = downloaded
    before = len(hub.asked)
    again = opened_there(
        [*REFERENCES[:5], (False, "org/other")], home, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE="1"
    )
    assert {name: again[name] for _, name in REFERENCES[:5]} == {
        name: found[name] for _, name in REFERENCES[:5]
    }
    assert "the hub cannot be reached" in again["org/other"]
    assert hub.asked[before:] == []


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a b/c", "org/a/b", ""])
def test_what_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match=r"no such folder"):
        open_model(name)


def test_a_folder_is_itself(models: dict[str, Path]) -> None:
    model = open_model(str(models["a"]))
    assert (model.uri, model.revision) == (str(models["a"].resolve()), None)
    assert model.sha == Checkpoint.open(models["a"]).sha


@pytest.mark.parametrize("name", ["plus+plus", "org/name", "v@1", "org/name@main", "a+b@c"])
def test_a_folder_goes_before_all_that_its_name_may_mean(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    shutil.copytree(models["a"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert open_model(name).uri == str(tmp_path / name)


def test_a_folder_has_no_revision(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="is a folder and has no revisions"):
        open_model(f"{models['a']}@main")


@pytest.mark.parametrize(("base", "adapter"), [("b", "x"), ("b+1", "x"), ("b", "x+1"), ("b+", "+")])
def test_a_plus_may_be_part_of_either_name(
    models: dict[str, Path], tmp_path: Path, base: str, adapter: str
) -> None:
    shutil.copytree(models["a"], tmp_path / base)
    write_adapter(tmp_path / f"to {adapter}", models["a"])
    model = open_model(f"{tmp_path / base}+{tmp_path}/to {adapter}")
    assert model.uri == f"{tmp_path / base}+{tmp_path}/to {adapter}"
    assert model.path == tmp_path / base


@pytest.mark.parametrize("named", ["absolute", "relative-to-adapter", "relative-to-here"])
def test_an_adapter_alone_names_its_base(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    base = shutil.copytree(models["a"], tmp_path / "runs" / "base")
    name = {
        "absolute": str(base),
        "relative-to-adapter": "../base",
        "relative-to-here": "runs/base",
    }[named]
    adapter = write_adapter(tmp_path / "runs" / "adapter", base, base_model_name_or_path=name)
    monkeypatch.chdir(tmp_path)
    model = open_model("runs/adapter")
    assert model.path.resolve() == Path(base)
    assert model.uri == f"{base}+{adapter}"


@pytest.mark.parametrize(
    ("base", "words"),
    [(None, "names no base"), (7, "names no base"), ("gone", "base of adapter .*no such folder")],
)
def test_an_adapter_whose_base_cannot_be_found_is_refused(
    models: dict[str, Path], tmp_path: Path, base: object, words: str
) -> None:
    write_adapter(tmp_path / "adapter", models["a"], base_model_name_or_path=base)
    with pytest.raises(ModelError, match=words):
        open_model(str(tmp_path / "adapter"))


def test_what_stands_after_a_plus_must_be_an_adapter(models: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"adapter_config\.json is missing"):
        open_model(f"{models['a']}+{models['b']}")
