"""The benchmarks of merging run to their end on models of a few kilobytes; no time is checked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import ahead, bench, busy, engine, live, merge, optimizers, searches, sizing, soak
from benchmarks.models import SHAPES, family
from evomerge.errors import InputError
from evomerge.merge import memory
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident


def figures(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows that a benchmark wrote."""
    assert (folder / f"{name}.md").read_text().startswith("| ")
    rows: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["methods"]
    return rows


@pytest.mark.slow
def test_merging_on_disk_is_measured_and_leaves_only_its_models(tmp_path: Path) -> None:
    arguments = ["--shape", "toy", "--folder", str(tmp_path), "--repeat", "1", "--only", "ties"]
    assert merge.main([*arguments, "--skip-mergekit"]) == 0
    (row,) = figures(tmp_path, "bench-merge")
    assert row["method"] == "ties"
    assert all(min(row[program].values()) > 0 for program in ("floor", "evomerge"))
    assert {path.name for path in (tmp_path / "toy-bfloat16").iterdir()} == {"base", *"abc"}
    assert len(list(tmp_path.iterdir())) == 3
    assert merge.main([*arguments, "--memory"]) == 0
    (row,) = figures(tmp_path, "bench-memory")
    assert row["output"] > 4 * SHAPES["toy"].parameters


def test_merging_into_a_live_model_is_measured(tmp_path: Path) -> None:
    assert live.main(["--shape", "toy", "--folder", str(tmp_path), "--repeat", "1"]) == 0
    rows = figures(tmp_path, "bench-live")
    assert {(row["dtype"], row["method"]) for row in rows} == {
        (dtype, method) for dtype in live.DTYPES for method in live.METHODS
    }


def test_outputs_are_compared_by_units_in_the_last_place(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -1.0, 0.0, 3.0], dtype=torch.bfloat16)
    other = torch.tensor([1.0, -1.0, -0.0, 3.0], dtype=torch.bfloat16)
    for name, tensor in (("one", values), ("zero", other)):
        (tmp_path / name).mkdir()
        save_file({"x": tensor}, tmp_path / name / "model.safetensors")
    assert merge.agreement(tmp_path / "one", tmp_path / "zero", None) == "none"
    apart = values + torch.tensor([2**-7, 0, 0, 2**-5])  # 1 and 2 places at 8 bits of precision
    save_file({"x": apart.bfloat16()}, tmp_path / "zero" / "model.safetensors")
    found = merge.agreement(tmp_path / "one", tmp_path / "zero", None)
    assert found == "2 of 4, 2 ulp"
    save_file({"y": values}, tmp_path / "zero" / "model.safetensors")
    with pytest.raises(InputError, match="one output only"):
        merge.agreement(tmp_path / "one", tmp_path / "zero", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert live.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.slow
def test_the_loop_and_a_swap_are_measured(tmp_path: Path) -> None:
    assert bench.loop_overhead(tmp_path)[1] > 0
    zoo = [str(bench.ROOT / "examples" / "zoo" / name) for name in ("base", "ops")]
    _, merged, copied = bench.swap(zoo, repeats=1)
    assert min(merged, copied) > 0


def test_scoring_and_swapping_are_measured(tmp_path: Path) -> None:
    assert engine.main(["--shapes", "toy", "--folder", str(tmp_path), "--repeat", "1"]) == 0
    (scored,) = json.loads((tmp_path / "bench-engine.json").read_text())["scoring"]
    assert min(scored["forced"], scored["generated"], scored["bare"], scored["tokens"]) > 0
    swaps = json.loads((tmp_path / "bench-swap.json").read_text())["swaps"]
    assert [swap["method"] for swap in swaps] == list(engine.METHODS)


@pytest.mark.slow
def test_merging_ahead_is_measured(tmp_path: Path) -> None:
    options = ["--shape", "toy", "--folder", str(tmp_path), "--repeat", "1"]
    assert ahead.main(options) == 0
    rows = json.loads((tmp_path / "bench-ahead.json").read_text())["ahead"]
    assert len(rows) == 2 * len(ahead.SHARES)
    assert all(min(row["in_turn"]["waited"], row["ahead"]["whole"]) > 0 for row in rows)


@pytest.mark.slow
def test_a_soak_draws_the_memory_of_every_swap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert soak.main(["--swaps", "10", "--folder", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["swaps"] == 10
    assert 0 < figures["megabytes"]["start"] <= figures["megabytes"]["most"]
    assert "kB per swap" in (tmp_path / "soak-transformers.svg").read_text()
    assert soak.slope([100.0] * 10) == pytest.approx(0, abs=1e-6)
    assert soak.slope([0.0, 0.0, *(step / 1000 for step in range(8))]) == pytest.approx(1)
    assert len({repr(soak.candidate(step)) for step in range(500)}) == 500


def test_proposing_is_measured(tmp_path: Path) -> None:
    arguments = ["--names", "random,qmc", "--generations", "3", "--folder", str(tmp_path)]
    assert optimizers.main(arguments) == 0
    found = json.loads((tmp_path / "bench-optimizers.json").read_text())["times"]
    assert [times["name"] for times in found] == ["random", "qmc"]
    assert all(times["exact"] for times in found)


@pytest.mark.slow
def test_busy_devices_are_measured_in_every_mode(tmp_path: Path) -> None:
    arguments = ["--executors", "timers", "--medians", "0.05", "--seconds", "2"]
    assert busy.main([*arguments, "--folder", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-busy.json").read_text())["runs"]
    assert [run["mode"] for run in found] == [*busy.MODES] * 2
    assert all(0 < run["busy"] <= 1 and run["milliseconds"] > 0 for run in found)


@pytest.mark.slow
def test_searches_on_the_zoo_are_measured(tmp_path: Path) -> None:
    assert searches.main(["--seeds", "1", "--budget", "12000", "--folder", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "bench-searches.json").read_text())["searches"]
    assert len(found) == len(searches.SETUPS)
    assert all(len(group[0]["curve"]) > 1 for group in found.values())
    assert (tmp_path / "bench-searches.svg").read_text().startswith("<svg")


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_what_a_worker_holds_is_what_is_computed_of_it(tmp_path: Path, share: float) -> None:
    models = family(tmp_path, "toy", torch.bfloat16, ("a", "b"))
    plan = sizing.task_arithmetic({str(p): Checkpoint.open(p) for p in models.values()})
    gpu = plan.bytes + int(share * 3 * plan.bytes / sizing.TO_SPARE)
    expected = sizing.place(plan, gpu)
    assert expected is not None
    opened = {str(path): Checkpoint.open(path) for path in models.values()}
    room = int((gpu - plan.bytes) * sizing.TO_SPARE)
    resident = Resident(opened, torch.device("cpu"), room, host_room=1 << 40)
    live = {t.name: torch.empty(t.shape, dtype=t.dtype) for t in plan.tensors}
    resident.write(plan, live)
    assert resident.held == expected.gpu
    assert resident.host_held <= expected.host <= 2 * resident.host_held
    assert resident.streamed == 0
    assert sizing.TO_SPARE == memory._SHARE


@pytest.mark.slow
def test_sizes_of_full_models_are_computed_without_their_values(tmp_path: Path) -> None:
    assert sizing.main(["--folder", str(tmp_path), "--gpus", "24"]) == 0
    rows = json.loads((tmp_path / "bench-sizing.json").read_text())["needs"]
    assert len(rows) == len(sizing.MODELS) * len(sizing.PARENTS)
    for row in rows:
        assert row["live"] == 2 * row["parameters"]
        assert row["at_hand"] == (row["parents"] + 1) * row["live"]
        assert row["ahead"] >= row["whole"] > row["live"] + row["at_hand"]
    assert rows[-1]["placed"] == {"24": None}
