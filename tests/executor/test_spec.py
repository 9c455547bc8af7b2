"""What workers are opened from: small enough to travel, strict about what they find, and of test
nothing goes with it. What a node lacks is sent."""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.errors import InputError, TaskError
from evomerge.executor import Request
from evomerge.executor.demand import environment
from evomerge.executor.ray import RayExecutor
from evomerge.executor.spec import ModelSpec, Opened, Opening, TaskSpec, WorkerSpec
from evomerge.executor.worker import Worker
from evomerge.fitness.results import Scored
from evomerge.fitness.task import Task
from evomerge.job import Engine, TaskEntry, packaged
from evomerge.merge.sources import open_model
from evomerge.recipe import Recipe
from tests import tiny
from tests.clusters import Nodes, giving, misbehaving, notes, section
from tests.merge.test_adapters import write_adapter

TASK = "ja_list_ops"


@pytest.fixture(autouse=True)
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a node that has nothing."""
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "node"))
    return tmp_path / "node"


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    """Of two models and a task, each in a place that a test may write to."""
    parents = [tiny.write_model(tmp_path / name, seed) for seed, name in enumerate("ab")]
    task = tiny.write_task(tmp_path / "task")
    return WorkerSpec(
        Engine(device="cpu", threads=1),
        {str(parent): ModelSpec.of(open_model(str(parent))) for parent in parents},
        str(parents[0]),
        (TaskSpec.of(Task.open(task), TaskEntry(task=str(task))),),
        shaped=True,
    )


class Wire:
    """A source that has what a stock has, and counts the bytes that it sends: see Source."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._stock = spec.stock()
        self.sent = 0

    def pieces(self, key: str, name: str, start: int, stop: int) -> Iterator[bytes]:
        if stop > start:
            self.sent += stop - start
            yield self._stock.read(key, name, start, stop)


def opened(opening: Opening[Opened], source: Wire | None = None) -> Opened:
    """What is opened on a node that is sent what it lacks; without a source it lacks nothing."""
    sent = None
    while True:
        try:
            step = opening.send(sent)
        except StopIteration as end:
            found: Opened = end.value
            return found
        if step.lacks and source is None:
            raise LookupError(step.word)
        sent = source if step.lacks else None


def elsewhere(spec: WorkerSpec) -> WorkerSpec:
    """As a node sees it where nothing lies under the paths of the search's machine."""
    models = {name: replace(m, uri="/elsewhere/model") for name, m in spec.models.items()}
    tasks = tuple(replace(task, name="/elsewhere/task.yaml") for task in spec.tasks)
    return replace(spec, models=models, tasks=tasks)


class Elsewhere(WorkerSpec):
    """Its workers see it so."""

    def opening(self) -> Opening[Worker]:
        return WorkerSpec.opening(elsewhere(self))


def request(spec: WorkerSpec) -> Request:
    """Of the first model as it is."""
    recipe = {"merge_method": "passthrough", "models": [{"model": spec.first}]}
    examples = np.arange(4, dtype=np.uint32)
    return Request(0, Recipe.from_dict(recipe), "train", {TASK: examples})


def scores(worker: Worker, spec: WorkerSpec) -> str:
    """What it finds, bit for bit."""
    evaluation = worker.evaluate(request(spec))
    assert isinstance(evaluation, Scored)
    return str(evaluation.tasks)


# -- what is there ---------------------------------------------------------------------------------


def test_a_worker_needs_its_spec_alone(spec: WorkerSpec) -> None:
    with closing(opened(pickle.loads(pickle.dumps(spec)).opening())) as worker:
        evaluation = worker.evaluate(request(spec))
    assert isinstance(evaluation, Scored)
    assert len(evaluation.tasks[TASK]) == 4


def test_what_travels_is_small(spec: WorkerSpec) -> None:
    assert len(pickle.dumps(spec)) < 6000
    assert len(pickle.dumps(request(spec))) < 3000


def test_the_test_split_is_not_needed(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "task" / "data" / "test.jsonl").unlink()
    opened(spec.opening()).close()


def test_a_ready_made_task_travels_by_its_name() -> None:
    path = packaged("fitness") / TASK / "task.yaml"
    spec = TaskSpec.of(Task.open(path.resolve()), TaskEntry(task=TASK))
    assert spec.name == "ja_list_ops/task.yaml"
    assert opened(spec.opening()).content("train") == spec.contents["train"]


def test_chat_and_metric_of_a_task_are_kept(tmp_path: Path) -> None:
    path = tiny.write_task(tmp_path / "task")
    plain, chat = (
        TaskSpec.of(Task.open(path, c), TaskEntry(task=str(path), chat=c)) for c in (None, True)
    )
    assert chat.contents != plain.contents
    assert opened(chat.opening()).content("train") == chat.contents["train"]


def test_what_travels_holds_no_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_model(tmp_path / "a", seed=0)
    tiny.write_task(tmp_path / "task")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVOMERGE_DATA", "data")
    monkeypatch.setenv("EVOMERGE_CACHE", "~/cache")
    model = ModelSpec.of(open_model("a"))
    entry = TaskEntry(task="task/task.yaml")
    task = TaskSpec.of(Task.open(Path("task/task.yaml")), entry)
    given = environment(Engine())
    monkeypatch.chdir("/")
    assert opened(model.opening()).sha == model.sha
    assert opened(task.opening()).content("train") == task.contents["train"]
    assert all(path.is_file() for path in map(Path, model.paths.values()))
    assert given["EVOMERGE_DATA"] == str(tmp_path / "data")
    assert given["EVOMERGE_CACHE"] == str(Path.home() / "cache")


# -- what is not there, or another -----------------------------------------------------------------


def test_what_a_node_lacks_is_sent_once_and_scored_alike(spec: WorkerSpec) -> None:
    with closing(opened(spec.opening())) as worker:
        expected = scores(worker, spec)
    wire = Wire(spec)
    with closing(opened(elsewhere(spec).opening(), wire)) as worker:
        assert scores(worker, spec) == expected
    parcels = [spec.tasks[0].parcel, *(model.parcel for model in spec.models.values())]
    assert wire.sent == sum(parcel.size for parcel in parcels if parcel is not None)
    with closing(opened(elsewhere(spec).opening())) as worker:  # from the cache
        assert scores(worker, spec) == expected


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_another_model_in_the_place_of_one_is_not_taken_for_it(
    spec: WorkerSpec, tmp_path: Path, file: str
) -> None:
    other = tiny.write_model(tmp_path / "other", seed=9, layers=2)
    path, text = Path(spec.first) / file, (other / file).read_bytes()
    right = path.read_bytes()
    path.write_bytes(b"\n" + text if file == "tokenizer.json" else text)
    model = spec.models[spec.first]
    with pytest.raises(LookupError, match=r"model '.*/a' is not there as it is here"):
        opened(model.opening())
    with pytest.raises(InputError, match=r"(is not what it was|is shorter than) when the search"):
        opened(model.opening(), Wire(spec))
    path.write_bytes(right)
    wire = Wire(spec)
    assert opened(replace(model, uri="/elsewhere").opening(), wire).sha == model.sha
    assert wire.sent  # what did not hash to what was promised is not in the cache


def test_a_model_that_is_not_there_is_named(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "b").rename(tmp_path / "elsewhere")
    with pytest.raises(LookupError, match=r"model '.*/b' is not there"):
        opened(spec.opening())
    with pytest.raises(InputError, match=r"/b/config.json' cannot be read: No such file"):
        opened(spec.opening(), Wire(spec))


def test_an_adapter_travels_with_its_base(
    models: dict[str, Path], tmp_path: Path, spec: WorkerSpec
) -> None:
    adapter = write_adapter(tmp_path / "adapter", models["a"])
    model = open_model(f"{models['a']}+{adapter}")
    sent = ModelSpec.of(model)
    spec = replace(spec, models={"adapted": sent})
    found = opened(replace(sent, uri="/elsewhere").opening(), Wire(spec))
    assert found.sha == model.sha
    for name in model.headers:
        assert found.tensor(name).equal(model.tensor(name))


def test_what_stands_beside_a_model_is_read_there_too(spec: WorkerSpec, tmp_path: Path) -> None:
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (tmp_path / "a" / "notes.txt").write_text("not read by anybody")
    model = ModelSpec.of(open_model(spec.first))
    wire = Wire(replace(spec, models={spec.first: model}))
    folder = opened(replace(model, uri="/elsewhere").opening(), wire).path
    assert (folder / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    assert not (folder / "notes.txt").exists()


def test_a_damaged_copy_is_mended(spec: WorkerSpec) -> None:
    model = replace(spec.models[spec.first], uri="/elsewhere")
    folder = opened(model.opening(), Wire(spec)).path
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("llama", "LLAMA"))
    wire = Wire(spec)
    assert opened(model.opening(), wire).sha == model.sha
    assert wire.sent == model.parcel.files["model/config.json"].size


@pytest.mark.parametrize("split", ["train", "validation"])
def test_other_data_are_not_taken_for_the_tasks(
    spec: WorkerSpec, tmp_path: Path, split: str
) -> None:
    path, wire = tmp_path / "task" / "data" / f"{split}.jsonl", Wire(spec)
    lines = path.read_text(encoding="utf-8").splitlines()
    tiny.write_jsonl(path, [json.loads(line) for line in lines[:-1]])
    (task,) = spec.tasks
    with pytest.raises(LookupError, match=r"task '/.*/task.yaml' is not there as it is here"):
        opened(task.opening())
    with pytest.raises(TaskError, match=rf"task 'ja_list_ops': {split} is not what it is where"):
        opened(task.opening(), wire)


def test_other_settings_of_a_task_that_cannot_be_sent_are_refused(
    spec: WorkerSpec, tmp_path: Path
) -> None:
    path = tmp_path / "task" / "task.yaml"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("max_new_tokens: ", "max_new_tokens: 1"))
    (task,) = spec.tasks
    with pytest.raises(TaskError, match="train is not what it is where the search was started"):
        opened(replace(task, parcel=None).opening())


# -- test stays where it is ------------------------------------------------------------------------

FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
FORMS: dict[str, dict[str, Any]] = {
    "files": FILES,
    "groups": FILES | {"group": "group"},
    "divided": {"source": "all.jsonl", "split": "hash"},
    "divided, with groups": {"source": "all.jsonl", "split": "hash", "group": "group"},
    "ranges": {
        "source": "all.jsonl",
        "split": "ranges",
        "ranges": {"train": [20, 40], "validation": [40, 50], "test": [0, 20]},
    },
    "a table": {"source": "all.csv", "split": "hash", "test": "test.jsonl"},
}


def write_form(folder: Path, data: Mapping[str, Any]) -> Path:
    """A task whose every record says a word of its own."""
    folder.mkdir()
    splits = {"train": range(20, 40), "validation": range(40, 50), "test": range(20)}
    records = [
        {"q": f"what is secret{i:03}?", "a": f"reply{i:03}", "group": i // 2} for i in range(50)
    ]
    for split, numbers in splits.items():
        tiny.write_jsonl(folder / f"{split}.jsonl", [records[i] for i in numbers])
    tiny.write_jsonl(folder / "all.jsonl", records)
    rows = ["q,a", *(f"{record['q']},{record['a']}" for record in records[20:])]
    (folder / "all.csv").write_text("\n".join(rows) + "\n")
    task = {
        "name": "words",
        "data": dict(data),
        "prompt": "{{ q }}",
        "target": "{{ a }}",
        "generate": {"max_new_tokens": 4},
        "score": "exact_match",
    }
    path = folder / "task.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_test_travels(tmp_path: Path, spec: WorkerSpec, form: str) -> None:
    path = write_form(tmp_path / "words", FORMS[form])
    task = Task.open(path)
    sent = TaskSpec.of(task, TaskEntry(task=str(path)))
    spec = replace(spec, tasks=(sent,))
    carried = b"".join(held for held in sent.carried().values() if isinstance(held, bytes))
    text = (carried + pickle.dumps(spec)).decode(errors="replace")
    shown = {split: [e.question for e in task.examples(split)] for split in ("train", "validation")}
    for i in range(50):
        known = any(f"what is secret{i:03}?" in asked for asked in shown.values())
        assert (f"secret{i:03}" in text) == (f"reply{i:03}" in text) == known
    assert sum(map(len, shown.values())) < 50
    found = opened(replace(sent, name="/elsewhere").opening(), Wire(spec))
    for split, asked in shown.items():
        assert [example.question for example in found.examples(split)] == asked
    with pytest.raises(TaskError, match=r"test\.jsonl' is missing"):
        found.require_test()


# -- on Ray ----------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_node_that_lacks_everything_is_sent_it_once(
    nodes: Nodes, spec: WorkerSpec, node: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(opened(spec.opening())) as worker:
        expected = scores(worker, spec)
    away = Elsewhere(**vars(spec))
    asked = [replace(request(spec), candidate=candidate) for candidate in range(6)]
    there = section(cpus=1, resources={"there": 1})
    with nodes.another(there=2), closing(RayExecutor(there, away)) as pool:
        found = list(pool.evaluate(giving(asked)))
    assert len(found) == 6
    for landed in found:
        assert isinstance(landed.evaluation, Scored)
        assert str(landed.evaluation.tasks) == expected
    parcels = [spec.tasks[0].parcel, *(model.parcel for model in spec.models.values())]
    keys = {parcel.key for parcel in parcels if parcel is not None}
    assert {path.name for path in (node / "parcels").iterdir() if path.is_dir()} == keys
    sent = [record.message for record in caplog.records if "are sent to" in record.message]
    assert len(sent) == len(keys)  # by one of two workers


@pytest.mark.ray
def test_a_model_that_changes_while_a_search_runs_is_sent_to_nobody(
    nodes: Nodes, spec: WorkerSpec
) -> None:
    config = Path(spec.first) / "config.json"
    config.write_text(config.read_text().replace("\n", " ", 1))
    with pytest.raises(InputError, match=r"^node '.*': 'model/config.json' is not what it was"):
        RayExecutor(section(workers=1), Elsewhere(**vars(spec)))


@pytest.mark.ray
def test_no_time_limit_ends_what_goes_on(
    nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slow = replace(misbehaving(tmp_path), steps=13)
    with closing(RayExecutor(section(workers=1, time_limit=12), slow)):
        assert len(notes(tmp_path, "opened")) == 1
    assert "is replaced" not in caplog.text
