"""Suites: a job that names one is the job that names its tasks."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import JobError
from evomerge.job import Job, find_task, packaged

PLAIN: dict[str, Any] = {
    "name": "night",
    "parents": {"a": {"model": "org/a"}, "b": {"model": "org/b"}},
    "space": {"kind": "layers"},
    "budget": {"candidates": 10},
}
LENGTH = {"objective": "pareto", "objectives": ["score", "length"]}


def write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three tasks, and a suite of two of them, one of which lies in the suite's own folder."""
    for name in ("sums", "verses", "both/names"):
        write(tmp_path / name / "task.yaml", {"name": name})
    suite = {"name": "both", "tasks": [{"task": "names", "weight": 3}, {"task": "../sums"}]}
    write(tmp_path / "both" / "suite.yaml", suite)
    return tmp_path


def job(folder: Path, *tasks: dict[str, Any], **keys: Any) -> Job:
    write(folder / "job.yaml", {**PLAIN, "tasks": list(tasks), **keys})
    return Job.from_file(folder / "job.yaml")


def suite(folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    write(folder / name / "suite.yaml", {"name": name, "tasks": [{"task": "../sums"}], **keys})
    return {"task": name}


def refusal(folder: Path, *tasks: dict[str, Any], **keys: Any) -> str:
    with pytest.raises(JobError) as caught:
        job(folder, *tasks, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_suite_stands_for_its_tasks_and_a_weight_multiplies_theirs(folder: Path) -> None:
    found = job(folder, {"task": "both", "weight": 0.5}, {"task": "verses"})
    assert [(Path(entry.task).parent.name, entry.weight) for entry in found.tasks] == [
        ("names", 1.5),
        ("sums", 0.5),
        ("verses", 1.0),
    ]


def test_the_tasks_of_a_suite_are_looked_up_from_its_own_folder_first(folder: Path) -> None:
    write(folder / "names" / "task.yaml", {"name": "another"})
    assert job(folder, {"task": "both"}).tasks[0].task == str(folder / "both/names/task.yaml")


def test_whether_a_suite_is_asked_as_a_conversation_may_be_said_for_all_of_it(
    folder: Path,
) -> None:
    named = suite(folder, "talk", tasks=[{"task": "../sums", "chat": True}, {"task": "../verses"}])
    assert [entry.chat for entry in job(folder, named).tasks] == [True, None]
    assert [entry.chat for entry in job(folder, {**named, "chat": False}).tasks] == [False] * 2


def test_a_job_aims_at_what_its_suite_says(folder: Path) -> None:
    kept = {"task": "sums", "of": "a", "drop": 0.1}
    found = job(folder, suite(folder, "short", **LENGTH, constraints=[kept]))
    assert (found.objective, found.objectives) == ("pareto", ("score", "length"))
    assert [one.model_dump() for one in found.constraints] == [kept]


def test_what_a_job_says_itself_comes_before_its_suite(folder: Path) -> None:
    named = suite(folder, "short", **LENGTH, constraints=[{"task": "sums", "of": "a"}])
    found = job(folder, named, objective="worst", constraints=[])
    assert (found.objective, found.objectives, found.constraints) == ("worst", (), ())
    found = job(folder, named, objective="pareto", objectives=["score", "layers"])
    assert found.objectives == ("score", "layers")


def test_an_override_counts_as_what_the_job_says(folder: Path) -> None:
    write(folder / "job.yaml", {**PLAIN, "tasks": [suite(folder, "short", **LENGTH)]})
    assert Job.from_file(folder / "job.yaml", ["objective=mean"]).objective == "mean"


def test_two_suites_that_disagree_are_refused_unless_the_job_decides(folder: Path) -> None:
    first, second = suite(folder, "short", **LENGTH), suite(folder, "fair", objective="worst")
    said = refusal(folder, first, second)
    assert "suites disagree on the objective (short: pareto, fair: worst)" in said
    assert job(folder, first, second, objective="mean").objective == "mean"
    assert job(folder, {"task": "both"}, second).objective == "worst"


def test_a_suite_has_no_metric_of_its_own(folder: Path) -> None:
    assert "it is a suite: leave the metric out" in refusal(folder, {"task": "both", "metric": "x"})


def test_a_suite_in_a_suite_is_refused(folder: Path) -> None:
    said = refusal(folder, suite(folder, "all", tasks=[{"task": "../both"}]))
    assert "'../both' is a suite, which only a job may name" in said


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"tasks": []}, "tasks"),
        ({"objective": "median"}, "objective"),
        ({"objectives": ["score", "length"]}, "set objective: pareto"),
        ({"weights": [1]}, "weights: unknown key"),
        ({"tasks": [{"task": "summs"}]}, "task 'summs' is neither a file nor a packaged task"),
        ({"constraints": [{"task": "sums", "of": "c"}]}, "model 'c' is unknown"),
    ],
)
def test_a_wrong_suite_is_refused_with_its_key(folder: Path, keys: Any, words: str) -> None:
    assert words in refusal(folder, suite(folder, "wrong", **keys))


def test_the_job_that_is_kept_needs_the_suite_no_more(folder: Path) -> None:
    found = job(folder, suite(folder, "short", **LENGTH))
    (folder / "short" / "suite.yaml").unlink()
    assert Job.from_dict(found.model_dump(mode="json"), "kept") == found


def test_a_suite_is_no_task(folder: Path) -> None:
    with pytest.raises(JobError, match="'both' is a suite"):
        find_task("both", folder)


def test_an_unknown_name_is_told_the_nearest_task_or_suite(folder: Path) -> None:
    assert "mergebench" in refusal(folder, {"task": "mergebenhc"})


def test_a_task_of_lm_eval_is_left_as_it_is(folder: Path) -> None:
    assert job(folder, {"task": "lm-eval:gsm8k"}).tasks[0].task == "lm-eval:gsm8k"
    assert str(find_task("lm-eval:gsm8k", folder)) == "lm-eval:gsm8k"


def test_every_packaged_suite_makes_a_job(folder: Path) -> None:
    names = [path.parent.name for path in packaged("fitness").glob("*/suite.yaml")]
    assert sorted(names) == ["long_to_short", "mergebench", "sakana_ja_math", "wise_ft"]
    for name in names:
        assert job(folder, {"task": name}).tasks
