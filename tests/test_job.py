"""Job files: defaults, presets, overrides, paths, and a remedy for each wrong input."""

import json
import os
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import JobError
from evomerge.job import (
    BothSpace,
    Job,
    Parent,
    Range,
    Staging,
    TaskEntry,
    WeightSpace,
    find_task,
    packaged,
    read_yaml,
)
from tests import tiny

PARENTS = {"a": {"model": "zoo/a"}, "b": {"model": "zoo/b"}}
MINIMAL: dict[str, Any] = {
    "name": "night",
    "parents": PARENTS,
    "space": {"kind": "layers"},
    "tasks": [{"task": "sums"}],
    "budget": {"candidates": 10},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with everything that jobs of this file name."""
    for name in ("a", "b", "base", "math", "ja"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
    for task in ("sums", "ja_math"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "task.yaml").write_text("name: x\n")
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    """The minimal job with keys replaced; None takes a key out."""
    job = {k: v for k, v in {**MINIMAL, **changes}.items() if v is not None}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The one-line message with which a job file is refused."""
    with pytest.raises(JobError) as caught:
        Job.from_file(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_everything_but_the_required_keys_has_a_default(folder: Path) -> None:
    job = Job.from_file(write(folder))
    assert job.model_dump(mode="json", exclude={"parents", "space", "tasks"}) == {
        "name": "night",
        "seed": 0,
        "base": None,
        "objective": "mean",
        "objectives": [],
        "constraints": [],
        "shaping": 0.05,
        "optimizer": {"name": "auto", "population": "auto", "sigma0": None, "restarts": 0},
        "mode": "synchronous",
        "budget": {
            "candidates": 10,
            "example_evaluations": None,
            "hours": None,
            "gpu_hours": None,
        },
        "stop": {"target": None, "stagnation": None, "overfitting": None},
        "staging": None,
        "guard": {
            "validation_looks": 5,
            "alpha": 0.05,
            "monitor": 0.2,
            "train_on_public_test_sets": False,
        },
        "engine": {
            "kind": "transformers",
            "device": "auto",
            "dtype": "auto",
            "threads": "auto",
            "batch_size": "auto",
            "context": None,
            "merge_ahead": "auto",
            "tensor_parallel": 1,
            "gpu_memory": 0.5,
            "cache_gb": None,
            "eager": True,
        },
        "executor": {
            "kind": "inline",
            "address": None,
            "workers": "auto",
            "priority": 0,
            "cpus": "auto",
            "gpus": "auto",
            "resources": {},
            "time_limit": 3600.0,
            "start_limit": 300.0,
        },
        "store": "sqlite:///evomerge.db",
    }
    assert job.tasks[0].weight == 1.0


DOCUMENTED = """
name: ja-math
seed: 7
parents:                       # at least two
  math: {model: zoo/math}
  ja:   {model: zoo/ja}
base: {model: zoo/base}        # for methods that need task vectors
space: {preset: per_layer_task_arithmetic, weight: [0.0, 1.5]}     # a preset with overrides
tasks:
  - {task: ja_math, weight: 1.0}        # a folder or task.yaml
objective: mean
optimizer: {name: cma-es, population: auto, sigma0: 0.1667}
budget: {candidates: 600, example_evaluations: 60000, hours: 8, gpu_hours: 8}   # any of them
stop: {target: 0.9, stagnation: 20, overfitting: 5}
constraints: [{task: ja_math, of: base, drop: 0.01}]
staging: {stages: [25, 50, 100], keep: [10, 7]}
guard: {validation_looks: 5, alpha: 0.05}
engine: {kind: transformers, device: auto}
executor: {kind: inline}
store: sqlite:///evomerge.db   # --store and EVOMERGE_STORE win over this
"""


def test_the_documented_job_is_a_job(folder: Path) -> None:
    path = folder / "job.yaml"
    path.write_text(DOCUMENTED)
    job = Job.from_file(path)
    assert list(job.parents) == ["math", "ja"]
    assert isinstance(job.space, WeightSpace)
    assert job.space.method == "task_arithmetic"
    assert job.space.weight == Range(low=0.0, high=1.5)
    assert job.optimizer.sigma0 == 0.1667
    assert job.budget.hours == 8
    assert isinstance(job.staging, Staging)
    assert (job.staging.stages, job.staging.keep) == ((25, 50, 100), (10, 7))


@pytest.mark.parametrize(
    "path", sorted((tiny.ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_examples_are_jobs(path: Path) -> None:
    assert Job.from_file(path).budget.candidates


def test_a_stored_job_is_the_job(folder: Path) -> None:
    path = folder / "job.yaml"
    path.write_text(DOCUMENTED)
    job = Job.from_file(path)
    stored = job.model_dump(mode="json", exclude_none=True, by_alias=True)
    assert Job.from_dict(stored, "store") == job


def test_a_job_cannot_be_changed(folder: Path) -> None:
    job = Job.from_file(write(folder))
    with pytest.raises(ValueError, match="frozen"):
        job.seed = 1


def test_a_preset_is_written_out(folder: Path) -> None:
    space = Job.from_file(write(folder, space={"preset": "per_layer_dare_ties"})).space
    assert space == WeightSpace(
        preset="per_layer_dare_ties",
        kind="weight",
        method="dare_ties",
        per="layer",
        normalize=False,
        weight=Range(low=-0.5, high=1.5, start=0.5),
        density=Range(low=0.1, high=1.0, start=0.6),
    )


def test_what_the_job_gives_wins_over_its_preset(folder: Path) -> None:
    given = {"preset": "per_layer_ties", "granularity": 2, "density": [0.2, 0.9], "per": "module"}
    space = Job.from_file(write(folder, space=given)).space
    assert (space.granularity, space.per, space.method) == (2, "module", "ties")
    assert space.density == Range(low=0.2, high=0.9)
    assert space.weight == Range(low=-0.5, high=1.5, start=0.5)


def test_a_space_may_be_written_out_in_full(folder: Path) -> None:
    given = {"kind": "weight", "method": "linear", "per": "model", "weight": [0, 1]}
    space = Job.from_file(write(folder, space=given)).space
    weight = Range(low=0, high=1)
    assert space == WeightSpace(kind="weight", method="linear", per="model", weight=weight)


def test_a_preset_of_the_jobs_own_folder_comes_before_a_packaged_one(folder: Path) -> None:
    (folder / "per_layer_ties").write_text("{kind: layers, repeats: 3}")
    assert Job.from_file(write(folder, space={"preset": "per_layer_ties"})).space.repeats == 3
    (folder / "mine.yaml").write_text("{kind: layers, repeats: 4}")
    assert Job.from_file(write(folder, space={"preset": "mine.yaml"})).space.repeats == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{kind: weight, methd: ties}", ["methd: unknown key", "did you mean 'method'?"]),
        (
            "{kind: weight, method: ties, per: model, weight: [1, 0]}",
            ["space.weight: [1.0, 0.0] is empty"],
        ),
        ("[kind]", ["holds no keys"]),
    ],
)
def test_a_wrong_preset_is_named(folder: Path, text: str, words: list[str]) -> None:
    (folder / "mine.yaml").write_text(text)
    message = refusal(write(folder, space={"preset": "mine.yaml"}))
    assert [word for word in ["mine.yaml", *words] if word not in message] == []


def test_paths_are_looked_up_from_the_job_files_folder(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    job = Job.from_file(write(folder, base={"model": "./zoo/../zoo/base"}))
    assert job.parents["a"].model == str(folder / "zoo" / "a")
    assert job.base is not None
    assert job.base.model == str(folder / "zoo" / "base")
    assert job.tasks[0].task == str(folder / "sums" / "task.yaml")


def test_a_job_named_by_a_relative_path_gives_absolute_paths(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder)
    monkeypatch.chdir(folder.parent)
    job = Job.from_file(Path(folder.name) / "job.yaml")
    assert job.parents["b"].model == str(folder / "zoo" / "b")
    assert job.tasks[0].task == str(folder / "sums" / "task.yaml")


def test_absolute_and_home_paths_stand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    parents = {"a": {"model": str(folder / "zoo" / "a")}, "b": {"model": "~/zoo/b"}}
    job = Job.from_file(write(folder, parents=parents))
    assert [p.model for p in job.parents.values()] == [str(folder / "zoo" / n) for n in "ab"]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("zoo/base", "{folder}/zoo/base"),
        ("org/name", "org/name"),
        ("org/name@main", "org/name@main"),
        ("zoo/base+zoo/math", "{folder}/zoo/base+{folder}/zoo/math"),
        ("zoo/base+org/name@v1", "{folder}/zoo/base+org/name@v1"),
        ("org/name+./zoo/math", "org/name+{folder}/zoo/math"),
        ("zoo/a+b", "{folder}/zoo/a+b"),
        ("zoo/a+b+zoo/math", "{folder}/zoo/a+b+{folder}/zoo/math"),
        ("~/zoo/base+~/zoo/math", "{folder}/zoo/base+{folder}/zoo/math"),
    ],
)
def test_a_model_is_a_folder_or_else_a_hub_id_and_may_have_an_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "zoo" / "a+b").mkdir()
    job = Job.from_file(write(folder, base={"model": written}))
    assert job.base is not None
    assert job.base.model == meant.format(folder=folder)


def test_a_task_may_be_a_folder_or_a_file_or_a_packaged_name(folder: Path) -> None:
    tasks = [{"task": "sums"}, {"task": "ja_math/task.yaml"}, {"task": "ja_list_ops", "weight": 2}]
    job = Job.from_file(write(folder, tasks=tasks))
    assert job.tasks == (
        TaskEntry(task=str(folder / "sums" / "task.yaml")),
        TaskEntry(task=str(folder / "ja_math" / "task.yaml")),
        TaskEntry(task=str(packaged("fitness") / "ja_list_ops" / "task.yaml"), weight=2),
    )


def test_a_task_of_the_jobs_own_folder_comes_before_a_packaged_one(folder: Path) -> None:
    (folder / "sums").rename(folder / "ja_list_ops")
    assert find_task("ja_list_ops", folder) == folder / "ja_list_ops" / "task.yaml"


def test_a_task_is_looked_up_from_the_working_directory_by_default(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert find_task("sums") == folder / "sums" / "task.yaml"


@pytest.mark.parametrize("kind", get_args(packaged.__annotations__["kind"]))
def test_ready_made_files_ship(kind: Any) -> None:
    assert list(packaged(kind).glob("**/*.yaml"))


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("seed=11", None, "seed", 11),
        ("name=day", None, "name", "day"),
        ("budget.candidates=7", "budget", "candidates", 7),
        ("budget={hours: 0.5}", "budget", "hours", 0.5),
        ("guard.alpha=1e-2", "guard", "alpha", 0.01),
        ("optimizer.name=random", "optimizer", "name", "random"),
        ("optimizer.population=auto", "optimizer", "population", "auto"),
        ("store=sqlite:///a=b.db", None, "store", "sqlite:///a=b.db"),
        ("space.preset=layer_stack", "space", "repeats", 1),
        ("space.max_layers=9", "space", "max_layers", 9),
    ],
)
def test_an_override_is_yaml_under_a_dotted_key(
    folder: Path, override: str, section: str | None, key: str, value: Any
) -> None:
    job = Job.from_file(write(folder), [override])
    assert getattr(getattr(job, section) if section else job, key) == value


def test_overrides_build_sections_and_the_last_one_wins(folder: Path) -> None:
    overrides = ["staging.stages=[2, 4]", "staging.keep=[3]", "staging.keep=[2]"]
    for staging in ({}, {"staging": {}}):
        job = Job.from_file(write(folder, **staging), overrides)
        assert isinstance(job.staging, Staging)
        assert job.staging.keep == (2,)


def test_an_override_fills_a_section_that_the_file_leaves_blank(folder: Path) -> None:
    path = write(folder)
    path.write_text(path.read_text() + "guard:\n")
    assert Job.from_file(path, ["guard.alpha=0.2"]).guard.alpha == 0.2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["override 'seed'", "write key=value"]),
        ("=3", ["override '=3'", "write key=value"]),
        ("name.first=x", ["override 'name.first=x'", "'name' holds no keys"]),
        ("tasks.0.weight=2", ["override 'tasks.0.weight=2'", "'tasks' holds no keys"]),
        ("seed=[", ["override 'seed=['", "'[' is not YAML"]),
        ("budgt.candidates=3", ["budgt: unknown key", "did you mean 'budget'?"]),
        ("seed=x", ["seed: 'x': give a whole number"]),
    ],
)
def test_a_wrong_override_is_refused(folder: Path, override: str, words: list[str]) -> None:
    message = refusal(write(folder), override)
    assert all(word in message for word in words)


def stages(stages: list[int], keep: list[int]) -> dict[str, Any]:
    return {"staging": {"stages": stages, "keep": keep}}


TIES = {"kind": "weight", "method": "ties", "per": "model", "weight": [0, 1]}


def ties(**changes: Any) -> dict[str, Any]:
    return {"space": {**TIES, **changes}}


def both(
    weight: dict[str, Any] | None = None, layers: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    parts = {"weight": {**TIES, **(weight or {})}, "layers": {"kind": "layers", **(layers or {})}}
    return {"space": {"kind": "both", **parts, **more}}


def pareto(*objectives: Any) -> dict[str, Any]:
    return {"objective": "pareto", "objectives": list(objectives)}


def keeps(**constraint: Any) -> dict[str, Any]:
    return {"constraints": [{"task": "sums", **constraint}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgt": {"candidates": 1}}, ["budgt: unknown key", "did you mean 'budget'?"]),
        ({"budget": {"candidats": 1}}, ["budget.candidats: unknown key", "mean 'candidates'?"]),
        ({"zzz": 1}, ["zzz: unknown key", "known: base, budget,"]),
        ({"budget": None}, ["budget: required, and missing"]),
        ({"name": None}, ["name: required, and missing"]),
        ({"budget": {}}, ["budget: no limit", "give candidates, example_evaluations, hours or"]),
        ({"budget": {"candidates": 0}}, ["budget.candidates: 0", "greater than or equal to 1"]),
        ({"budget": {"hours": float("inf")}}, ["budget.hours: inf", "finite"]),
        ({"budget": 600}, ["budget: 600", "give keys and their values"]),
        (ties(weight=[1, 0]), ["space.weight: [1.0, 0.0] is empty", "low < high"]),
        (ties(weight=[1, 1]), ["space.weight: [1.0, 1.0] is empty", "low < high"]),
        (ties(weight=[0, 1, 2]), ["space.weight: [0, 1, 2]", "give [low, high]"]),
        (ties(density=[0.5]), ["space.density: [0.5]", "give [low, high]"]),
        (
            ties(weight={"low": 0, "high": 1, "start": 3}),
            ["space.weight: start 3.0 is outside [0.0, 1.0]"],
        ),
        (ties(weight=[0, float("nan")]), ["space.weight.high: nan", "finite"]),
        ({"space": {"preset": "per_layer_tis"}}, ["'per_layer_tis'", "mean 'per_layer_ties'?"]),
        (ties(method="tis"), ["space.method: 'tis' is unknown", "did you mean 'ties'?"]),
        ({"space": {"kind": "layer"}}, ["space.kind: 'layer' is unknown", "mean 'layers'?"]),
        ({"space": {"kind": 3}}, ["space.kind: '3' is unknown", "known: both, layers, series,"]),
        ({"space": {}}, ["space.kind: required, and missing", "known: both, layers, series,"]),
        ({"space": {"prset": "x"}}, ["space.prset: unknown key", "did you mean 'preset'?"]),
        ({"space": {"preset": 3}}, ["space.preset: 3", "give a preset's name"]),
        ({"space": "layers"}, ["space: 'layers'", "give keys and their values"]),
        (ties(methd="ties"), ["space.methd: unknown key", "did you mean 'method'?"]),
        (ties(method=None), ["space.method: ", "give text or give a list"]),
        (ties(method=["ties", 5]), ["space.method[1]: 5: give text"]),
        (ties(method=[]), ["space.method: name each method once", "at least one"]),
        (ties(method=["ties", "ties"]), ["space.method: name each method once"]),
        (ties(lambda_=[0, 1]), ["space.lambda_: unknown key", "did you mean 'lambda'?"]),
        (ties(weight={"low": 0, "hih": 1}), ["space.weight.hih: unknown key", "mean 'high'?"]),
        (ties(weight={"low": 0}), ["space.weight.high: required, and missing"]),
        (ties(max_layers=3), ["space.max_layers: unknown key: known: alpha, density,"]),
        ({"space": {"kind": "layers", "scal": 1}}, ["space.scal: unknown key", "mean 'scale'?"]),
        ({"space": {"kind": "layers", "densty": 1}}, ["space.densty: unknown key: known: form,"]),
        ({"space": {"kind": "layers", "max_layers": 0}}, ["space.max_layers: 0", "equal to 1"]),
        (both(weight={"method": "tis"}), ["space.weight.method: 'tis' is unknown"]),
        (both(weight={"max_layers": 3}), ["space.weight.max_layers: ", "to 'space.layers'"]),
        (both(layers={"form": "x"}), ["space.layers.form: 'x'", "'switches', 'segments'"]),
        (both(layers={"kind": "weight"}), ["space.layers.kind: 'weight'", "be 'layers'"]),
        (both(max_layers=3), ["space.max_layers: unknown key: it belongs to 'space.layers'"]),
        ({"max_layers": 3}, ["max_layers: unknown key: it belongs to 'space'"]),
        ({"task": "ja"}, ["task: unknown key: did you mean 'tasks'?"]),
        ({"target": 1}, ["target: unknown key: it belongs to 'stop'"]),
        ({"gpu_hours": 1}, ["gpu_hours: unknown key: it belongs to 'budget'"]),
        (ties(granularity=0), ["space.granularity: 0", "greater than or equal to 1"]),
        ({"tasks": [{"task": "ja_list_op"}]}, ["'ja_list_op'", "did you mean 'ja_list_ops'?"]),
        ({"tasks": [{"task": "zoo/a"}]}, ["task 'zoo/a' is neither a file nor a packaged task"]),
        ({"tasks": []}, ["tasks: 0 given: give at least 1"]),
        ({"tasks": ["sums"]}, ["tasks[0]: 'sums'", "give keys and their values"]),
        ({"tasks": [{"task": "sums", "weight": -1}]}, ["tasks[0].weight: -1", "equal to 0"]),
        ({"tasks": [{"task": "sums", "weight": 0}]}, ["tasks: every weight is 0", "give one"]),
        (
            {**ties(), "parents": {"a": PARENTS["a"]}},
            ["parents: 1 given: give at least 2, or a base"],
        ),
        ({"parents": {}, "base": {"model": "zoo/a"}}, ["parents: 0 given: give at least 1"]),
        ({"parents": {**PARENTS, "c": {}}}, ["parents.c: give one of 'model', 'search' and"]),
        (
            {"parents": {**PARENTS, "c": {"model": "zoo/a", "search": "x"}}},
            ["parents.c: give one of 'model', 'search' and 'series', and only one"],
        ),
        ({"parents": {"c": {"series": "zoo/x*"}}}, ["parents.c.series: 'zoo/x*' names 0 folders"]),
        ({"parents": {"c": {"series": "zoo/*"}}}, ["parents.c.series: ", "no number of its own"]),
        ({"base": {"series": "run/*"}}, ["base.series: a base is one model", "'search'"]),
        ({"parents": {**PARENTS, "base": {"model": "x"}}}, ["parents: 'base'", "choose another"]),
        ({"parents": {**PARENTS, "a b": {"model": "x"}}}, ["parents: 'a b'", "use letters"]),
        ({"parents": {**PARENTS, "c.1": "zoo/a"}}, ["parents.c.1: 'zoo/a'", "give keys and"]),
        (
            {"parents": {**PARENTS, "c": {"model": "./zoo/c"}}},
            ["parents.c.model: no folder", "/c'"],
        ),
        ({"base": {"model": "bse"}}, ["base.model: no folder", "give the folder of a saved"]),
        ({"base": {"model": "./zoo/bse"}}, ["base.model: no folder", "or a hub id ORG/NAME"]),
        ({"base": {"model": "zoo/base+lora"}}, ["base.model: no folder", "/lora'"]),
        ({"base": {"model": "zoo/base@main@1"}}, ["base.model: no folder", "@main@1'"]),
        ({"name": "a/b"}, ["name: 'a/b'", "use letters"]),
        ({"name": ""}, ["name: ''", "use letters"]),
        ({"name": "a\n"}, ["name: 'a '", "use letters"]),
        ({"name": "x" * 65}, ["name: 'xxx", "at most 64"]),
        ({"optimizer": {"population": 1}}, ["optimizer.population: 1: give at least 2, or auto"]),
        ({"optimizer": {"population": "all"}}, ["optimizer.population: 'all'", "or input", "auto"]),
        ({"optimizer": {"name": "cmaes"}}, ["optimizer.name: 'cmaes'", "'cma-es', 'lra-cma-es'"]),
        ({"optimizer": {"restarts": -1}}, ["optimizer.restarts: -1", "equal to 0"]),
        ({"budget": {"gpu_hours": 0}}, ["budget.gpu_hours: 0", "greater than 0"]),
        ({"stop": {"target": 1.5}}, ["stop.target: 1.5", "less than or equal to 1"]),
        ({"stop": {"target": 0}}, ["stop.target: 0", "greater than 0"]),
        ({"stop": {"stagnation": 0}}, ["stop.stagnation: 0", "equal to 1"]),
        ({"stop": {"overfitting": 0}}, ["stop.overfitting: 0", "equal to 1"]),
        ({"objectives": ["score", "length"]}, ["objectives: 'mean' has none", "set objective"]),
        (pareto(), ["objectives: []: pareto needs two or more", "[score, length]"]),
        (pareto("score"), ["objectives: ['score']: pareto needs two or more"]),
        (pareto("score", "score"), ["objectives: ['score', 'score']", "each named once"]),
        (pareto("score", "lenght"), ["objectives: 'lenght' is unknown", "mean 'length'?"]),
        (pareto("score", 3), ["objectives[1]: 3: give text"]),
        ({"constraints": [{"of": "a"}]}, ["constraints[0].task: required, and missing"]),
        (keeps(of="c"), ["constraints[0].of: model 'c' is unknown: known: a, b"]),
        (keeps(), ["constraints[0].of: model 'base' is unknown: known: a, b"]),
        (keeps(of="a", drop=1), ["constraints[0].drop: 1", "less than 1"]),
        (keeps(of="a", drp=0), ["constraints[0].drp: unknown key", "mean 'drop'?"]),
        ({"optimizer": {"sigma0": 2}}, ["optimizer.sigma0: 2", "less than or equal to 0.333"]),
        (stages([], []), ["staging.stages: 0 given: give at least 1"]),
        (stages([2, 4], []), ["staging.keep: 1 numbers go between the stages"]),
        (stages([4, 2], [1]), ["staging.stages: [4, 2] do not grow"]),
        (stages([4, 4], [1]), ["staging.stages: [4, 4] do not grow"]),
        (stages([0, 4], [1]), ["staging.stages: [0, 4] do not grow"]),
        (stages([2, 4, 8], [2, 3]), ["staging.keep: [2, 3] does not shrink"]),
        (stages([2, 4], [0]), ["staging.keep: [0] does not shrink"]),
        ({"staging": "aut"}, ["staging: 'aut': give keys and their values or", "'auto'"]),
        ({"staging": {"stages": 2, "keep": []}}, ["staging.stages: 2: give a list"]),
        ({"staging": {"stages": [2, 4]}}, ["staging.keep: required, and missing"]),
        ({"guard": {"validation_looks": 1}}, ["guard.validation_looks: 1", "equal to 2"]),
        ({"guard": {"alpha": 0}}, ["guard.alpha: 0", "greater than 0"]),
        ({"guard": {"monitor": 1}}, ["guard.monitor: 1", "less than 1"]),
        ({"shaping": float("inf")}, ["shaping: inf", "finite"]),
        ({"seed": -1}, ["seed: -1", "greater than or equal to 0"]),
        ({"engine": {"threads": 0}}, ["engine.threads: 0", "or equal to 1 or", "'auto'"]),
        ({"engine": {"dtype": "int8"}}, ["engine.dtype: 'int8'", "'bfloat16'"]),
        ({"objective": "best"}, ["objective: 'best'", "'mean'"]),
    ],
)
def test_wrong_input_is_refused_by_key_value_and_remedy(
    folder: Path, changes: dict[str, Any], words: list[str]
) -> None:
    message = refusal(write(folder, **changes))
    assert [word for word in words if word not in message] == []


def test_complaints_name_the_job_file(folder: Path) -> None:
    path = write(folder, seed=-1)
    assert refusal(path).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        (b"name: \xff", "cannot be read"),
        (b"name: [", "is not YAML"),
        (b"name: 2026-02-30", "is not YAML"),
        (b"", "holds no keys"),
        (b"- name", "holds no keys"),
    ],
)
def test_a_file_that_holds_no_job_is_refused(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(f"'{path}' {words}")


def test_reading_yaml_keeps_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("{b: 1, a: 2}")
    assert list(read_yaml(path)) == ["b", "a"]


def test_a_parent_beside_a_base_is_enough(folder: Path) -> None:
    changes = {**ties(), "parents": {"a": PARENTS["a"]}, "base": {"model": "zoo/base"}}
    job = Job.from_file(write(folder, **changes))
    assert list(job.parents) == ["a"]


def test_one_parent_is_enough_for_its_own_layers(folder: Path) -> None:
    assert list(Job.from_file(write(folder, parents={"a": PARENTS["a"]})).parents) == ["a"]


def test_a_finished_search_stands_for_its_winner(folder: Path) -> None:
    job = Job.from_file(write(folder, parents={**PARENTS, "c": {"search": "night"}}))
    assert job.parents["c"] == Parent(search="night")


def test_each_folder_of_a_series_is_a_parent_in_the_order_of_their_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (1000, 200, 30):
        (folder / "run" / f"checkpoint-{number}").mkdir(parents=True)
    (folder / "run" / "checkpoint-1.json").write_text("no folder")
    for pattern in ("run/checkpoint-*", str(folder / "run" / "*-*")):
        parents = {"x": {"model": "zoo/a"}, "run": {"series": pattern}}
        job = Job.from_file(write(folder, parents=parents))
        assert {name: parent.model for name, parent in job.parents.items()} == {
            "x": str(folder / "zoo" / "a"),
            **{f"run-{n}": str(folder / "run" / f"checkpoint-{n}") for n in (30, 200, 1000)},
        }
    monkeypatch.setenv("HOME", str(folder))
    home = Job.from_file(write(folder, parents={"run": {"series": "~/run/checkpoint-*"}}))
    assert list(home.parents) == ["run-30", "run-200", "run-1000"]
    constrained = keeps(of="run-200")
    alone = {"run": {"series": "run/*-*"}}
    assert Job.from_file(write(folder, parents=alone, **constrained)).constraints[0].of == "run-200"
    assert "model 'run-20' is unknown" in refusal(
        write(folder, parents=alone, **keeps(of="run-20"))
    )
    clash = {"run-30": {"model": "zoo/a"}, **alone}
    assert "'run-30' is another parent's name too" in refusal(write(folder, parents=clash))


def test_several_objectives_and_constraints_are_read(folder: Path) -> None:
    asked = pareto("score", "task:sums", "length", "layers", "parameters", "latency")
    job = Job.from_file(write(folder, base={"model": "zoo/base"}, **asked, **keeps()))
    assert job.objectives == tuple(asked["objectives"])
    assert (job.constraints[0].of, job.constraints[0].drop) == ("base", 0.0)


def test_staging_may_be_left_to_the_measured_costs(folder: Path) -> None:
    assert Job.from_file(write(folder, staging="auto")).staging == "auto"


def test_a_space_inside_another_has_a_preset_of_its_own(folder: Path) -> None:
    halves = {
        "weight": {"preset": "per_layer_ties", "granularity": 3},
        "layers": {"preset": "layer_stack", "max_layers": 5},
    }
    space = Job.from_file(write(folder, space={"kind": "both", **halves})).space
    assert isinstance(space, BothSpace)
    assert (space.weight.method, space.weight.granularity) == ("ties", 3)
    assert (space.layers.repeats, space.layers.max_layers) == (1, 5)


SCHEMA = jsonschema.Draft202012Validator(Job.model_json_schema())


@pytest.mark.parametrize(
    ("space", "accepted"),
    [
        ({"preset": "per_layer_ties"}, True),
        ({"preset": "both_weights_and_order", "weight": {"granularity": 2}}, True),
        ({**TIES, "lambda": 0.5}, True),
        ({"kind": "layers", "scale": [0.5, 1.5]}, True),
        ({"kind": "layers", "density": 0.5}, False),
        ({"kind": "layer"}, False),
        ({**TIES, "lambda_": 0.5}, False),
    ],
)
def test_the_schema_knows_each_kind_of_space(space: dict[str, Any], accepted: bool) -> None:
    assert SCHEMA.is_valid({**MINIMAL, "space": space}) == accepted


numbers = st.floats(-1e6, 1e6)
texts = st.text(st.characters(codec="utf-8"), max_size=20)
ranges = st.builds(
    lambda low, width, more: {"low": low, "high": low + width, **more},
    st.floats(0.001, 10),
    st.floats(0.001, 10),
    st.fixed_dictionaries(
        {},
        optional={
            "start": st.sampled_from(["equal", None]),
            "scale": st.sampled_from(["linear", "log"]),
            "first": numbers,
        },
    ),
)
searched = ("weight", "density", "gamma", "lambda", "t", "scale")
coefficients = st.fixed_dictionaries({}, optional=dict.fromkeys(searched, ranges | numbers))
weights = st.builds(
    lambda coefficients, more: {"kind": "weight", **more, **coefficients},
    coefficients,
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(["ties", "slerp", ["linear", "della"]]),
            "per": st.sampled_from(["model", "layer", "module", "slice"]),
        },
        optional={
            "granularity": st.integers(1, 100),
            "filters": st.lists(texts, max_size=3),
            "part": texts,
            "normalize": st.booleans(),
        },
    ),
)
limits = {"max_layers": st.integers(1, 99), "max_parameters": st.integers(1, 10**12)}
layers = st.sampled_from(
    [
        {"form": "segments", "segments": 6},
        {"form": "depth_wise", "removable": True},
        {"form": "upscale"},
        {"repeats": 2, "start": "all", "scales": "network", "scale": [0.5, 1.5]},
        {"scales": "matrix"},
        {},
    ]
).flatmap(
    lambda form: st.fixed_dictionaries({"kind": st.just("layers")}, optional=limits).map(
        lambda more: {**form, **more}
    )
)
jobs = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
        "parents": st.just(PARENTS)
        | st.just({"x": {"search": "y"}, "z": {"model": "z"}})
        | st.just({"run": {"series": "run/*"}}),
        "space": weights
        | layers
        | st.builds(lambda w, n: {"kind": "both", "weight": w, "layers": n}, weights, layers)
        | st.builds(
            lambda per: {"kind": "series", "per": per}, st.sampled_from(["model", "layer"])
        ),
        "tasks": st.lists(
            st.fixed_dictionaries({"task": texts, "weight": st.floats(0.1, 1e9)}), min_size=1
        ),
        "budget": st.fixed_dictionaries(
            {"candidates": st.integers(1, 10**9)}, optional={"gpu_hours": st.floats(0.1, 1e9)}
        ),
    },
    optional={
        "seed": st.integers(0, 2**64),
        "base": st.just({"model": "org/name@main"}),
        "shaping": st.floats(0, 1e9),
        "stop": st.fixed_dictionaries(
            {}, optional={"target": st.floats(0.01, 1), "stagnation": st.integers(1, 99)}
        ),
        "staging": st.sampled_from(["auto", None, {"stages": [2, 4], "keep": [3]}]),
        "optimizer": st.fixed_dictionaries(
            {}, optional={"population": st.just("auto") | st.integers(2, 99)}
        ),
        "store": texts,
    },
)


@given(data=jobs, aim=st.sampled_from([{}, pareto("score", "task:x"), {"objective": "worst"}]))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_job_that_is_written_out_is_read_back_equal(
    data: dict[str, Any], aim: dict[str, Any]
) -> None:
    job = Job.from_dict({**data, **aim}, "job")
    written = json.loads(json.dumps(job.model_dump(mode="json", exclude_none=True, by_alias=True)))
    assert Job.from_dict(written, "store") == job
    assert Job.from_dict(yaml.safe_load(yaml.safe_dump(written)), "store") == job


def test_bounds_may_be_negative_and_start_on_an_edge() -> None:
    assert Range(low=-2, high=-1, start=-1).start == -1


def test_a_linked_job_looks_beside_the_file_that_it_links_to(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "job.yaml"
    os.symlink(write(folder), link)
    assert Job.from_file(link).parents["a"].model == str(folder / "zoo" / "a")
