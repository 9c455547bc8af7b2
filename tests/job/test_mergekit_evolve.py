"""Files of mergekit-evolve: what each key becomes, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import JobError
from evomerge.job import Job, WeightSpace
from evomerge.job.mergekit_evolve import Translated, translated

GENOME: dict[str, Any] = {
    "models": ["zoo/ops", "zoo/ja"],
    "merge_method": "ties",
    "base_model": "zoo/base",
    "layer_granularity": 2,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Holds three folders of models, a task of evomerge's and one of lm-eval's."""
    for name in ("ops", "ja", "base"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums" / "task.yaml").write_text("name: sums")
    (tmp_path / "times.yaml").write_text("# by hand\ntask: 'times'  # tables\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return tmp_path


def write(folder: Path, genome: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A file with these keys of `genome` and of the top level replaced; None leaves one out."""
    data = {"genome": {**GENOME, **(genome or {})}, "tasks": ["sums"], **changes}
    data["genome"] = {key: value for key, value in data["genome"].items() if value is not None}
    path = folder / "evolve my models.yml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def read(folder: Path, genome: dict[str, Any] | None = None, **changes: Any) -> Translated:
    path = write(folder, genome, **changes)
    return translated(yaml.safe_load(path.read_text()), path, ())


def space_of(folder: Path, **genome: Any) -> WeightSpace:
    space = Job.from_file(write(folder, genome)).space
    assert isinstance(space, WeightSpace)
    return space


def note(found: Translated, key: str) -> str:
    """The only line about a key."""
    (line,) = [text for text in found.notes if text.startswith(f"{key}: ")]
    return line


def test_a_file_becomes_a_job_with_absolute_paths(folder: Path) -> None:
    told: list[str] = []
    job = Job.from_file(write(folder, limit=25), tell=told.append)
    assert job.name == "evolve-my-models"
    assert {name: p.model for name, p in job.parents.items()} == {
        "ops": str(folder / "zoo" / "ops"),
        "ja": str(folder / "zoo" / "ja"),
    }
    assert job.base is not None
    assert job.base.model == str(folder / "zoo" / "base")
    assert [(t.task, t.weight) for t in job.tasks] == [(str(folder / "sums" / "task.yaml"), 1.0)]
    assert job.optimizer.name == "cma-es"
    assert job.budget.candidates == 100
    assert job.staging is not None
    assert job.staging != "auto"
    assert (job.staging.stages, job.staging.keep) == ((25,), ())
    assert len(told) > 5


def test_overrides_are_of_the_job(folder: Path) -> None:
    job = Job.from_file(write(folder), ["budget.candidates=7", "name=other", "space.weight=[0, 1]"])
    assert (job.budget.candidates, job.name) == (7, "other")


@pytest.mark.parametrize(
    ("method", "normalize"),
    [("linear", True), ("ties", True), ("dare_ties", True), ("task_arithmetic", False)],
)
def test_each_method_has_its_parameters_and_normalizes_as_there(
    folder: Path, method: str, normalize: bool
) -> None:
    space = space_of(folder, merge_method=method)
    assert (space.methods, space.normalize) == ((method,), normalize)
    assert (space.density is not None) == (method in ("ties", "dare_ties"))
    assert space.t is None
    assert space_of(folder, merge_method=method, normalize=not normalize).normalize != normalize


def test_weights_begin_equal_densities_at_one(folder: Path) -> None:
    space = space_of(folder)
    assert (space.weight.low, space.weight.high, space.weight.start) == (0, 2, 1 / 2)
    assert (space.density.high, space.density.start) == (1, 1)
    assert 0 < space.density.low < 0.1


@pytest.mark.parametrize(("signed", "low", "sigma"), [(False, 0, 1 / 12), (True, -2, 1 / 24)])
def test_negative_weights_are_signed_and_the_first_step_is_as_long(
    folder: Path, signed: bool, low: float, sigma: float
) -> None:
    job = Job.from_file(write(folder, {"allow_negative_weights": signed}))
    assert isinstance(job.space, WeightSpace)
    assert job.space.weight.low == low
    assert job.optimizer.sigma0 == pytest.approx(sigma)


def test_slerp_searches_t_between_two_models(folder: Path) -> None:
    changes = {"merge_method": "slerp", "base_model": "zoo/ops"}
    job = Job.from_file(write(folder, changes))
    assert isinstance(job.space, WeightSpace)
    assert (job.space.t.low, job.space.t.start, job.space.t.high) == (0, 0.5, 1)
    assert (job.space.weight, job.space.normalize, job.base) == (None, None, None)
    assert list(job.parents) == ["ops", "ja"]


@pytest.mark.parametrize(
    ("granularity", "per", "layers"), [(0, "model", 1), (None, "model", 1), (3, "slice", 3)]
)
def test_layer_granularity_is_that_of_slices_or_of_the_model(
    folder: Path, granularity: int | None, per: str, layers: int
) -> None:
    space = space_of(folder, layer_granularity=granularity, filters=["mlp", "attn"])
    assert (space.per, space.granularity, space.filters) == (per, layers, ("mlp", "attn"))


def test_a_base_among_the_models_is_no_parent_of_task_vectors(folder: Path) -> None:
    found = read(folder, {"models": ["zoo/base", "zoo/ops", "zoo/ja"]})
    assert list(found.job["parents"]) == ["ops", "ja"]
    assert found.job["space"]["weight"]["start"] == 1 / 3
    assert found.job["base"] == {"model": str(folder / "zoo" / "base")}
    assert "no parent" in note(found, "genome.base_model")


def test_a_base_among_the_models_of_a_linear_merge_is_the_first_parent(folder: Path) -> None:
    changes = {"models": ["zoo/ops", "zoo/base"], "merge_method": "linear"}
    job = Job.from_file(write(folder, changes))
    assert list(job.parents) == ["base-2", "ops"]
    assert job.base is None


def test_parents_have_names_of_their_own(folder: Path) -> None:
    models = ["org/ops@main", "zoo/ops", "other/ops", "x/mean", "zoo/ja/"]
    names = list(read(folder, {"models": models}).job["parents"])
    assert names == ["ops-main", "ops", "ops-2", "mean-2", "ja"]
    assert Job.from_file(write(folder, {"models": models})).parents["mean-2"].model == "x/mean"


def test_models_written_as_mappings_are_understood(folder: Path) -> None:
    model = {"model": {"path": "org/ops", "revision": "v1"}}
    job = Job.from_file(write(folder, {"models": [model, "zoo/ja"]}))
    assert [parent.model for parent in job.parents.values()] == [
        "org/ops@v1",
        str(folder / "zoo" / "ja"),
    ]


def test_models_are_folders_of_the_working_directory_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "work" / "zoo" / "ops").mkdir(parents=True)
    monkeypatch.chdir(folder / "work")
    parents = read(folder).job["parents"]
    assert parents["ops"]["model"] == str(folder / "work" / "zoo" / "ops")
    assert parents["ja"]["model"] == str(folder / "zoo" / "ja")


def test_every_key_of_a_file_is_accounted_for(folder: Path) -> None:
    genome = {
        **GENOME,
        "tokenizer_source": "base",
        "normalize": True,
        "allow_negative_weights": True,
        "filters": ["mlp"],
        "smooth": False,
    }
    changes = {
        "limit": 10,
        "num_fewshot": 0,
        "shuffle": True,
        "random_init": True,
        "apply_chat_template": False,
        "fewshot_as_multiturn": False,
    }
    found = read(folder, genome, tasks=[{"name": "sums", "weight": 2, "metric": "acc"}], **changes)
    for key in (*(f"genome.{key}" for key in genome), "tasks[0]", *changes):
        assert note(found, key)
    assert all("\n" not in line for line in found.notes)


@pytest.mark.parametrize(("changes", "chat"), [({}, True), ({"apply_chat_template": False}, False)])
def test_tasks_are_conversations_where_the_chat_template_is_applied_as_it_is_by_default(
    folder: Path, changes: dict[str, Any], chat: bool
) -> None:
    found = read(folder, **changes)
    assert [task["chat"] for task in found.job["tasks"]] == [chat]
    assert str(chat).lower() in note(found, "apply_chat_template")


def test_a_task_of_lm_eval_is_found_beside_the_file_and_in_folders_given(folder: Path) -> None:
    job = Job.from_file(write(folder, tasks=["times"]))
    assert job.tasks[0].task == str(folder / "times.yaml")
    deep = folder / "tasks" / "deep"
    deep.mkdir(parents=True)
    (folder / "times.yaml").rename(deep / "another name.yaml")
    job = Job.from_file(write(folder, tasks=["times"]), task_folders=[folder / "tasks"])
    assert job.tasks[0].task == str(deep / "another name.yaml")


def test_a_file_of_lm_eval_may_be_named_by_its_path(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "times.yaml").rename(folder / "more" / "times.yaml")
    found = read(folder, tasks=[{"name": "more/times.yaml", "metric": "acc_norm"}])
    assert found.job["tasks"][0]["task"] == str(folder / "more" / "times.yaml")
    assert found.job["tasks"][0]["metric"] == "acc_norm"


def test_a_task_that_is_nowhere_is_one_that_comes_with_lm_eval(folder: Path) -> None:
    tasks = ["arc_easy", {"name": "lm-eval:sums", "metric": "exact_match,strict-match"}]
    job = Job.from_file(write(folder, tasks=tasks))
    assert [task.task for task in job.tasks] == ["lm-eval:arc_easy", "lm-eval:sums"]
    assert [task.metric for task in job.tasks] == [None, "exact_match,strict-match"]


def test_a_metric_is_passed_on_to_lm_eval_and_not_to_a_task_of_evomerge(folder: Path) -> None:
    tasks = [{"name": "times", "metric": "acc_norm,none"}, {"name": "sums", "metric": "acc,none"}]
    found = read(folder, tasks=tasks)
    assert [task.get("metric") for task in found.job["tasks"]] == ["acc_norm,none", None]
    assert "acc_norm,none is the score" in note(found, "tasks[0]")
    assert "its own score takes the place of any metric" in note(found, "tasks[1]")


def test_folders_of_tasks_are_for_no_ordinary_job(folder: Path) -> None:
    (folder / "job.yaml").write_text("name: x")
    with pytest.raises(JobError, match=r"--task-search-path: .* is no file of mergekit-evolve"):
        Job.from_file(folder / "job.yaml", task_folders=[folder])


@pytest.mark.parametrize(
    ("genome", "changes", "message"),
    [
        ({"merge_methd": "ties"}, {}, "genome.merge_methd: unknown key: did you mean"),
        ({}, {"limt": 3}, "limt: unknown key: did you mean 'limit'?"),
        ({"merge_method": "della"}, {}, "genome.merge_method: 'della'"),
        ({"models": ["zoo/ops"]}, {}, "genome.models: 1 given: give at least 2"),
        ({"models": ["zoo/ops", "zoo/ops"]}, {}, "name each model once"),
        ({"models": [3, "zoo/ops"]}, {}, "3 names no model"),
        ({"base_model": None}, {}, "base_model: 'ties' needs one"),
        ({"smooth": True}, {}, "smooth: coefficients that run evenly"),
        (
            {"merge_method": "slerp", "models": ["a/a", "b/b", "c/c"]},
            {},
            "models: 3 for slerp",
        ),
        ({"merge_method": "slerp"}, {}, "slerp merges two models and no third"),
        (
            {"merge_method": "slerp", "base_model": None, "filters": ["mlp"]},
            {},
            "filters: slerp has none",
        ),
        ({}, {"num_fewshot": 5}, "num_fewshot: 5: a task has the worked examples that its own"),
        ({}, {"tasks": []}, "tasks: 0 given"),
        ({}, {"tasks": [{"name": "sums", "metric": "f1,none"}]}, "which 'f1,none' cannot score"),
        ({}, {"tasks": ["tims.yaml"]}, "task 'tims.yaml': there is no such file in"),
        ({}, {"limit": 0}, "limit: 0"),
    ],
)
def test_what_no_job_can_say_is_refused_in_one_line(
    folder: Path, genome: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    path = folder / "evolve.yml"
    changed = {key: value for key, value in {**GENOME, **genome}.items() if value is not None}
    path.write_text(yaml.safe_dump({"genome": changed, "tasks": ["sums"], **changes}))
    with pytest.raises(JobError) as caught:
        Job.from_file(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
