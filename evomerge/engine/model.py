"""A live model of transformers: one object whose layers and tensors change with every recipe.

Recipes of another depth re-use the layers that are there and add shells where the stack is deeper.
Of a model that also sees only the text decoder has values, and only text runs through it. Knows
nothing of prompts and replies.
"""

import copy
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)
from transformers.initialization import no_init_weights

from evomerge.engine.ahead import Ahead, Planned
from evomerge.engine.batches import Footprint, footprint_of, out_of_memory
from evomerge.engine.calibration import statistics_for
from evomerge.engine.kept import Kept, Shape, finish
from evomerge.engine.texts import open_config, open_tokenizer
from evomerge.errors import EvomergeError, ModelError, OutOfMemory
from evomerge.layout import Layout, split
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.planner import make_plan
from evomerge.merge.statistics import Statistics
from evomerge.messages import one_line
from evomerge.recipe import Recipe

T = TypeVar("T")

_DECODER = "text_decoder"

_log = logging.getLogger(__name__)


class LiveModel:
    """The model of one config, on one device, and the parents that are merged into it.

    run: what forwards and generations are asked of.
    """

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        first: str,
        device: torch.device,
        dtype: torch.dtype | None,
    ) -> None:
        """dtype: that it computes in, None for the model's own. Raises ModelError."""
        self._models = models
        self._device = device
        stored = _language(models[first])
        _check_parts(models, first)
        self.run = _empty_model(models[first], dtype or models[first].dtype)
        live = _part(tuple(self._parameters), first)
        _drop(self.run, live)
        self.run = self.run.to(device).eval()
        self._resident = Resident(models, device)  # in the room that the model leaves
        self._kept = Kept(device)
        self._ahead = Ahead(self._resident, device)
        self._kinds = _kinds(models)
        self._shells: dict[str, list[torch.nn.Module]] = {}
        layers = list(self.run.get_submodule(live.prefix)) if live.prefix else []
        if len(layers) != stored.layers:
            raise ModelError(
                f"model '{first}' has {stored.layers} layers in its files and "
                f"{len(layers)} in config.json: correct the config"
            )
        for kind, layer in zip(self._kinds[first], layers, strict=True):
            self._shells.setdefault(kind, []).append(layer)
        self._prefix = live.prefix
        self._first = first
        self._told = (0, 0)

    def load(self, recipe: Recipe) -> None:
        """See Engine. Raises OutOfMemory too, where nothing kept can go."""
        for _ in range(2):
            try:
                return self._load(recipe)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
            if not self.forget():  # here nothing holds the failed merge's tensors any more
                break
        raise OutOfMemory(
            f"the merge does not fit into the memory of {self._device}: free some, or merge fewer "
            "or smaller models"
        )

    def prepare(self, recipe: Recipe) -> bool:
        """See Engine."""
        self._ahead.drop()
        if self._kept.holds(recipe):
            return False
        try:  # a model may have to run for them: not in the background, where others run
            statistics = statistics_for(recipe, self._models, self._device)
        except (EvomergeError, RuntimeError):  # which loading it will raise
            return False
        values = self._parameters
        live = {at: values[name] for at, name in _part(tuple(values), self._first).index.items()}
        return self._ahead.begin(recipe, live, lambda: self._planned(recipe, statistics))

    def _load(self, recipe: Recipe) -> None:
        kept = self._kept.found(recipe)
        prepared = self._ahead.take(recipe)
        if kept is not None:
            self._arrange(kept.shape)
            kept.write(self._parameters)
            return
        started = time.perf_counter()
        if prepared is None:
            statistics = statistics_for(recipe, self._models, self._device)
            planned = self._planned(recipe, statistics)
        else:
            planned = prepared.planned
        stored = planned.shape.stored
        live = self._arrange(planned.shape)
        values = self._parameters
        named = {
            stored.index[at]: values[name] for at, name in live.index.items() if at in stored.index
        }
        if prepared is None or not self._ahead.exchange(prepared, named, values.values()):
            self._resident.write(planned.plan, named)
        self._tell_what_is_streamed()
        written = {named[t.name].data_ptr() for t in planned.plan.tensors if t.name in named}
        for name, value in self.run.named_parameters(remove_duplicate=False):
            if name in live.places and value.data_ptr() not in written:
                raise ModelError(f"the models have no tensor '{name}', which their config asks for")
        finish(self._device)
        took = time.perf_counter() - started + (prepared.seconds if prepared else 0.0)
        merged = {v.data_ptr(): (name, v) for name, v in values.items()}  # a tied head once
        self._kept.offer(recipe, planned.shape, dict(merged[at] for at in written), took)

    def _planned(self, recipe: Recipe, statistics: Mapping[str, Statistics]) -> Planned:
        plan = make_plan(recipe, self._models, statistics=statistics)
        stored = _part(tuple(tensor.name for tensor in plan.tensors), plan.donor)
        shape = Shape(tuple(_own(plan.layers, plan.donor)), stored, plan.donor)
        tensors = tuple(tensor for tensor in plan.tensors if tensor.name in stored.places)
        return Planned(replace(plan, tensors=tensors), shape)

    def footprint(self) -> Footprint:
        """What rows take that run through the model as it is."""
        return footprint_of(self.run.config.get_text_config(), self.run.dtype.itemsize)

    def forget(self) -> bool:
        """Free the memory of what is kept and prepared beside the model; whether there was any."""
        prepared, kept = self._ahead.free(), self._kept.clear()
        return prepared or kept

    def close(self) -> None:
        """End what is prepared."""
        self._ahead.close()

    def _arrange(self, shape: Shape) -> Layout:
        """Make a place for each stored tensor; gives where the live ones stand."""
        self._set_layers(shape.layers)
        live = _part(tuple(self._parameters), shape.donor)
        self._set_head(shape.stored, live)
        return live

    def _tell_what_is_streamed(self) -> None:
        """Once for each amount: what does not fit costs time with every candidate."""
        resident = self._resident
        amounts = resident.host_held, resident.streamed
        if any(amounts) and amounts != self._told:
            _log.warning(
                "parents: %.1f GB are held on %s, %.1f GB in the host's memory, %.1f GB are read "
                "from files for every candidate",
                resident.held / 1e9,
                self._device,
                resident.host_held / 1e9,
                resident.streamed / 1e9,
            )
        self._told = amounts

    @property
    def _parameters(self) -> dict[str, torch.Tensor]:
        return dict(self.run.named_parameters(remove_duplicate=False)) | dict(
            self.run.named_buffers()
        )

    def _set_layers(self, layers: Sequence[tuple[str, int]]) -> None:
        """Stack shells of the same kinds as these layers; a layer's place in the KV cache is its
        own."""
        if not self._shells:
            return
        kinds = [self._kinds[model][layer] for model, layer in layers]
        stack: list[Any] = []
        for place, kind in enumerate(kinds):
            shells = self._shells.get(kind)
            if shells is None:
                raise ModelError(f"the live model has no layer of the kind '{kind}'")
            if kinds[:place].count(kind) == len(shells):
                shells.append(copy.deepcopy(shells[-1]))
            stack.append(shells[kinds[:place].count(kind)])
            for module in stack[-1].modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = place
        owner, _, name = self._prefix.rpartition(".")
        setattr(self.run.get_submodule(owner), name, torch.nn.ModuleList(stack))
        config = self.run.config.get_text_config()
        config.num_hidden_layers = len(stack)
        if getattr(config, "layer_types", None):
            config.layer_types = kinds

    def _set_head(self, stored: Layout, live: Layout) -> None:
        """Give the head a tensor of its own if one is stored, else that of the embeddings."""
        head, embeddings = self.run.get_output_embeddings(), self.run.get_input_embeddings()
        if head is None:
            return
        owner = next(name for name, module in self.run.named_modules() if module is head)
        at = next(at for at, name in live.index.items() if name == f"{owner}.weight")
        if at not in stored.index:
            head.weight = embeddings.weight
        elif head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(torch.empty_like(embeddings.weight))


def open_whole(model: Checkpoint, device: torch.device) -> tuple[Any, Any]:
    """A model as it is in its files, not to be written to, and its tokenizer. Raises ModelError."""
    with torch.device("meta"):
        kind = type(_empty_model(model, model.dtype))
    try:
        live, report = kind.from_pretrained(
            None,
            config=open_config(model.path),
            state_dict={name: model.tensor(name) for name in model.headers},
            dtype=model.dtype,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError) as error:
        raise ModelError(
            f"model '{model.path}': transformers cannot load it: {one_line(error)}"
        ) from None
    if report["missing_keys"]:
        missing = min(report["missing_keys"])
        raise ModelError(f"model '{model.path}': the tensor '{missing}' is missing")
    return live.to(device).eval(), open_tokenizer(model.path)


def _empty_model(model: Checkpoint, dtype: torch.dtype) -> Any:
    """The architecture of a saved model; its tensors come with the first load."""
    config = open_config(model.path)
    sees = len(model.parts) > 1 and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        # Nothing is drawn for tensors that are overwritten anyway; what an architecture draws all
        # the same must not move the process's own generator.
        with no_init_weights(), torch.random.fork_rng(devices=[]):
            return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"model '{model.path}': transformers cannot build it: {one_line(error)}"
        ) from None


def _kinds(models: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """What each layer of each model is, where the architecture has several kinds; else ''."""
    kinds: dict[str, list[str]] = {}
    for name, model in models.items():
        found = getattr(open_config(model.path).get_text_config(), "layer_types", None)
        kinds[name] = list(found or [""] * _language(model).layers)
    return kinds


def _check_parts(models: Mapping[str, Checkpoint], first: str) -> None:
    """Whether a live model of the first one's config has a place for all the others."""
    for name, model in models.items():
        if len(model.parts) > 1 == len(models[first].parts):
            raise ModelError(
                f"model '{name}' has parts ({', '.join(model.parts)}) that '{first}' lacks, which "
                "gives the config: merge it into one that has them"
            )


def _language(model: Checkpoint) -> Layout:
    """Where the tensors stand that text runs through. Raises ModelError."""
    return _clear(_own(model.parts, str(model.path)), str(model.path))


@lru_cache(maxsize=4)  # the candidates of a search mostly have the same names
def _part(names: tuple[str, ...], model: str) -> Layout:
    """The same, among all names of a model's tensors."""
    return _clear(_own(split(names), model), model)


def _clear(layout: Layout, model: str) -> Layout:
    if layout.unclear:
        raise ModelError(f"model '{model}': {layout.unclear}")
    return layout


def _own(parts: Mapping[str, T], model: str) -> T:
    """Of a model's parts the one that text runs through: its only one, or its text decoder."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    if _DECODER not in parts:
        raise ModelError(
            f"model '{model}': of its parts ({', '.join(parts)}) none is a language model: choose "
            "models that continue a text"
        )
    return parts[_DECODER]


def _drop(model: torch.nn.Module, kept: Layout) -> None:
    """Free the parameters of all other parts: no text meets them."""
    for name, value in model.named_parameters():
        if name not in kept.places:
            value.data = value.data.new_empty(0)
