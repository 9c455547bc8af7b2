"""What only the engine on vLLM does: its processes, its swaps, its settings.

The suite that every engine passes is tests/contracts/test_engine.py.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evomerge.engine import Engine, Generation, Reply
from evomerge.engine import vllm as engine_on_vllm
from evomerge.engine.build import build
from evomerge.errors import InputError, ModelError
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from tests import tiny
from tests.merge.conftest import altered
from tests.processes import called, descendants

PROMPTS = ["now ascend of 7 and one and 4 and 2 =", "数列 三 と 一", "descend of eight ="]
PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ("4 7 7 9", "9")]
LONG = [" ".join(["数列 六 と 五 、 九 と 五 、 昇順 ="] * 22 + [word]) for word in "一二三四"]
LAYERS = 3

Opened = dict[str, Checkpoint]


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Random models with heads that vLLM runs on a CPU, and room for long prompts."""
    folder = tmp_path_factory.mktemp("wide")
    found: Opened = {}
    for seed, name in enumerate(("a", "b")):
        path = tiny.write_model(folder / f"{name}-short", seed=seed, layers=LAYERS, hidden=64)
        found[name] = Checkpoint.open(altered(path, folder / name, max_position_embeddings=512))
    return found


@pytest.fixture(scope="module")
def live(wide_models: Opened) -> Iterator[Engine]:
    """One engine for all tests, whose worker can be made to ignore swaps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_on_vllm, "_WORKER", "tests.engine.faulty.FaultyWorker")
        section = Section(kind="vllm", device="cpu", threads=1, cache_gb=0.25)
        with closing(build(section, wide_models, "a")) as engine:
            yield engine


@pytest.fixture(scope="module")
def reference(wide_models: Opened) -> Engine:
    return build(Section(device="cpu"), wide_models, "a")


def blend(weight: float) -> Recipe:
    entries = [
        {"model": "a", "parameters": {"weight": weight}},
        {"model": "b", "parameters": {"weight": 1 - weight}},
    ]
    return Recipe.from_dict({"merge_method": "linear", "models": entries})


def stack(*ranges: tuple[str, int, int]) -> Recipe:
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in ranges]
    return Recipe.from_dict({"merge_method": "passthrough", "slices": slices})


def written(engine: Engine, prompts: list[str]) -> list[Reply]:
    return [reply for (reply,) in engine.generate(prompts, Generation(8))]


def check_agree(one: Engine, other: Engine) -> None:
    """On replies, and on likelihoods as far as rounding allows."""
    assert written(one, PROMPTS) == written(other, PROMPTS)
    found, expected = one.likelihoods(PAIRS), other.likelihoods(PAIRS)
    assert [item.greedy for item in found] == [item.greedy for item in expected]
    for item, wanted in zip(found, expected, strict=True):
        assert item.token_log_likelihoods == pytest.approx(wanted.token_log_likelihoods, abs=1e-4)


def workers() -> list[int]:
    """vLLM's processes, the engine's core before its workers."""
    return called("VLLM")


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    for _ in range(int(10 * seconds)):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} seconds")


@pytest.mark.vllm
def test_a_hundred_candidates_run_in_the_same_processes(live: Engine, reference: Engine) -> None:
    live.load(blend(0.5))
    before = workers()
    said = set()
    for number in range(100):
        recipe = blend(number / 99)
        live.load(recipe)
        said.add(live.likelihoods(PAIRS[:1])[0].log_likelihood)
        if number % 20 == 0:
            reference.load(recipe)
            check_agree(live, reference)
    assert workers() == before
    assert len(before) == 2
    assert len(said) == 100


@pytest.mark.vllm
def test_long_prompts_are_not_answered_by_the_model_before(
    live: Engine, reference: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {}
    for weight in (0.0, 1.0):
        reference.load(blend(weight))
        expected[weight] = written(reference, LONG)
    for weight in (0.0, 1.0, 0.0):
        live.load(blend(weight))
        assert written(live, LONG) == expected[weight]
    # The same, were the cache of prefixes kept: so long are the prompts that it would show.
    llm: Any = live._llm
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: True)
    live.load(blend(1.0))
    assert written(live, LONG) != expected[1.0]


@pytest.mark.vllm
def test_likelihoods_come_out_the_same_again(live: Engine) -> None:
    live.load(blend(0.3))
    pairs = [(prompt, answer) for prompt in LONG for answer in ("4 7", "9")]
    first = live.likelihoods(pairs, ended=False)
    written(live, LONG)  # now their prefixes are known
    for found, expected in zip(live.likelihoods(pairs, ended=False), first, strict=True):
        wanted = pytest.approx(expected.token_log_likelihoods, abs=1e-5)
        assert found.token_log_likelihoods == wanted


@pytest.mark.vllm
@pytest.mark.parametrize("which", [0, 1], ids=["core", "worker"])
def test_a_killed_process_is_started_again_and_asked_again(
    live: Engine, reference: Engine, caplog: pytest.LogCaptureFixture, which: int
) -> None:
    live.load(blend(0.4))
    reference.load(blend(0.4))
    before = workers()
    os.kill(before[which], signal.SIGKILL)
    with caplog.at_level(logging.WARNING):
        check_agree(live, reference)
    assert "died; it is started again" in caplog.text
    after = workers()
    assert len(after) == 2
    assert not set(after) & set(before)
    os.kill(after[which], signal.SIGKILL)
    live.load(blend(0.8))
    reference.load(blend(0.8))
    check_agree(live, reference)


@pytest.mark.vllm
def test_layers_fill_spare_slots_and_only_more_of_them_need_a_restart(
    live: Engine, reference: Engine
) -> None:
    live.load(blend(0.5))
    before = workers()

    def check(layers: int, restarts: bool) -> None:
        nonlocal before
        order = stack(("a", 0, LAYERS), *[("b", 1, 2)] * (layers - LAYERS))
        if layers < LAYERS:
            order = stack(("b", 0, layers))
        live.load(order)
        reference.load(order)
        check_agree(live, reference)
        assert (workers() != before) == restarts, layers
        before = workers()

    check(1, restarts=False)
    check(LAYERS, restarts=False)
    check(7, restarts=True)
    check(2, restarts=False)
    check(5, restarts=False)
    check(7, restarts=False)
    check(8, restarts=True)
    check(9, restarts=False)  # a quarter more than was needed


@pytest.mark.vllm
def test_a_swap_that_does_nothing_is_noticed_and_made_again(
    live: Engine, reference: Engine
) -> None:
    live.load(blend(0.9))
    llm: Any = live._llm
    llm.collective_rpc("ignore_swaps", args=(1,))
    live.load(blend(0.1))
    reference.load(blend(0.1))
    check_agree(live, reference)
    llm.collective_rpc("ignore_swaps", args=(2,))
    with pytest.raises(ModelError, match="vLLM did not take over the merged values, twice"):
        live.load(blend(0.9))
    live.load(blend(0.1001))
    reference.load(blend(0.1001))
    check_agree(live, reference)


@pytest.mark.vllm
def test_two_workers_share_a_model_and_end_with_its_engine(
    wide_models: Opened, reference: Engine
) -> None:
    """On a CPU, where they exchange what GPUs would."""
    others = set(workers())
    section = Section(kind="vllm", device="cpu", threads=1, cache_gb=0.25, tensor_parallel=2)
    with closing(build(section, wide_models, "a")) as engine:
        mine = set(workers()) - others
        assert len(mine) == 3
        for recipe in (blend(0.4), stack(("b", 0, 2)), blend(0.6)):
            engine.load(recipe)
            reference.load(recipe)
            check_agree(engine, reference)
    wait_until(lambda: not mine & descendants(os.getpid()), 30)


@pytest.mark.vllm
def test_the_processes_end_with_the_one_that_made_the_engine(
    wide_models: Opened, tmp_path: Path
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(
        "import time\n"
        "from pathlib import Path\n"
        "from evomerge.engine.build import build\n"
        "from evomerge.job import Engine\n"
        "from evomerge.merge.checkpoint import Checkpoint\n"
        "if __name__ == '__main__':\n"
        f"    models = {{'a': Checkpoint.open({str(wide_models['a'].path)!r})}}\n"
        "    engine = build(Engine(kind='vllm', device='cpu', cache_gb=0.25), models, 'a')\n"
        f"    Path({str(tmp_path / 'ready')!r}).touch()\n"
        "    time.sleep(600)\n"
    )
    driver = subprocess.Popen([sys.executable, script])
    try:
        wait_until(lambda: (tmp_path / "ready").exists() or driver.poll() is not None, 300)
        assert driver.poll() is None
        theirs = descendants(driver.pid)
    finally:
        driver.kill()
        driver.wait()
    assert len(theirs) >= 2
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in theirs), 30)


@pytest.mark.vllm
def test_heads_that_a_cpu_does_not_run_are_refused(tmp_path: Path) -> None:
    models = {"a": Checkpoint.open(tiny.write_model(tmp_path / "a", seed=0))}
    with pytest.raises(ModelError, match=r"'a': its attention heads have 8 values.*transformers"):
        build(Section(kind="vllm", device="cpu"), models, "a")


@pytest.mark.vllm
def test_a_cache_that_is_too_small_is_an_error_in_one_line(wide_models: Opened) -> None:
    section = Section(kind="vllm", device="cpu", cache_gb=1e-6)
    with pytest.raises(ModelError, match="vLLM does not start with it") as raised:
        build(section, wide_models, "a")
    assert "\n" not in str(raised.value)
    assert "VLLM_LOGGING_LEVEL" in str(raised.value)


@pytest.mark.vllm
def test_another_device_than_vllm_was_built_for_is_refused(wide_models: Opened) -> None:
    with pytest.raises(InputError, match=r"engine\.device: 'cuda:7'.*give"):
        build(Section(kind="vllm", device="cuda:7"), wide_models, "a")


@pytest.mark.vllm
def test_compiling_on_a_cpu_is_refused(wide_models: Opened) -> None:
    with pytest.raises(InputError, match=r"engine\.eager: false.*leave it out"):
        build(Section(kind="vllm", device="cpu", eager=False), wide_models, "a")


def test_without_vllm_the_remedy_is_named(
    wide_models: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ModelError, match=r"pip install 'evomerge\[vllm\]'"):
        build(Section(kind="vllm"), wide_models, "a")


@pytest.mark.parametrize(
    "settings", [{"tensor_parallel": 2}, {"gpu_memory": 0.8}, {"cache_gb": 2}, {"eager": False}]
)
def test_what_transformers_does_not_know_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"only engine.kind: vllm has it: leave it out"):
        Section(**settings)
    Section(kind="vllm", **settings)


@pytest.mark.parametrize(
    "settings",
    [{"tensor_parallel": 0}, {"gpu_memory": 0}, {"gpu_memory": 1}, {"cache_gb": 0}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"greater than|less than"):
        Section(kind="vllm", **settings)
