"""`evomerge merge`: a drop-in for mergekit-yaml, under the flags that its users know."""

import gc
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evomerge.cli import live, view
from evomerge.cli.kinds import expecting
from evomerge.cli.options import AllowCrimes, AllowPickle, Json, UnsafeTruncateEmbeddings
from evomerge.errors import InputError

if TYPE_CHECKING:
    from evomerge.merge.statistics import Statistics

# Switches of mergekit's for what evomerge always does, or never needs.
NEEDLESS = (
    "--async-write",
    "--clone-tensors",
    "--lazy-unpickle",
    "--low-cpu-memory",
    "--multi-gpu",
    "--read-to-gpu",
    "--safe-serialization",
    "--trust-remote-code",
)
NEEDLESS_WITH_VALUE = ("--lora-merge-cache", "--lora-merge-dtype", "--write-threads")
_NOTES = 8  # that are said without --verbose; a model may have one for each layer


def merge(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", show_default=False)],
    random_seed: Annotated[int, typer.Option("--random-seed", help="Of random masks.")] = 0,
    out_shard_size: Annotated[
        str, typer.Option("--out-shard-size", help="Largest file, such as 500M or 5B (bytes).")
    ] = "5B",
    copy_tokenizer: Annotated[
        bool, typer.Option("--copy-tokenizer/--no-copy-tokenizer", help="Write a tokenizer.")
    ] = True,
    write_model_card: Annotated[
        bool, typer.Option("--write-model-card/--no-write-model-card", help="Write README.md.")
    ] = True,
    allow_crimes: AllowCrimes = False,
    allow_pickle: AllowPickle = False,
    unsafe_truncate_embeddings: UnsafeTruncateEmbeddings = False,
    cuda: Annotated[bool, typer.Option("--cuda/--no-cuda", help="Compute on the GPU.")] = False,
    gpu_rich: Annotated[bool, typer.Option("--gpu-rich", hidden=True)] = False,
    device: Annotated[
        str | None, typer.Option("--device", help="Compute on this device, such as cuda:1.")
    ] = None,
    num_threads: Annotated[
        int | None,
        typer.Option(
            "--num-threads", "-j", min=1, help="Default: one for each core; on a GPU, 4 at most."
        ),
    ] = None,
    transformers_cache: Annotated[
        Path | None, typer.Option("--transformers-cache", help="Where hub downloads are kept.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet/--no-quiet", help="Say only errors.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say also what is chosen silently.")
    ] = False,
    needless: Annotated[
        bool, typer.Option(*NEEDLESS, *[f"--no-{n[2:]}" for n in NEEDLESS], hidden=True)
    ] = False,
    needless_values: Annotated[
        list[str] | None, typer.Option(*NEEDLESS_WITH_VALUE, hidden=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge models by a mergekit recipe; a drop-in for mergekit-yaml."""
    began = time.perf_counter()
    logging.basicConfig(format="%(message)s", level=_level(quiet, verbose))
    log = logging.getLogger(__name__)
    if needless or needless_values:
        log.info("switches that evomerge does not need are ignored")
    shard_bytes = _bytes(out_shard_size)
    if transformers_cache is not None:
        os.environ["HF_HUB_CACHE"] = str(transformers_cache)  # read as the hub's library loads

    from evomerge.recipe import Recipe

    with expecting("recipe", recipe):
        loaded = Recipe.from_file(recipe)  # before torch is loaded: a misspelt key is told at once

    gc.disable()  # collecting while modules load takes a tenth of the start
    from evomerge.export.card import merge_card
    from evomerge.merge.device import named_device
    from evomerge.merge.disk import write_checkpoint
    from evomerge.merge.place import check_free
    from evomerge.merge.planner import make_plan
    from evomerge.merge.sources import open_model

    gc.freeze()
    gc.enable()
    check_free(out)
    named = device or ("cuda" if cuda or gpu_rich else "cpu")
    computes = named_device(named, "--device" if device else "--cuda")
    models = {name: open_model(name, allow_pickle=allow_pickle) for name in loaded.model_names()}
    statistics: dict[str, Statistics] = {}
    if loaded.aim is not None:
        from evomerge.engine.calibration import statistics_for

        with live.steps(quiet, doing="measuring") as steps:
            statistics = statistics_for(loaded, models, computes, steps.written)
    plan = make_plan(
        loaded,
        models,
        random_seed,
        allow_crimes=allow_crimes,
        truncate=unsafe_truncate_embeddings,
        statistics=statistics,
    )
    told = plan.notes if verbose else plan.notes[:_NOTES]
    for note in told:
        log.warning("%s", note)
    if len(told) < len(plan.notes):
        log.warning("and %d more: --verbose says all", len(plan.notes) - len(told))

    def finish(folder: Path) -> None:
        if write_model_card:
            (folder / "README.md").write_text(merge_card(plan, models), encoding="utf-8")

    with live.steps(quiet) as steps:
        count = "one model" if len(models) == 1 else f"{len(models)} models"
        steps.step(f"merging {len(plan.tensors)} tensors of {count} into {out}")
        write_checkpoint(
            plan,
            models,
            out,
            shard_bytes=shard_bytes,
            tokenizer=copy_tokenizer,
            device=computes,
            threads=num_threads,
            progress=lambda written: steps.written(written, plan.bytes),
            finish=finish,
        )
    if not as_json:
        view.line(str(out))
        return
    view.document(
        {
            "out": str(out),
            "tensors": len(plan.tensors),
            "bytes": plan.bytes,
            "seconds": time.perf_counter() - began,
            "notes": list(plan.notes),
        }
    )


def _level(quiet: bool, verbose: bool) -> int:
    return logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING


def _bytes(text: str) -> int:
    """mergekit's sizes: a number with K, M or B (thousand, million, billion)."""
    scale = {"K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}.get(text[-1:].upper(), 1)
    digits = text[:-1] if scale > 1 else text
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise InputError(f"--out-shard-size: '{text}' is no size: write such as 500M or 5B")
    return int(digits) * scale
