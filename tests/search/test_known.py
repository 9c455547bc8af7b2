"""Baselines that an earlier search of the same store has scored are not scored again."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.devices import Device
from evomerge.errors import SearchFailed
from evomerge.executor import Executor, Landed, Take
from evomerge.job import Job
from evomerge.search import Silent
from evomerge.search.loop import Run
from evomerge.search.setting import Setting, versions
from evomerge.store import Coordinator, Store
from tests import tiny
from tests.guard.test_contamination import sentence
from tests.running import url


class Counting:
    """An executor that says what it was asked for; the engine is the real one."""

    def __init__(self, inner: Executor) -> None:
        self._inner, self.asked = inner, 0

    def evaluate(self, take: Take) -> Iterator[Landed]:
        for landed in self._inner.evaluate(take):
            self.asked += 1
            yield landed

    def devices(self) -> tuple[Device, ...]:
        return self._inner.devices()

    def close(self) -> None:
        self._inner.close()


def baselines(
    folder: Path, name: str, then: dict[str, str] | None = None, **keys: Any
) -> tuple[int, dict[str, list[float]]]:
    """How many baselines a new search in the folder's store had to score, and what was found.

    then: versions at launch that differ from today's.
    """
    setting = Setting.open(Job.from_file(tiny.write_job(folder, name=name, **keys)))
    executor = Counting(setting.executor())
    store = Store(url(folder / "store.db"), create=True)
    held = Coordinator.launch(
        store,
        name,
        0,
        setting.document(),
        {**versions(), **(then or {})},
        setting.new_models(),
        setting.new_splits(),
    )
    with store, held as coordinator:
        run = Run(setting, coordinator, executor, Silent(), lambda: False)
        run.score_baselines()
        found = {
            member.name: run.evaluate([member], "full", setting.train)[member.id]
            for member in run.record.members[0]
        }
    executor.close()
    return executor.asked, {
        label: [float(v) for scores in of.tasks.values() for v in (*scores.scores, *scores.shaping)]
        for label, of in found.items()
    }


def test_the_same_baselines_are_scored_once_in_a_store(tmp_path: Path) -> None:
    asked, first = baselines(tmp_path, "one", seed=1)
    assert asked == len(first) > 2
    again, second = baselines(tmp_path, "two", seed=2)
    assert (again, second) == (0, first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "difference",
    [
        {"engine": {"device": "cpu", "threads": 1, "batch_size": 3}},
        {"shaping": 0.0},
        {"then": {"torch": "1.0"}},
    ],
    ids=["engine", "shaping", "versions"],
)
def test_what_may_come_out_otherwise_is_scored_again(
    tmp_path: Path, difference: dict[str, Any]
) -> None:
    _, first = baselines(tmp_path, "one", **difference)
    asked, _ = baselines(tmp_path, "two")
    assert asked == len(first)


@pytest.mark.slow
def test_other_train_examples_are_scored(tmp_path: Path) -> None:
    _, first = baselines(tmp_path, "one")
    train = tmp_path / "task" / "data" / "train.jsonl"
    lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
    train.write_text("".join(lines[1:]), encoding="utf-8")
    asked, _ = baselines(tmp_path, "two")
    assert asked == len(first)


@pytest.mark.slow
def test_where_an_item_of_train_is_left_out_baselines_are_scored_again(tmp_path: Path) -> None:
    data = tiny.write_task(tmp_path / "task").parent / "data"
    item = {"prompt": f"{sentence(1, 14)} =", "answer": "1"}
    with (data / "train.jsonl").open("a") as file:
        file.write(json.dumps(item) + "\n")
    _, first = baselines(tmp_path, "one")
    with (data / "test.jsonl").open("a") as file:
        file.write(json.dumps({**item, "prompt": f"{sentence(1, 14)} now ="}) + "\n")
    again, second = baselines(tmp_path, "two")
    assert again == len(first)
    assert [len(values) for values in second.values()] == [48] * again


@pytest.mark.slow
def test_what_another_model_gives_the_tokenizer_for_is_scored_again(tmp_path: Path) -> None:
    baselines(tmp_path, "one")
    base, ops, ja = ({"model": str(tiny.ZOO / name)} for name in ("base", "ops", "ja"))
    asked, same_models = baselines(tmp_path, "two", base=ja, parents={"ops": ops, "old": base})
    assert asked == len(same_models)


def test_a_task_of_which_nothing_can_be_asked_ends_the_search(tmp_path: Path) -> None:
    engine = {"device": "cpu", "threads": 1, "context": 4}
    with pytest.raises(SearchFailed, match=r"'ja_list_ops' can tell nothing apart: 24 of 24"):
        baselines(tmp_path, "one", engine=engine)
