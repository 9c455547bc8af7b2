"""Merging ahead: the same bits and the same errors as merging in turn, and memory only to spare."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evomerge.engine import ahead
from evomerge.engine.model import LiveModel
from evomerge.engine.transformers import TransformersEngine
from evomerge.errors import EvomergeError, ModelError, OutOfMemory, RecipeError
from evomerge.job import Engine as Section
from evomerge.merge import live as merging
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.operand import Operand
from evomerge.merge.plan import Plan
from evomerge.recipe import Recipe
from evomerge.signatures import METHODS
from tests import tiny
from tests.merge.conftest import altered, threads_of_torch, without

CPU = torch.device("cpu")
VALUES = {"weight": 0.4, "density": 0.5, "gamma": 0.1, "epsilon": 0.2, "t": 0.3}
PAIRS = [("数列 三 と 一", "4 7"), ("昇順 =", "9"), ("一 二 三", "")]

Opened = dict[str, Checkpoint]
State = dict[str, torch.Tensor]


def by(method: str, weight: float = 0.4) -> Recipe:
    """Of a and b, as far as the method takes them."""
    signature = METHODS[method]
    most = signature.models[1] - (signature.base != "none" and not signature.task_vectors)
    given = VALUES | {"weight": weight, "t": weight}
    known = signature.per_model | signature.shared
    made: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name} for name in "ab"[: int(min(2, most))]],
        "parameters": {key: value for key, value in given.items() if key in known},
    }
    if signature.base != "none":
        made["base_model"] = "base"
    return Recipe.from_dict(made)


def stack(*ranges: tuple[str, int, int]) -> Recipe:
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in ranges]
    return Recipe.from_dict({"merge_method": "passthrough", "slices": slices})


def linear(*models: str) -> Recipe:
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    return Recipe.from_dict({"merge_method": "linear", "models": entries})


def cancelling() -> Recipe:
    """Found to be infeasible only when values are read."""
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in (("a", 1.0), ("same", -0.5), ("again", -0.5))
    ]
    rest = {"parameters": {"normalize_weights": False}}
    return Recipe.from_dict({"merge_method": "multislerp", "models": entries, **rest})


RECIPES: dict[str, Recipe] = {
    "linear": by("linear"),
    "ties": by("ties"),
    "dare": by("dare_ties"),
    "shorter": stack(("a", 0, 1), ("b", 2, 3)),
    "longer": stack(("a", 0, 3), ("b", 1, 3)),
    "tied": linear("tied"),
    "tied and untied": linear("tied", "b"),
    "tied, longer": stack(("a", 0, 2), ("deep", 2, 5), ("tied", 1, 3)),
    "cancelling": cancelling(),
    "no such layers": stack(("a", 2, 4)),
    "another shape": linear("wide"),
}


@pytest.fixture(scope="module")
def parents(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """The shared models; b with a tied head, a twice more, and one of another width."""
    folder = tmp_path_factory.mktemp("ahead")
    head = without("lm_head.weight")
    paths = {
        **models,
        "tied": altered(models["b"], folder / "tied", head, tie_word_embeddings=True),
        "same": models["a"],
        "again": models["a"],
        "wide": tiny.write_model(folder / "wide", seed=4, hidden=32),
    }
    return {name: Checkpoint.open(path) for name, path in paths.items()}


@pytest.fixture
def live(parents: Opened) -> Iterator[LiveModel]:
    with closing(LiveModel(parents, "base", CPU, None)) as opened:
        yield opened


def state(live: LiveModel) -> State:
    """A copy of every tensor by each of its names."""
    named = live.run.named_parameters(remove_duplicate=False)
    return {name: value.detach().clone() for name, value in named}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        value.view(torch.int32).equal(other[name].view(torch.int32)) for name, value in one.items()
    )


def outcome(live: LiveModel, recipe: Recipe) -> State | str:
    """Of a load: the model, or what is wrong."""
    try:
        live.load(recipe)
    except EvomergeError as error:
        return f"{type(error).__name__}: {error}"
    return state(live)


@pytest.fixture(scope="module")
def expected(parents: Opened) -> dict[str, State | str]:
    """What an ordinary load of each recipe gives."""
    found = {}
    for name, recipe in RECIPES.items():
        with closing(LiveModel(parents, "base", CPU, None)) as fresh:
            found[name] = outcome(fresh, recipe)
    return found


def check(found: State | str, wanted: State | str) -> None:
    if isinstance(wanted, str) or isinstance(found, str):
        assert found == wanted
    else:
        assert same(found, wanted)


@pytest.mark.slow
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["load", "prepare", "ahead"]), st.sampled_from([*RECIPES])),
        min_size=2,
        max_size=12,
    )
)
@settings(derandomize=True, deadline=None, max_examples=25)
def test_whatever_is_prepared_every_load_gives_what_it_gives_without(
    parents: Opened, expected: dict[str, State | str], steps: list[tuple[str, str]]
) -> None:
    """In any order; ahead: prepared and loaded."""
    with closing(LiveModel(parents, "base", CPU, None)) as live:
        for what, name in steps:
            if what != "load":
                live.prepare(RECIPES[name])
            if what != "prepare":
                check(outcome(live, RECIPES[name]), expected[name])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_same_bits_ahead(
    parents: Opened, live: LiveModel, method: str
) -> None:
    with closing(LiveModel(parents, "base", CPU, None)) as fresh:
        for weight in (0.4, 0.7):
            assert live.prepare(by(method, weight))
            check(outcome(live, by(method, weight)), outcome(fresh, by(method, weight)))


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a_merge_in_the_background_and_the_scoring_beside_it_leave_each_other_alone(
    parents: Opened, threads: int
) -> None:
    """Bits of scores, bits of the merge, threads of torch's, and the process's own generators."""
    recipes = [by("ties", 0.1 * step) for step in range(8)]
    with threads_of_torch(threads), closing(opened(parents, merge_ahead=False)) as plain:
        expected = []
        for recipe in recipes:
            plain.load(recipe)
            expected.append(plain.likelihoods(PAIRS))
    with threads_of_torch(threads), closing(opened(parents, merge_ahead=True)) as engine:
        drawn = torch.get_rng_state()
        found = []
        engine.load(recipes[0])
        for upcoming in (*recipes[1:], None):
            assert upcoming is None or engine.prepare(upcoming)
            found.append(engine.likelihoods(PAIRS))
            assert torch.get_num_threads() == threads
            if upcoming is not None:
                engine.load(upcoming)
        assert torch.get_rng_state().equal(drawn)
    assert found == expected


def opened(parents: Opened, merge_ahead: bool) -> TransformersEngine:
    section = Section(device="cpu", merge_ahead=merge_ahead)
    return TransformersEngine(section, parents, "base")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Merges in the background wait until it is set."""
    write, gate = Resident.write, threading.Event()

    def waiting(
        self: Resident,
        plan: Plan,
        named: Mapping[str, torch.Tensor],
        given_up: threading.Event | None = None,
    ) -> None:
        if given_up is not None:
            while not gate.wait(0.01) and not given_up.is_set():
                pass
        write(self, plan, named, given_up)

    monkeypatch.setattr(Resident, "write", waiting)
    yield gate
    gate.set()


def test_the_live_model_stays_while_the_next_is_merged(
    live: LiveModel, expected: dict[str, State | str], gate: threading.Event
) -> None:
    live.load(RECIPES["linear"])
    assert live.prepare(RECIPES["longer"])
    check(state(live), expected["linear"])
    gate.set()
    check(outcome(live, RECIPES["longer"]), expected["longer"])


@pytest.mark.parametrize("end", ["load", "prepare", "forget", "close"])
def test_what_is_begun_and_not_wanted_any_more_is_ended(
    live: LiveModel,
    expected: dict[str, State | str],
    gate: threading.Event,
    end: str,
) -> None:
    """None of these would come back if they waited for a merge that waits."""
    live.load(RECIPES["linear"])
    assert live.prepare(RECIPES["ties"])
    if end == "load":
        check(outcome(live, RECIPES["shorter"]), expected["shorter"])
    elif end == "prepare":
        assert live.prepare(RECIPES["longer"])
        gate.set()
        check(outcome(live, RECIPES["longer"]), expected["longer"])
    elif end == "forget":
        assert live.forget()
        check(state(live), expected["linear"])
        check(outcome(live, RECIPES["ties"]), expected["ties"])
    else:
        live.close()
        check(state(live), expected["linear"])


def fails_in_the_background(patch: pytest.MonkeyPatch, error: Exception) -> list[Plan]:
    """Merges there, halfway; gives what was tried."""
    write, tried = Resident.write, []

    def failing(
        self: Resident,
        plan: Plan,
        named: Mapping[str, torch.Tensor],
        given_up: threading.Event | None = None,
    ) -> None:
        write(self, plan, named, given_up)
        if given_up is not None:
            tried.append(plan)
            raise error

    patch.setattr(Resident, "write", failing)
    return tried


def test_memory_that_runs_out_in_the_background_fails_nothing_and_is_said_once(
    live: LiveModel,
    expected: dict[str, State | str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tried = fails_in_the_background(monkeypatch, torch.OutOfMemoryError("CUDA out of memory"))
    assert live.prepare(RECIPES["ties"])
    check(outcome(live, RECIPES["ties"]), expected["ties"])
    for name in ("linear", "longer"):
        assert not live.prepare(RECIPES[name])  # it is tried once
        check(outcome(live, RECIPES[name]), expected[name])
    assert len(tried) == 1
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "memory of cpu is too short for a second model" in caplog.text


def test_what_nobody_foresaw_is_raised_by_the_load_of_that_recipe_alone(
    live: LiveModel, expected: dict[str, State | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fails_in_the_background(patch, ZeroDivisionError("here"))
        live.prepare(RECIPES["ties"])
        check(outcome(live, RECIPES["linear"]), expected["linear"])
        live.prepare(RECIPES["ties"])
        with pytest.raises(ZeroDivisionError, match="here"):
            live.load(RECIPES["ties"])
    check(outcome(live, RECIPES["ties"]), expected["ties"])


def test_nothing_is_begun_where_parents_and_a_second_model_do_not_fit(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    live.load(RECIPES["linear"])
    size = sum(value.nbytes for value in live._parameters.values())
    resident = live._resident
    assert resident.to_come > 0  # of the base, and of others

    def leaves(spare: int) -> Callable[[torch.device], int]:
        return lambda device: spare

    monkeypatch.setattr(ahead, "spare_memory", leaves(size + resident.to_come - 1))
    assert not live.prepare(RECIPES["ties"])
    assert not live.prepare(RECIPES["ties"])
    assert caplog.text.count("too short for a second model") == 1
    monkeypatch.setattr(ahead, "spare_memory", leaves(size + resident.to_come))
    assert live.prepare(RECIPES["ties"])  # there is room by now
    live.load(RECIPES["ties"])
    monkeypatch.setattr(ahead, "spare_memory", leaves(0))
    assert live.prepare(RECIPES["linear"])  # it has its spare tensors


def test_a_deeper_model_is_merged_in_turn_where_it_alone_does_not_fit(
    live: LiveModel,
    expected: dict[str, State | str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    live.load(RECIPES["linear"])
    size = sum(value.nbytes for value in live._parameters.values())
    to_come = live._resident.to_come
    monkeypatch.setattr(ahead, "spare_memory", lambda device: size + to_come)
    assert live.prepare(RECIPES["longer"])
    check(outcome(live, RECIPES["longer"]), expected["longer"])
    assert live._ahead._spare == {}
    assert "too short for a second model" not in caplog.text  # for it is not
    monkeypatch.setattr(ahead, "spare_memory", lambda device: 10 * size + to_come)
    assert live.prepare(RECIPES["ties"])
    assert live._ahead.free()
    assert caplog.text.count("too short for a second model") == 1


def test_a_batch_that_memory_is_short_for_gets_that_of_what_is_prepared(
    parents: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stays as large as it is without, so that the bits are the same."""
    with closing(opened(parents, merge_ahead=True)) as engine:
        engine.load(RECIPES["ties"])
        expected = engine.likelihoods(PAIRS)
        assert engine.prepare(RECIPES["linear"])
        forward, failed = engine._live.run.forward, []

        def short_once(*args: Any, **kwargs: Any) -> Any:
            if not failed:
                failed.append(len(kwargs["input_ids"]))
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert len(kwargs["input_ids"]) == failed[0]
            return forward(*args, **kwargs)

        monkeypatch.setattr(engine._live.run, "forward", short_once)
        assert engine.likelihoods(PAIRS) == expected
        assert failed == [len(PAIRS)]
        assert not engine.prepare(RECIPES["linear"])  # it would happen again with each candidate


def test_a_merge_that_memory_is_short_for_gets_that_of_the_spare_tensors(
    live: LiveModel, expected: dict[str, State | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live.prepare(RECIPES["linear"])
    live.load(RECIPES["linear"])
    assert live._ahead._spare
    write = Resident.write

    def short(self: Resident, *given: Any) -> None:
        if live._ahead._spare:
            raise torch.OutOfMemoryError("CUDA out of memory")
        write(self, *given)

    monkeypatch.setattr(Resident, "write", short)
    check(outcome(live, RECIPES["ties"]), expected["ties"])


def test_two_sets_of_tensors_are_enough_for_any_number_of_candidates(live: LiveModel) -> None:
    def held() -> set[int]:
        spare = [t for tensors in live._ahead._spare.values() for t in tensors]
        return {t.data_ptr() for t in (*spare, *live.run.parameters())}

    for weight in (0.1, 0.2):
        live.prepare(by("ties", weight))
        live.load(by("ties", weight))
    before = held()
    for step in range(6):
        live.prepare(by("ties", 0.3 + 0.1 * step))
        if step % 3:  # else it is dropped by the next one
            live.load(by("ties", 0.3 + 0.1 * step))
    live.load(by("linear"))
    assert held() == before


def test_a_candidate_that_is_kept_is_not_merged_ahead(
    live: LiveModel, expected: dict[str, State | str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ties", "linear", "ties"):  # from the first return on
        live.load(RECIPES[name])
    monkeypatch.setattr(live._kept, "_copying", 0.0)  # whatever merging takes here
    live.prepare(RECIPES["linear"])
    live.load(RECIPES["linear"])
    assert not live.prepare(RECIPES["linear"])
    live.load(RECIPES["shorter"])
    check(outcome(live, RECIPES["linear"]), expected["linear"])


def test_memory_that_others_see_is_filled_and_stays_where_it_is(
    parents: Opened, live: LiveModel, expected: dict[str, State | str]
) -> None:
    """A parameter that shares its storage, and one that is laid out otherwise."""
    live.load(RECIPES["linear"])
    head = live.run.get_output_embeddings()
    head.register_parameter("other", torch.nn.Parameter(head.weight.data))
    gate = live.run.get_submodule("model.layers.0.mlp.gate_proj").weight
    gate.data = gate.data.T.contiguous().T
    places = head.weight.data_ptr(), gate.data_ptr()
    live.prepare(RECIPES["ties"])
    live.load(RECIPES["ties"])
    assert (head.weight.data_ptr(), gate.data_ptr()) == places
    assert not gate.is_contiguous()
    wanted = expected["ties"]
    assert not isinstance(wanted, str)
    assert head.other.equal(wanted["lm_head.weight"])
    del head.other
    check(state(live), wanted)


def test_a_merge_that_is_not_of_the_very_tensors_that_are_live_changes_none(
    live: LiveModel, expected: dict[str, State | str]
) -> None:
    """As of an arrangement that has more of them."""
    live.load(RECIPES["linear"])
    live.prepare(RECIPES["ties"])
    prepared = live._ahead.take(RECIPES["ties"])
    assert prepared is not None
    named = {name: live._parameters[name] for name in prepared.values}
    fewer = dict(list(prepared.values.items())[1:])
    for values in (fewer, {**prepared.values, "model.norm.weight": torch.zeros(3)}):
        changed = replace(prepared, values=values)
        assert not live._ahead.exchange(changed, named, live._parameters.values())
    check(state(live), expected["linear"])
    assert live._ahead.exchange(prepared, named, live._parameters.values())
    check(state(live), expected["ties"])


def test_in_the_background_one_thread_merges(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are for scoring."""
    monkeypatch.setattr(merging, "_WORTH_THREADS", 0)
    compute, who = merging.compute, set()

    def noting(*given: Any) -> Operand:
        who.add(threading.current_thread())
        return compute(*given)

    monkeypatch.setattr(merging, "compute", noting)
    with threads_of_torch(2):
        live.prepare(RECIPES["ties"])
        live.load(RECIPES["ties"])
        assert len(who) == 1
        assert threading.current_thread() not in who


def test_statistics_are_measured_before_and_what_is_wrong_with_them_is_told_later(
    parents: Opened, live: LiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVOMERGE_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    aim = {"calibration": str(text), "blocks": 2, "tokens": 8}
    entries = [{"model": "a", "parameters": {"weight": 0.8}}]
    made = {"merge_method": "task_arithmetic", "base_model": "base", "models": entries, "aim": aim}
    recipe = Recipe.from_dict(made)
    assert not live.prepare(recipe)
    assert "cannot be read" in str(outcome(live, recipe))
    text.write_text("数列 三 と 一 、 昇順 =\n" * 30, encoding="utf-8")
    assert live.prepare(recipe)
    found = outcome(live, recipe)
    with closing(LiveModel(parents, "base", CPU, None)) as fresh:
        check(found, outcome(fresh, recipe))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("cancelling", RecipeError),
        ("no such layers", RecipeError),
        ("another shape", ModelError),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told_by_its_load(
    live: LiveModel, expected: dict[str, State | str], name: str, error: type[Exception]
) -> None:
    assert live.prepare(RECIPES[name])
    with pytest.raises(error):
        live.load(RECIPES[name])
    live.prepare(RECIPES["linear"])
    check(outcome(live, RECIPES["linear"]), expected["linear"])


def test_a_merge_that_never_fits_is_said_to_be_out_of_memory(
    live: LiveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: Resident, *given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Resident, "write", short)
    live.prepare(RECIPES["linear"])
    with pytest.raises(OutOfMemory):
        live.load(RECIPES["linear"])


@pytest.mark.parametrize(("given_", "found"), [("auto", False), (False, False), (True, True)])
def test_on_a_cpu_it_is_done_only_where_it_is_asked_for(
    parents: Opened, given_: Any, found: bool
) -> None:
    section = Section(device="cpu", merge_ahead=given_)
    with closing(TransformersEngine(section, parents, "base")) as engine:
        assert engine.merges_ahead is found
        assert engine.prepare(RECIPES["linear"]) is found


def test_with_vllm_it_cannot_be_asked_for() -> None:
    assert Section(kind="vllm", merge_ahead="auto").merge_ahead == "auto"  # as stored jobs have it
    with pytest.raises(ValidationError, match=r"merge_ahead: only engine\.kind: transformers"):
        Section(kind="vllm", merge_ahead=True)
