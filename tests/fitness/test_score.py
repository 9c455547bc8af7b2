"""Scoring: a live model's replies and likelihoods turned into scores of chosen examples."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from evomerge.engine import Engine
from evomerge.engine.build import build
from evomerge.fitness.evaluate import evaluate_model
from evomerge.fitness.score import score
from evomerge.fitness.scorers import shape
from evomerge.fitness.task import Task
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from tests import tiny

OPS = str(tiny.ZOO / "ops")
SECTION = EngineSection(device="cpu", threads=1)
ALL = np.arange(24, dtype=np.uint32)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The zoo's operations parent, live."""
    live = build(SECTION, {OPS: Checkpoint.open(tiny.ZOO / "ops")}, OPS)
    yield live
    live.close()


def scale(engine: Engine, factor: float) -> None:
    """Load the parent with its last norm scaled: 1 is the parent itself."""
    parameters = {"scale": [{"filter": "model.norm", "value": factor}, {"value": 1.0}]}
    models = [{"model": OPS, "parameters": parameters}]
    engine.load(Recipe.from_dict({"merge_method": "passthrough", "models": models}))


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """What the parent can do, in part; scored by one teacher-forced forward."""
    folder = tmp_path_factory.mktemp("forced")
    return Task.open(tiny.write_task(folder, source="en_list_ops"))


@pytest.fixture(scope="module")
def generated(forced: Task) -> Task:
    """The same, scored by generating."""
    path = forced.path.with_name("generated.yaml")
    path.write_text(forced.path.read_text().replace("teacher_forced: true", ""))
    return Task.open(path)


def test_teacher_forcing_scores_as_generating_does(
    engine: Engine, forced: Task, generated: Task
) -> None:
    scale(engine, 1.0)
    one = score(engine, forced, forced.examples("train"), ALL, shaped=False)
    other = score(engine, generated, generated.examples("train"), ALL, shaped=False)
    assert (forced.scorer.generates, generated.scorer.generates) == (False, True)
    assert one.scores.tolist() == other.scores.tolist()
    assert one.mean > 0, "the parent can do nothing: this test shows nothing"
    assert not one.tokens.any()
    assert other.tokens.all()


def test_the_shaping_is_the_mean_log_likelihood_of_a_token(engine: Engine, generated: Task) -> None:
    scale(engine, 1.0)
    items = generated.examples("train")
    found = score(engine, generated, items, ALL, shaped=True)
    likelihoods = engine.likelihoods([(item.prompt, item.target) for item in items])
    expected = [np.mean(np.maximum(x.token_log_likelihoods, -3.0)) for x in likelihoods]
    assert found.shaping == pytest.approx(expected, rel=1e-6)
    assert (found.shaping < 0).all()


def test_half_right_and_sure_of_the_rest_beats_an_even_guess() -> None:
    even = np.log([0.1] * 4).tolist()
    half = [-0.01, -0.01, -12.0, -15.0]
    assert np.mean(half) < np.mean(even)
    assert shape(half) > shape(even)
    assert shape([-1e9]) == -3.0


def test_nothing_is_shaped_where_it_was_not_asked_for(engine: Engine, generated: Task) -> None:
    scale(engine, 1.0)
    found = score(engine, generated, generated.examples("train"), ALL[:4], shaped=False)
    assert found.shaping.tolist() == [0.0] * 4


@pytest.mark.parametrize("teacher_forced", [True, False])
def test_only_the_chosen_examples_are_scored_in_their_order(
    engine: Engine, forced: Task, generated: Task, teacher_forced: bool
) -> None:
    scale(engine, 1.0)
    task = forced if teacher_forced else generated
    items = task.examples("train")
    whole = score(engine, task, items, ALL, shaped=True)
    chosen = np.array([20, 3, 11], np.uint32)
    some = score(engine, task, items, chosen, shaped=True)
    assert some.examples.tolist() == [20, 3, 11]
    assert some.scores.tolist() == whole.only(chosen).scores.tolist()
    assert some.shaping == pytest.approx(whole.only(chosen).shaping, abs=0.05)
    assert [a.dtype for a in (some.scores, some.shaping, some.truncated)] == [
        np.float32,
        np.float32,
        np.bool_,
    ]


def test_a_destroyed_model_is_as_bad_as_the_floor_and_no_worse(
    engine: Engine, forced: Task
) -> None:
    scale(engine, -1000.0)
    found = score(engine, forced, forced.examples("train"), ALL, shaped=True)
    assert found.mean == 0.0
    assert found.shaping.min() == -3.0
    assert found.fitness(0.05) >= -1.0


def test_replies_cut_by_the_token_limit_are_counted(generated: Task, engine: Engine) -> None:
    path = generated.path.with_name("short.yaml")
    path.write_text(generated.path.read_text().replace("max_new_tokens: 8", "max_new_tokens: 1"))
    short = Task.open(path)
    scale(engine, 1.0)
    cut = score(engine, short, short.examples("train"), ALL, shaped=False)
    assert cut.truncated.all()
    assert cut.mean == 0.0
    assert cut.tokens.tolist() == [1] * len(ALL)
    whole = score(engine, generated, generated.examples("train"), ALL, shaped=False)
    assert not whole.truncated.all()
    right = whole.scores == 1  # one token a word, in this task
    answers = [len(item.target.split()) for item in generated.examples("train")]
    assert whole.tokens[right].tolist() == np.array(answers)[right].tolist()
    assert whole.tokens.dtype == np.uint32


def test_a_model_is_scored_on_all_of_a_split(forced: Task) -> None:
    evaluated = evaluate_model(OPS, forced, "validation", SECTION)
    found = evaluated.document()
    assert found["n"] == 12
    assert (found["model"], found["task"], found["split"]) == (OPS, "en_list_ops", "validation")
    assert 0 <= found["score"] <= 1
    assert found["standard_error"] >= 0
    assert found["truncated"] == 0


def test_items_that_do_not_fit_or_fail_are_counted_where_they_stand(
    engine: Engine, generated: Task
) -> None:
    path = generated.path.with_name("numbers.yaml")
    text = generated.path.read_text().replace("exact_match", "last_number")
    path.write_text(text)
    task = Task.open(path)
    items = list(task.examples("train"))
    items[3] = replace(items[3], target="none")
    items[5] = replace(items[5], prompt=str(items[5].prompt) * 100)
    scale(engine, 1.0)
    found = score(engine, task, items, np.array([5, 4, 3], np.uint32), shaped=True)
    assert found.overlong.tolist() == [True, False, False]
    assert found.failures == {3: "last_number: the target 'none' has no number"}
    assert found.scores[[0, 2]].tolist() == [0, 0]
    assert found.shaping[0] == -3.0
    assert found.tokens[0] == 0
