"""What a live model is asked for lm-eval's tasks, and what becomes of its replies."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.engine import Engine
from evomerge.engine.build import build
from evomerge.errors import TaskError
from evomerge.fitness.example import Verdict
from evomerge.fitness.task import Task
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from tests import tiny
from tests.fitness.harness.lists import CHOICE, CONTEXT, GENERATED, WORD, write

OPS = str(tiny.ZOO / "ops-early")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A parent that knows half of its operations, live."""
    section = EngineSection(device="cpu", threads=1)
    live = build(section, {OPS: Checkpoint.open(tiny.ZOO / "ops-early")}, OPS)
    live.load(Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": OPS}]}))
    yield live
    live.close()


def judged(engine: Engine, path: Path, metric: str | None = None) -> list[Verdict]:
    task = Task.open(path, metric=metric)
    return task.scorer.judge(engine, task.examples("validation"), shaped=True)


def test_a_reply_is_kept_and_scored_as_in_a_task_of_evomerge(
    engine: Engine, tmp_path: Path
) -> None:
    found = judged(engine, write(tmp_path, "lists", **GENERATED))
    own = Task.open(tiny.ROOT / "fitness" / "en_list_ops" / "task.yaml")
    due = own.scorer.judge(engine, own.examples("validation")[:16], shaped=True)
    assert [verdict.score for verdict in found] == [verdict.score for verdict in due]
    assert 0 < sum(verdict.score for verdict in found) < 16
    assert all(verdict.replies[0].count(" ") == verdict.tokens - 1 for verdict in found)
    assert not any(verdict.truncated or verdict.failure for verdict in found)


@pytest.mark.parametrize("keys", [GENERATED, CHOICE, WORD, CONTEXT])
def test_shaping_is_less_where_the_reference_answer_is_less_likely(
    engine: Engine, tmp_path: Path, keys: dict[str, Any]
) -> None:
    found = judged(engine, write(tmp_path, "lists", **keys), None)
    assert all(-3 <= verdict.shaping <= 0 for verdict in found)
    assert len({verdict.shaping for verdict in found}) > 8
    task = Task.open(write(tmp_path, "lists", **keys))
    items = task.examples("validation")
    unshaped = task.scorer.judge(engine, items, shaped=False)
    assert [verdict.score for verdict in unshaped] == [verdict.score for verdict in found]
    assert not any(verdict.shaping for verdict in unshaped)


def test_the_chosen_filter_prepares_the_reply(engine: Engine, tmp_path: Path) -> None:
    first = [{"function": "regex", "regex_pattern": "(\\d)"}, {"function": "take_first"}]
    chains = [
        {"name": "whole", "filter": [{"function": "take_first"}]},
        {"name": "digit", "filter": first},
    ]
    keys = {**GENERATED, "filter_list": chains, "doc_to_target": "{{ answer[0] }}"}
    path = write(tmp_path, "lists", **keys)
    assert sum(verdict.score for verdict in judged(engine, path)) == 0
    digits = judged(engine, path, "exact_match,digit")
    prompts = Task.open(path).examples("validation")
    for verdict, item in zip(digits, prompts, strict=True):
        assert verdict.score == float(verdict.replies[0].strip()[0] == item.target)
    assert sum(verdict.score for verdict in digits) > 8


def test_an_example_that_a_filter_fails_on_fails_alone(engine: Engine, tmp_path: Path) -> None:
    second = {"function": "regex", "regex_pattern": "([0-4])", "group_select": 1}
    chains = [{"name": "second", "filter": [second, {"function": "take_first"}]}]
    path = write(tmp_path, "lists", filter_list=chains, **GENERATED)
    found = judged(engine, path)
    lone = [len(re.findall("[0-4]", verdict.replies[0])) == 1 for verdict in found]
    assert 0 < sum(lone) < len(found)
    assert [bool(verdict.failure) for verdict in found] == lone
    assert {verdict.failure for verdict in found if verdict.failure} == {
        "IndexError: list index out of range"
    }


def test_a_metric_that_leaves_the_scale_of_scores_is_refused(
    engine: Engine, tmp_path: Path
) -> None:
    keys = {**CHOICE, "metric_list": [{"metric": "likelihood"}]}
    with pytest.raises(TaskError, match=r"task 'lists': likelihood is .*only metrics between 0"):
        judged(engine, write(tmp_path, "lists", **keys))


def test_repeats_are_drawn_and_all_of_them_reach_the_filter(engine: Engine, tmp_path: Path) -> None:
    drawn = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5}
    vote = [{"function": "majority_vote"}, {"function": "take_first"}]
    keys = {
        **GENERATED,
        "generation_kwargs": drawn,
        "repeats": 5,
        "filter_list": [{"name": "vote", "filter": vote}],
    }
    found = judged(engine, write(tmp_path, "lists", **keys))
    assert {len(verdict.replies) for verdict in found} == {5}
    assert any(len(set(verdict.replies)) > 1 for verdict in found)
    items = Task.open(write(tmp_path, "lists", **keys)).examples("validation")
    for verdict, item in zip(found, items, strict=True):
        count = {reply: verdict.replies.count(reply) for reply in verdict.replies}
        if list(count.values()).count(max(count.values())) == 1:
            assert verdict.score == float(max(count, key=lambda r: count[r]) == item.target)


@pytest.mark.parametrize("keys", [GENERATED, CHOICE])
def test_an_item_beyond_the_context_is_counted_not_cut(
    engine: Engine, tmp_path: Path, keys: dict[str, Any]
) -> None:
    long = {**keys, "doc_to_text": "{{ prompt * 40 }}"}
    found = judged(engine, write(tmp_path, "lists", n=4, **long))
    assert all(verdict.overlong and verdict.score == 0 for verdict in found)
    assert {verdict.shaping for verdict in found} == {-3.0}
    assert not any(verdict.failure for verdict in found)
