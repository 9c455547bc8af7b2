"""What a submitted job may read, and that nobody gets any further."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from evomerge.errors import InputError
from evomerge.job import Job, Parent, TaskEntry
from evomerge.service import confine

T = TypeVar("T")

ADMIN, NOBODY = True, False
TASK = {
    "name": "sums",
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"},
}
LM_EVAL = {
    "task": "theirs",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "train.jsonl"}},
    "training_split": "train",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with models and tasks in it; what it must not lead to lies beside it, in secret."""
    return world(tmp_path, monkeypatch)


def world(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root, secret = folder / "root", folder / "secret"
    for place in (root, secret):
        for model in ("a", "b", "run/checkpoint-1", "run/checkpoint-2"):
            (place / model).mkdir(parents=True)
            (place / model / "config.json").write_text("{}")
        write(place / "task" / "task.yaml", TASK)
        write(place / "suite" / "suite.yaml", {"name": "all", "tasks": [{"task": "../task"}]})
        write(place / "theirs.yaml", LM_EVAL)
        write(place / "space.yaml", {"kind": "weight", "method": "linear", "per": "model"})
        for split in ("train", "validation", "test"):
            (place / "task" / f"{split}.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    (folder / "cwd").mkdir()
    monkeypatch.chdir(folder / "cwd")
    return root


def write(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data))
    return path


def document(**changes: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "parents": {"a": {"model": "a"}, "b": {"model": "b"}},
        "space": {"preset": "global_task_arithmetic"},
        "base": {"model": "a"},
        "tasks": [{"task": "task"}],
        "budget": {"candidates": 4},
        **changes,
    }


def submitted(root: Path, is_admin: bool = NOBODY, **changes: Any) -> Job:
    return confine.submitted(document(**changes), [root], is_admin=is_admin)


def refused(root: Path, is_admin: bool = NOBODY, **changes: Any) -> str:
    """Why a job is refused, in one line."""
    with pytest.raises(InputError) as error:
        submitted(root, is_admin, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- what is let through --------------------------------------------------------------------------


def test_a_job_within_the_root_is_given_as_its_file_would_be(root: Path) -> None:
    job = submitted(
        root,
        parents={"a": {"model": "a"}, "b": {"model": str(root / "b")}, "s": {"series": "run/*"}},
        base={"model": "org/name@v1.0"},
        tasks=[{"task": "task"}, {"task": "suite"}, {"task": "gsm8k"}, {"task": "lm-eval:x"}],
        space={"preset": "space.yaml"},
    )
    path = write(root / "job.yaml", document())
    whole = {"parents", "base", "tasks", "space"}
    assert job.model_dump(exclude=whole) == Job.from_file(path).model_dump(exclude=whole)
    assert {name: parent.model for name, parent in job.parents.items()} == {
        "a": str(root / "a"),
        "b": str(root / "b"),
        "s-1": str(root / "run/checkpoint-1"),
        "s-2": str(root / "run/checkpoint-2"),
    }
    assert job.base == Parent(model="org/name@v1.0")
    tasks = [entry.task for entry in job.tasks]
    assert tasks[:2] == [str(root / "task/task.yaml")] * 2
    assert tasks[2].endswith("fitness/gsm8k/task.yaml")
    assert tasks[3] == "lm-eval:x"


def test_the_yaml_of_a_job_file_is_taken_as_well_as_its_data(root: Path) -> None:
    text = yaml.safe_dump(document())
    assert confine.submitted(text, [root]) == confine.submitted(document(), [root])


def test_a_file_of_mergekit_evolve_is_taken_too(root: Path) -> None:
    genome = {"models": ["a", "b"], "merge_method": "linear"}
    job = confine.submitted({"genome": genome, "tasks": ["task"]}, [root])
    assert [parent.model for parent in job.parents.values()] == [str(root / "a"), str(root / "b")]


def test_several_roots_and_links_between_them_may_be_used(root: Path, tmp_path: Path) -> None:
    (root / "linked").symlink_to(tmp_path / "secret" / "b")
    parents = {"a": {"model": "a"}, "b": {"model": "linked"}}
    both = [root, tmp_path / "secret"]
    job = confine.submitted(document(parents=parents), both)
    assert job.parents["b"].model == str(root / "linked")
    with pytest.raises(InputError):
        confine.submitted(document(parents=parents), [root])


def test_a_root_that_is_itself_a_link_holds_what_it_leads_to(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    job = confine.submitted(document(), [tmp_path / "link"])
    assert job.parents["a"].model == str(root / "a")
    confine.job(job, [tmp_path / "link"])


# --- what is not ----------------------------------------------------------------------------------

OUTSIDE = ["../secret/a", "{secret}/a", "a/../../secret/a", "out", "out/../secret/a"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize(
    "where", ["parents", "base", "adapter", "lora_of", "series", "genome", "genome_base"]
)
def test_no_model_is_read_from_elsewhere(root: Path, name: str, where: str) -> None:
    (root / "out").symlink_to(root.parent / "secret" / "a")
    named = name.format(secret=root.parent / "secret")
    others = {"b": {"model": "b"}}
    genome = {"models": ["a", "b"], "merge_method": "ties", "base_model": "b"}
    documents: dict[str, dict[str, Any]] = {
        "parents": document(parents={"x": {"model": named}, **others}),
        "base": document(base={"model": named}),
        "adapter": document(parents={"x": {"model": f"a+{named}"}, **others}),
        "lora_of": document(parents={"x": {"model": f"{named}+a"}, **others}),
        "series": document(parents={"x": {"series": f"{named}*"}}),
        "genome": {"genome": {**genome, "models": ["b", named]}, "tasks": ["task"]},
        "genome_base": {"genome": {**genome, "base_model": named}, "tasks": ["task"]},
    }
    with pytest.raises(InputError):
        confine.submitted(documents[where], [root], is_admin=ADMIN)


@pytest.mark.parametrize("name", ["../secret/task", "{secret}/task/task.yaml", "../secret/suite"])
def test_no_task_is_read_from_elsewhere(root: Path, name: str) -> None:
    named = name.format(secret=root.parent / "secret")
    assert "leads out of the folders" in refused(root, ADMIN, tasks=[{"task": named}])
    write(root / "mixed" / "suite.yaml", {"name": "x", "tasks": [{"task": f"../{named}"}]})
    assert refused(root, ADMIN, tasks=[{"task": "mixed"}])
    genome = {"models": ["a", "b"], "merge_method": "linear"}
    for task in (named, {"name": named}):
        with pytest.raises(InputError):
            confine.submitted({"genome": genome, "tasks": [task]}, [root], is_admin=ADMIN)


def test_no_suite_is_read_through_a_link_even_if_its_tasks_are_anybodys(root: Path) -> None:
    suite = root.parent / "secret" / "shared"
    write(suite / "suite.yaml", {"name": "shared", "tasks": [{"task": "gsm8k"}]})
    (root / "linked").symlink_to(suite)
    (root / "own").mkdir()
    (root / "own" / "suite.yaml").symlink_to(suite / "suite.yaml")
    for name in ("linked", "own", "own/suite.yaml"):
        assert "leads out" in refused(root, ADMIN, tasks=[{"task": name}])


@pytest.mark.parametrize("half", [None, "weight", "layers"])
@pytest.mark.parametrize("name", ["../secret/space.yaml", "{secret}/space.yaml", "../../x/space"])
def test_no_preset_is_read_from_elsewhere(root: Path, name: str, half: str | None) -> None:
    preset = {"preset": name.format(secret=root.parent / "secret")}
    space = preset if half is None else {"kind": "both", half: preset}
    assert "leads out of the folders" in refused(root, ADMIN, space=space)


def test_what_is_elsewhere_is_not_told_from_what_is_not(root: Path) -> None:
    secret = root.parent / "secret"
    for present, absent in [("a", "z"), ("task", "zask"), ("a/config.json", "a/zonfig.json")]:
        for make in (
            lambda name: {"parents": {"x": {"model": name}, "b": {"model": "b"}}},
            lambda name: {"parents": {"x": {"model": f"z+{name}"}, "b": {"model": "b"}}},
            lambda name: {"parents": {"x": {"series": f"{name}/*"}}},
            lambda name: {"tasks": [{"task": name}]},
            lambda name: {"space": {"preset": name}},
        ):
            said = {
                refused(root, **make(str(secret / name))).replace(str(secret / name), "NAME")
                for name in (present, absent)
            }
            assert len(said) == 1


@pytest.mark.parametrize(
    "link", ["model.safetensors", "config.json", "tokenizer/vocab.json", "adapter_config.json"]
)
def test_links_inside_a_model_that_lead_out_are_refused(root: Path, link: str) -> None:
    path = root / "c" / link
    path.parent.mkdir(parents=True)
    path.symlink_to(root.parent / "secret" / "a" / "config.json")
    said = refused(root, ADMIN, base={"model": "c"})
    assert said.startswith(f"base: '{path}' leads out")


def test_links_inside_a_model_that_stay_are_followed_as_in_the_hubs_cache(root: Path) -> None:
    (root / "blobs").mkdir()
    (root / "blobs" / "1234").write_text("{}")
    (root / "snapshots" / "main").mkdir(parents=True)
    (root / "snapshots" / "main" / "config.json").symlink_to("../../blobs/1234")
    assert submitted(root, base={"model": "snapshots/main"}).base is not None


def test_the_base_that_an_adapter_names_has_to_lie_within_too(root: Path) -> None:
    config = root / "lora" / "adapter_config.json"
    for base, is_fine in [
        ("../a", True),
        ("org/name", True),
        ("../../secret/a", False),
        (str(root.parent / "secret" / "a"), False),
    ]:
        write(config, None)
        config.write_text(json.dumps({"base_model_name_or_path": base}))
        alone = {"parents": {"x": {"model": "lora"}, "b": {"model": "b"}}}
        if is_fine:
            submitted(root, **alone)
        else:
            assert "leads out" in refused(root, ADMIN, **alone)
        submitted(root, parents={"x": {"model": "a+lora"}, "b": {"model": "b"}})


def test_a_hub_id_that_is_a_folder_of_the_working_directory_is_no_way_out(root: Path) -> None:
    (Path.cwd() / "org" / "name").mkdir(parents=True)
    assert "leads out" in refused(root, base={"model": "org/name"})


@pytest.mark.parametrize(
    "revision", ["../../../../secret/a", "..", "a/../b", "/etc", "a//b", "a\\b", "a b", "-x", "."]
)
def test_a_revision_leads_nowhere_in_the_hubs_cache(root: Path, revision: str) -> None:
    refused(root, ADMIN, base={"model": f"org/name@{revision}"})
    data = {"hub": "org/name", "split": "train", "revision": revision}
    write(root / "hub" / "task.yaml", {**TASK, "data": dict.fromkeys(TASK["data"], data)})
    assert "revision" in refused(root, ADMIN, tasks=[{"task": "hub"}])


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("name", ["../../secret/task/train.jsonl", "{secret}/task/train.jsonl"])
def test_no_records_of_a_task_are_read_from_elsewhere(root: Path, split: str, name: str) -> None:
    file = name.format(secret=root.parent / "secret")
    for data in (file, {"file": file}, {"file": file, "hub": "o/n", "split": "s", "revision": "v"}):
        write(root / "leaky" / "task.yaml", {**TASK, "data": {**TASK["data"], split: data}})
        said = refused(root, ADMIN, tasks=[{"task": "leaky"}])
        assert "task '" in said
        assert "leads out" in said
    shared = {"source": file, "split": "hash"}
    write(root / "leaky" / "task.yaml", {**TASK, "data": shared})
    assert "leads out" in refused(root, ADMIN, tasks=[{"task": "leaky"}])


@pytest.mark.parametrize("link", ["train.jsonl", "manifest.json", "task.sealed.json", "task.yaml"])
def test_links_inside_a_task_that_lead_out_are_refused(root: Path, link: str) -> None:
    path = root / "task" / link
    path.unlink(missing_ok=True)
    path.symlink_to(root.parent / "secret" / "task" / "train.jsonl")
    assert "leads out" in refused(root, ADMIN)


def test_records_in_the_folder_of_the_environment_may_be_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_DATA", str(root.parent / "secret"))
    submitted(root)
    (root.parent / "secret" / "train.jsonl").symlink_to("/etc/hostname")
    assert "leads out" in refused(root)


def lm_eval(root: Path, **changes: Any) -> str:
    """A task in lm-eval's format that differs."""
    write(root / "odd" / "task.yaml", {**LM_EVAL, **changes})
    return "odd"


def test_a_task_in_lm_evals_format_may_name_records_beside_it(root: Path) -> None:
    submitted(root, tasks=[{"task": lm_eval(root)}])
    submitted(root, tasks=[{"task": lm_eval(root, dataset_path="org/name")}])
    submitted(root, tasks=[{"task": lm_eval(root, dataset_path="../task")}])
    submitted(root, tasks=[{"task": lm_eval(root, include="../theirs.yaml")}])


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset_path": "../../secret/task"},
        {"dataset_path": "{secret}/task"},
        {"dataset_kwargs": {"data_dir": "{secret}/task"}},
        {"dataset_kwargs": {"data_files": "{secret}/task/train.jsonl"}},
        {"dataset_kwargs": {"data_files": ["{secret}/**/*.jsonl"]}},
        {"dataset_kwargs": {"data_files": {"train": ["../../secret/task/train.jsonl"]}}},
        {"dataset_kwargs": {"data_files": "linked/train.jsonl"}},
        {"dataset_kwargs": {"data_files": "l*/*.jsonl"}},
        {"include": "{secret}/theirs.yaml"},
        {"include": ["../theirs.yaml", "../../secret/theirs.yaml"]},
    ],
)
def test_a_task_in_lm_evals_format_reads_nothing_elsewhere(
    root: Path, changes: dict[str, Any]
) -> None:
    secret = root.parent / "secret"
    text = json.dumps(changes).replace("{secret}", str(secret))
    task = lm_eval(root, **json.loads(text))
    (root / "odd" / "linked").symlink_to(secret / "task")
    assert "leads out" in refused(root, ADMIN, tasks=[{"task": task}])


def test_what_a_task_includes_is_confined_as_well(root: Path) -> None:
    write(root / "outer.yaml", {**LM_EVAL, "dataset_path": str(root.parent / "secret" / "task")})
    assert "leads out" in refused(root, tasks=[{"task": lm_eval(root, include="../outer.yaml")}])
    write(root / "loop.yaml", {**LM_EVAL, "include": "loop.yaml"})
    submitted(root, tasks=[{"task": "loop.yaml"}])  # which opening it refuses


def test_a_file_of_the_working_directory_is_no_way_out(root: Path) -> None:
    (Path.cwd() / "own.jsonl").write_text("{}")
    (Path.cwd() / "data" / "set").mkdir(parents=True)
    for changes in (
        {"dataset_kwargs": {"data_files": "own.jsonl"}},
        {"dataset_path": "data/set"},
    ):
        assert "leads out" in refused(root, tasks=[{"task": lm_eval(root, **changes)}])
    source = {"hub": "data/set", "split": "train", "revision": "main"}
    write(root / "hub" / "task.yaml", {**TASK, "data": dict.fromkeys(TASK["data"], source)})
    assert "leads out" in refused(root, tasks=[{"task": "hub"}])


# --- what is left to admins -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["http://10.0.0.1/x.jsonl", "file:///etc/passwd", "zip://a::http://x", "s3://b/c"]
)
def test_only_an_admin_has_records_fetched_from_an_address(root: Path, name: str) -> None:
    task = lm_eval(root, dataset_kwargs={"data_files": {"train": name}})
    assert "scope 'admin'" in refused(root, tasks=[{"task": task}])
    submitted(root, ADMIN, tasks=[{"task": task}])


def test_only_an_admin_names_a_cluster_that_is_not_the_servers(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    elsewhere = {"kind": "ray", "address": "ray://evil.example:10001"}
    assert "scope 'admin'" in refused(root, executor=elsewhere)
    submitted(root, ADMIN, executor=elsewhere)
    for address in (None, "auto", "head:6379"):
        submitted(root, executor={"kind": "ray", "address": address})


@pytest.mark.parametrize(
    "assignment",
    ["executor.address=evil:1", "executor={kind: ray, address: 'evil:1'}", "executor.address=[a]"],
)
def test_overrides_of_a_search_under_way_name_no_other_cluster_either(assignment: str) -> None:
    with pytest.raises(InputError, match="scope 'admin'"):
        confine.overrides(["budget.candidates=9", assignment])
    confine.overrides([assignment], is_admin=ADMIN)
    confine.overrides(["budget.candidates=9", "executor.workers=2", "executor=auto"])


def test_a_job_for_a_server_names_no_store(root: Path) -> None:
    assert "leave it out" in refused(root, ADMIN, store="sqlite:////etc/x.db")


def test_python_in_a_task_is_refused_even_for_an_admin(root: Path) -> None:
    (root / "odd.yaml").write_text("task: odd\nprocess_docs: !function evil.run\n")
    assert "!function" in refused(root, ADMIN, tasks=[{"task": "odd.yaml"}])


# --- documents that are meant to break something --------------------------------------------------

LAUGHS = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "a: [",
        "name: !!python/object/apply:os.system [id]",
        "[\n" * 5000,
        "{a: " * 2000,
        "x: " + "[" * 60 + "]" * 60,
        "a: &a [*a]",
        "x" * 200_000,
        "name: \ud800",
        "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "\n".join(LAUGHS),
        "a0: &a0 {x: 1}\n" + "\n".join(LAUGHS).replace("[", "{<<: [").replace("]", "]}"),
    ],
    ids=[
        *("empty", "list", "open", "python", "deep", "deep maps", "nested", "cycle", "long"),
        *("surrogate", "laughs", "merged laughs"),
    ],
)
def test_yaml_that_is_no_job_is_refused_at_once(root: Path, text: str) -> None:
    with pytest.raises(InputError):
        confine.submitted(text, [root])


def test_data_that_is_no_job_is_refused_whatever_it_is(root: Path) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    for data in (
        {"parents": deep},
        {"parents": {"a": "b"}, "tasks": "x", "space": []},
        {"genome": 3},
        {"genome": {"models": [1, {"x": 2}]}, "tasks": {}},
        {"genome": {"models": ["a"]}, "tasks": [{"name": 4}, 5]},
        document(name="\ud800"),
        document(tasks=[{"task": 7}, "x"]),
        document(parents={"x": {"model": ["a"], "series": 3}}),
    ):
        with pytest.raises(InputError) as error:
            confine.submitted(data, [root])
        str(error.value).encode()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data", "yaml"])
def test_a_job_that_names_more_than_any_does_is_refused_before_anything_is_looked_up(
    root: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def path(*_: object) -> Path:
        raise AssertionError("it was looked up")

    monkeypatch.setattr(confine, "path", path)
    for changes in (
        {"tasks": [{"task": "t"}] * 1001},
        {"parents": {str(n): {"model": "a"} for n in range(1001)}},
        {"genome": {"models": ["a"] * 1001}, "tasks": ["t"]},
        {"genome": {"models": ["a"]}, "tasks": ["t"] * 1001},
        {"about": {str(n): n for n in range(20_000)}},
    ):
        data = changes if "genome" in changes else document(**changes)
        with pytest.raises(InputError, match="are enough for any"):
            confine.submitted(data if how == "data" else json.dumps(data), [root])


# --- any name, anywhere ---------------------------------------------------------------------------

NAMES = ["a", "b", "task", "suite", "run", "config.json", "checkpoint-1", "secret", "root"]
LINKS = ["out", "file", "loop", "dangling", "up", "in"]
HOSTILE = ["..", ".", "", "~", "~root", "\0", "x" * 300, "é", "\ud800", "\n", "a+b", "*", "[a", "@"]
names = st.one_of(
    st.lists(st.sampled_from([*NAMES, *LINKS, *HOSTILE]), min_size=1, max_size=6).map("/".join),
    st.lists(st.sampled_from([*NAMES, *LINKS, "..", "+", "/"]), min_size=1, max_size=8).map(
        "".join
    ),
    st.text(max_size=30),
    st.integers(100, 4000).map(lambda n: "a/" * n),
)


@pytest.fixture(scope="module")
def tangled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root full of links."""
    with pytest.MonkeyPatch.context() as patch:
        root = world(tmp_path_factory.mktemp("tangled"), patch)
        for name, target in {
            "out": "../secret",
            "file": "../secret/a/config.json",
            "loop": "loop",
            "dangling": "../nowhere",
            "up": "..",
            "in": "a",
        }.items():
            (root / name).symlink_to(target)
            (root / "a" / name).symlink_to(os.path.join("..", target))
        yield root


@given(name=names, prefix=st.sampled_from(["", "/", "{root}/", "{secret}/", "~/"]))
@settings(derandomize=True, deadline=None, max_examples=300)
def test_a_path_is_below_a_root_or_it_is_refused(tangled: Path, name: str, prefix: str) -> None:
    given_ = prefix.format(root=tangled, secret=tangled.parent / "secret") + name
    found = _or_why(lambda: confine.path(given_, [tangled]))
    if isinstance(found, str):
        assert "\n" not in found
        assert len(found.encode()) < 800
        return
    assert found.is_relative_to(tangled)
    assert os.path.realpath(found) == str(found)
    assert os.path.realpath(tangled / os.path.expanduser(given_)) == str(found)


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=150)
def test_no_name_anywhere_in_a_job_leads_out_or_breaks_anything(
    tangled: Path, data: st.DataObject
) -> None:
    prefix = data.draw(st.sampled_from(["", str(tangled) + "/", f"{tangled.parent}/secret/"]))
    name = prefix + data.draw(names)
    changes: dict[str, Any] = data.draw(
        st.sampled_from(
            [
                {"parents": {"x": {"model": name}, "b": {"model": "b"}}},
                {"parents": {"x": {"model": f"b+{name}"}, "b": {"model": "b"}}},
                {"parents": {"x": {"series": name}}},
                {"base": {"model": name}},
                {"tasks": [{"task": name}]},
                {"space": {"preset": name}},
                {"genome": {"models": [name, "b"], "merge_method": "linear"}, "tasks": ["task"]},
                {"genome": {"models": ["b", "a"], "merge_method": "linear"}, "tasks": [name]},
            ]
        )
    )
    written = changes if "genome" in changes else document(**{"base": {"model": "b"}, **changes})
    job = _or_why(lambda: confine.submitted(written, [tangled]))
    if isinstance(job, str):
        job.encode()
        return
    inside = str(tangled) + "/"
    for parent in (*job.parents.values(), job.base):
        for half in (parent.model or "").split("+") if parent is not None else ():
            if half.startswith("/"):
                assert os.path.realpath(half).startswith(inside)
    for entry in job.tasks:
        assert entry.task.startswith(("lm-eval:", inside)) or "/fitness/" in entry.task


def _or_why(work: Callable[[], T]) -> T | str:
    """What it gives, or why it does not."""
    try:
        return work()
    except InputError as error:
        return str(error)


# --- what is new has to be thought of -------------------------------------------------------------

# Texts of a job that are no path, and those that confine looks at.
HARMLESS = {
    *("Job.name", "Job.objectives", "Constraint.task", "Constraint.of", "Engine.device"),
    *("Parent.search", "TaskEntry.metric", "WeightSpace.method", "WeightSpace.filters"),
    *("WeightSpace.part",),
}
CONFINED = {
    *("Parent.model", "Parent.series", "TaskEntry.task", "Executor.address", "Job.store"),
    *("WeightSpace.preset", "LayerSpace.preset", "BothSpace.preset", "SeriesSpace.preset"),
}


def test_every_text_that_a_job_may_hold_is_known_to_be_a_path_or_none() -> None:
    assert _texts(Job, set()) == HARMLESS | CONFINED
    assert set(TaskEntry.model_fields) == {"task", "weight", "chat", "metric"}


def _texts(kind: Any, seen: set[Any]) -> set[str]:
    """The fields of a model, and of those inside it, that hold any text."""
    if kind in seen:
        return set()
    seen.add(kind)
    found: set[str] = set()
    for name, field in kind.model_fields.items():
        for part in _parts(field.annotation):
            if part is str:
                found.add(f"{kind.__name__}.{name}")
            elif isinstance(part, type) and issubclass(part, BaseModel):
                found |= _texts(part, seen)
    return found


def _parts(annotation: Any) -> Iterator[Any]:
    """The kinds that an annotation is made of; the keys of mappings are names."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments[1:] if get_origin(annotation) is dict else arguments:
        yield from _parts(argument)
