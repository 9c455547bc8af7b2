"""What can be known of a recipe before it is merged: whether it would go through, what its models
are to each other, what is merged and what copied, what it needs, and under which licence it comes.

Reads everything and writes nothing. Problems are collected as findings, not raised: all of them
are told at once, as far as one does not hide another.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from evomerge.errors import InputError
from evomerge.merge import disk, fit, licence
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.fit import Finding
from evomerge.merge.geometry import Geometry, geometry
from evomerge.merge.operand import span_bounds
from evomerge.merge.parallel import default_threads
from evomerge.merge.plan import COPY, Plan
from evomerge.merge.planner import make_plan
from evomerge.merge.sources import open_model
from evomerge.merge.statistics import Statistics
from evomerge.merge.tokenizer import vocabulary_size
from evomerge.recipe import Aim, Recipe

# Fine-tunes move a model by a few percent of its norm. Merging adds up what they learnt as long as
# the model is about linear in its weights around the base (arXiv 2305.12827); a move of a fifth is
# what continued pretraining does, and outside of that. A reasoned line, not a measured one.
_FAR = 0.2
# Two models that moved so far from one base, each its own way, have this cosine.
_STRANGERS = 1 / (1 + _FAR**2)
# DARE was shown to work on fine-tunes whose task vectors have values within this
# (arXiv 2311.03099, abstract); here the typical value, the root mean square, is held against it.
_DARE_RANGE = 0.002

# Bytes, measured with one thread and two on a model of 160 million values in bfloat16, rounded up:
# Python and torch with what they load; what a thread holds for each input of a tensor, masks and
# sorting included; and for the mean that karcher moves step by step. The allocator keeps most.
_PROCESS = 170_000_000
_FOR_INPUT = 6_000_000
_FOR_MEAN = 120_000_000
_SPANS_ON_DEVICE = 10  # float32 spans that a thread holds there for each input; reasoned

_UNMEASURED = "aim: "  # notes of a plan that was made without the statistics

Progress = Callable[[int, int], None]


def check_recipe(
    recipe: Recipe,
    *,
    allow_crimes: bool = False,
    allow_pickle: bool = False,
    truncate: bool = False,
    fast: bool = False,
    progress: Progress = lambda read, total: None,
) -> dict[str, Any]:
    """Open the models of a recipe and tell what a merge would be; plain data.

    The flags are those of a merge. fast: without geometry, which reads all values; progress is told
    the bytes read so far, of all.

    Keys: method; models (by name: roles, uri, revision, parameters, layers, dtype, bytes,
    vocabulary); findings (level error, warning or info; about; text); geometry (base, norms, rms,
    modules, cosines; None if fast), merge (tensors, bytes, methods, notes), output (layers,
    parameters, dtype, vocabulary, bytes, files) and needs (see _needs), each None where an error
    stands in its way; licence (see _licence).
    """
    findings: list[Finding] = []
    models = _opened(recipe, allow_pickle, findings)
    donor = recipe.base_model or recipe.model_names()[0]
    plan, output = None, None
    if len(models) == len(recipe.model_names()):
        with _heard("merge", findings):
            plan = _planned(recipe, models, findings, allow_crimes, truncate)
        if plan is not None:
            findings += fit.architectures(models, donor)
            output = _output(plan, models, findings)
    if donor in models:
        findings += fit.differences(models, donor, recipe)
    measured = None
    if plan is not None and not fast:
        measured = _measured(plan, models, findings, progress)
    needs = _needs(plan) if plan else None
    if needs and needs["disk_bytes"] > needs["disk_free_bytes"]:
        findings.append(Finding("warning", "disk", "the output does not fit on this disk"))
    order = ("error", "warning", "info")
    findings.sort(key=lambda finding: order.index(finding.level))
    return {
        "method": recipe.merge_method,
        "models": {name: _model(recipe, donor, name, model) for name, model in models.items()},
        "findings": [asdict(finding) for finding in dict.fromkeys(findings)],
        "geometry": measured,
        "merge": _merged(plan) if plan else None,
        "output": output,
        "needs": needs,
        "licence": _licence(models),
    }


def search_bytes(plan: Plan) -> int:
    """Memory of a live model with everything at hand that this merge needs: the inputs, or
    base and task vectors, in the dtype they are merged in, random numbers, the merged model."""
    held: dict[Any, int] = {}
    draws = _draws(plan)
    for tensor in plan.tensors:
        size = tensor.numel * tensor.compute_dtype.itemsize
        if tensor.base is not None:
            held[tensor.base, tensor.compute_dtype] = size
        for source in tensor.inputs:  # as it is, or less the base
            held[source, tensor.base, tensor.compute_dtype] = size
        if draws:
            held[tensor.name] = 2 * tensor.numel * len(tensor.inputs)
    return sum(held.values()) + plan.bytes


def _opened(recipe: Recipe, allow_pickle: bool, findings: list[Finding]) -> dict[str, Checkpoint]:
    models = {}
    for name in recipe.model_names():
        try:
            models[name] = open_model(name, allow_pickle=allow_pickle)
        except InputError as error:
            findings.append(Finding("error", "model", str(error)))
    return models


def _planned(
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    findings: list[Finding],
    allow_crimes: bool,
    truncate: bool,
) -> Plan | None:
    """The plan; without one, what refuses it, and what would refuse it next."""
    unmeasured = dict.fromkeys(models, Statistics({}))
    if recipe.aim is not None:
        findings.append(_of_aim(recipe.aim))
    try:
        return make_plan(
            recipe,
            models,
            allow_crimes=allow_crimes,
            truncate=truncate,
            statistics=unmeasured,
        )
    except InputError as error:
        reason = str(error)
    findings.append(Finding("error", "merge", reason))
    if recipe.models is None:
        return None
    first, *others = recipe.model_names()
    for other in others:
        if f"'{other}'" in reason:
            continue
        pair = {
            "merge_method": "linear",
            "models": [{"model": first}, {"model": other}],
            "parameters": {"weight": 1},
            **({"tokenizer_source": "union"} if recipe.vocabulary else {}),
        }
        two = {name: models[name] for name in (first, other)}
        try:
            make_plan(Recipe.from_dict(pair), two, allow_crimes=allow_crimes, truncate=truncate)
        except InputError as error:
            findings.append(Finding("error", "merge", str(error)))
    return None


def _of_aim(aim: Aim) -> Finding:
    if not Path(aim.calibration).is_file():
        return Finding("error", "aim", f"aim.calibration: no file '{aim.calibration}': name a text")
    text = "which tensors it reaches is known once activations are measured, as a merge begins"
    return Finding("info", "aim", text)


@contextmanager
def _heard(about: str, findings: list[Finding]) -> Iterator[None]:
    """What a merge would log as warnings is a finding here."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            findings.append(Finding("warning", about, record.getMessage()))

    logger, listener = logging.getLogger("evomerge"), Listener(logging.WARNING)
    propagated = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = propagated
        logger.removeHandler(listener)


def _model(recipe: Recipe, donor: str, name: str, model: Checkpoint) -> dict[str, Any]:
    roles = [role for role, one in (("base", recipe.base_model), ("config", donor)) if name == one]
    return {
        "roles": roles,
        "uri": model.uri,
        "revision": model.revision,
        "parameters": sum(header.numel for header in model.headers.values()),
        "layers": {part: layout.layers for part, layout in model.parts.items()},
        "dtype": dtype_name(model.dtype),
        "bytes": sum(header.bytes for header in model.headers.values()),
        "vocabulary": vocabulary_size(model.config),
    }


def _measured(
    plan: Plan, models: Mapping[str, Checkpoint], findings: list[Finding], progress: Progress
) -> dict[str, Any] | None:
    base, method = plan.recipe.base_model, plan.recipe.merge_method
    parents = {name: model for name, model in models.items() if name != base}
    try:
        with _heard("geometry", findings):
            found = geometry(models[base] if base else None, parents, progress)
    except InputError as error:
        findings.append(Finding("error", "geometry", str(error)))
        return None
    if method != "passthrough":
        findings += _distances(found)
    if method.startswith("dare") and _draws(plan):
        findings += _dare(found)
    cosines = [{"models": pair, "cosine": cosine} for pair, cosine in found.cosines.items()]
    return {"base": base, **asdict(found), "cosines": cosines}


def _distances(found: Geometry) -> Iterator[Finding]:
    for name, norm in found.norms.items():
        if norm > _FAR:
            text = (
                f"'{name}' is {norm:.0%} of the base's norm away from it, further than fine-tuning "
                "goes: plain merges of what was trained on, or from another base, often fail"
            )
            yield Finding("warning", "geometry", text)
    for (a, b), cosine in found.cosines.items():
        if not found.norms and cosine < _STRANGERS:
            text = (
                f"'{a}' and '{b}' have a cosine of {cosine:.3f}, less than two fine-tunes of one "
                "base usually have: weights of unrelated models do not average"
            )
            yield Finding("warning", "geometry", text)


def _dare(found: Geometry) -> Iterator[Finding]:
    for name, rms in found.rms.items():
        if rms > _DARE_RANGE:
            text = (
                f"the task vector of '{name}' has values of {rms:.2g} (root mean square), more "
                f"than the {_DARE_RANGE} up to which dropping them at random was shown to be safe: "
                "prefer a method that keeps the large ones"
            )
            yield Finding("warning", "geometry", text)


def _draws(plan: Plan) -> bool:
    """Whether masks are random."""
    return plan.recipe.merge_method.startswith(("dare", "della")) and any(
        parameters.get("density", 1) < 1 for t in plan.tensors for parameters in t.per_model
    )


def _merged(plan: Plan) -> dict[str, Any]:
    """What is merged by which method, what is copied, and what else a reader should know."""
    methods: dict[str, dict[str, int]] = {}
    for tensor in plan.tensors:
        counts = methods.setdefault(tensor.method, {"tensors": 0, "bytes": 0})
        counts["tensors"] += 1
        counts["bytes"] += tensor.bytes
    copied = methods.pop(COPY, {"tensors": 0, "bytes": 0})
    return {
        "tensors": len(plan.tensors),
        "bytes": plan.bytes,
        "methods": methods,
        "copied": copied,
        "notes": [note for note in plan.notes if not note.startswith(_UNMEASURED)],
    }


def _output(
    plan: Plan, models: Mapping[str, Checkpoint], findings: list[Finding]
) -> dict[str, Any]:
    """What would be written; what refuses its config, tokenizer or template is a finding."""
    config: Mapping[str, Any] = {}
    files = disk.tensor_files(plan, models, Path(), disk.DEFAULT_SHARD_BYTES)
    try:
        with _heard("output", findings):
            texts = disk.texts(plan, models, tokenizer=True)
            config = json.loads(texts.get("config.json", b"{}"))
    except InputError as error:
        findings.append(Finding("error", "output", str(error)))
    sizes: dict[torch.dtype, int] = {}
    for tensor in plan.tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    return {
        "layers": {part: len(layers) for part, layers in plan.layers.items()},
        "parameters": sum(tensor.numel for tensor in plan.tensors),
        "dtype": dtype_name(max(sizes, key=lambda dtype: sizes[dtype])),
        "vocabulary": vocabulary_size(config),
        "bytes": plan.bytes,
        "files": len(files),
    }


def _needs(plan: Plan) -> dict[str, int]:
    """Bytes. disk: of values that are written; disk_free: on the disk of the working directory.
    merge: memory of its own, beyond the page cache, from measurements; merge_device: of a GPU that
    computes. It grows with the threads and the inputs of a tensor, not with the model. search:
    memory of a live model, on a GPU or the host, with all at hand; what does not fit is read from
    its files every time."""
    threads = default_threads(torch.device("cpu"))
    inputs = max((len(t.inputs) + (t.base is not None) for t in plan.tensors), default=0)
    device = torch.device("cuda")
    spans = (span for t in plan.tensors for span in span_bounds(t.numel, 1, device))
    longest = max((stop - start for start, stop in spans), default=0)
    on_device = default_threads(device) * inputs * _SPANS_ON_DEVICE * 4 * longest
    held = inputs * _FOR_INPUT
    held += _FOR_MEAN if any(t.method == "karcher" for t in plan.tensors) else 0
    return {
        "disk_bytes": plan.bytes,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "merge_bytes": _PROCESS + threads * held,
        "merge_device_bytes": on_device,
        "search_bytes": search_bytes(plan),
    }


def _licence(models: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """That of the result, why, and what each model's card (and its adapter's) states."""
    stated = {name: licence.stated(model) for name, model in models.items()}
    found = licence.combined(terms for of_model in stated.values() for terms in of_model)
    return {
        **asdict(found.terms),
        "reason": found.reason,
        "models": {name: [t.label for t in of_model] for name, of_model in stated.items()},
    }
