"""The engine on Hugging Face transformers, on CPU or CUDA.

One model object lives as long as the engine; `load` writes a merge into its parameters. Recipes of
another depth re-use the layers that are there and add shells where the stack is deeper. Of a model
that also sees only the text decoder has values, and only text runs through it.
"""

import bisect
import copy
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.initialization import no_init_weights

from evomerge.engine import BrokenModel, Likelihood, Reply
from evomerge.engine.calibration import statistics_for
from evomerge.errors import ModelError
from evomerge.job import Engine as EngineSection
from evomerge.layout import Layout, split
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.device import named_device
from evomerge.merge.live import Resident
from evomerge.merge.planner import make_plan
from evomerge.messages import one_line
from evomerge.recipe import Recipe

T = TypeVar("T")

_DECODER = "text_decoder"

_log = logging.getLogger(__name__)


class TransformersEngine:
    """See Engine. Batches are sorted by length, so that little is padded."""

    def __init__(
        self, section: EngineSection, models: Mapping[str, Checkpoint], first: str
    ) -> None:
        if section.threads != "auto":
            torch.set_num_threads(section.threads)
        self._device = named_device(section.device, "engine.device")
        self._batch_size = section.batch_size
        self._models = models
        stored = _language(models[first])
        _check_parts(models, first)
        dtype = models[first].dtype if section.dtype == "auto" else getattr(torch, section.dtype)
        self._tokenizer = _tokenizer(models[first].path)
        self._model = _empty_model(models[first], dtype)
        live = _part(tuple(self._parameters), first)
        _drop(self._model, live)
        self._model = self._model.to(self._device).eval()
        self._resident = Resident(models, self._device)  # in the room that the model leaves
        self._kinds = _kinds(models)
        self._shells: dict[str, list[torch.nn.Module]] = {}
        layers = list(self._model.get_submodule(live.prefix)) if live.prefix else []
        if len(layers) != stored.layers:
            raise ModelError(
                f"model '{first}' has {stored.layers} layers in its files and "
                f"{len(layers)} in config.json: correct the config"
            )
        for kind, layer in zip(self._kinds[first], layers, strict=True):
            self._shells.setdefault(kind, []).append(layer)
        self._prefix = live.prefix
        self._end = self._tokenizer.eos_token_id
        if self._end is None:
            raise ModelError(f"model '{first}': its tokenizer has no end-of-sequence token")
        pad = self._tokenizer.pad_token_id
        self._pad = self._end if pad is None else pad
        self._told = (0, 0)
        if len(models[first].parts) > 1:
            self._check_text_runs(first)

    def load(self, recipe: Recipe) -> None:
        """See Engine."""
        statistics = statistics_for(recipe, self._models, self._device)
        plan = make_plan(recipe, self._models, statistics=statistics)
        self._set_layers(_own(plan.layers, plan.donor))
        stored = _part(tuple(tensor.name for tensor in plan.tensors), plan.donor)
        live = _part(tuple(self._parameters), plan.donor)
        self._set_head(stored, live)
        values = self._parameters
        named = {
            stored.index[at]: values[name] for at, name in live.index.items() if at in stored.index
        }
        tensors = tuple(tensor for tensor in plan.tensors if tensor.name in stored.places)
        self._resident.write(replace(plan, tensors=tensors), named)
        self._tell_what_is_streamed()
        written = {named[t.name].data_ptr() for t in tensors if t.name in named}
        for name, value in self._model.named_parameters(remove_duplicate=False):
            if name in live.places and value.data_ptr() not in written:
                raise ModelError(f"the models have no tensor '{name}', which their config asks for")

    def _check_text_runs(self, first: str) -> None:
        """Whether a model that also sees runs on text alone, and reads it in one direction: where a
        token sees those after it, nothing that is measured by one forward is true."""
        whole = {"merge_method": "passthrough", "models": [{"model": first}]}
        self.load(Recipe.from_dict(whole))
        rows = [[self._end, 0], [self._end, 1]]
        try:
            one, other = self._logits(rows, 2)[:, 0].float()
            self._continued(rows, 2)
        except Exception as error:  # whatever its code raises where it misses an image
            raise ModelError(
                f"model '{first}': it does not run on text alone: {one_line(error)}"
            ) from None
        if (one - other).abs().max() > 0.01 * one.abs().max():
            raise ModelError(
                f"model '{first}': its tokens see those that follow them: as a language model it "
                "cannot be scored"
            )

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
        return dict(self._model.named_parameters(remove_duplicate=False)) | dict(
            self._model.named_buffers()
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
        setattr(self._model.get_submodule(owner), name, torch.nn.ModuleList(stack))
        config = self._model.config.get_text_config()
        config.num_hidden_layers = len(stack)
        if getattr(config, "layer_types", None):
            config.layer_types = kinds

    def _set_head(self, stored: Layout, live: Layout) -> None:
        """Give the head a tensor of its own if one is stored, else that of the embeddings."""
        head, embeddings = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        if head is None:
            return
        owner = next(name for name, module in self._model.named_modules() if module is head)
        at = next(at for at, name in live.index.items() if name == f"{owner}.weight")
        if at not in stored.index:
            head.weight = embeddings.weight
        elif head.weight is embeddings.weight:
            head.weight = torch.nn.Parameter(torch.empty_like(embeddings.weight))

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Reply]:
        """See Engine."""
        if not prompts:
            return []
        encoded: list[list[int]] = self._tokenizer(list(prompts))["input_ids"]

        def run(batch: list[int]) -> list[Reply]:
            written = self._continued([encoded[i] for i in batch], max_new_tokens)
            return [self._reply(row, stop) for row in written]

        return self._in_batches([len(ids) for ids in encoded], run)

    def _continued(self, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """The tokens that follow each row, the most likely ones."""
        ids, mask = self._padded(rows)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                eos_token_id=self._end,
                pad_token_id=self._pad,
            )
        written: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return written

    def _reply(self, tokens: list[int], stop: Sequence[str]) -> Reply:
        ended = self._end in tokens
        if ended:
            tokens = tokens[: tokens.index(self._end)]
        text = self._text(tokens)
        cuts = [at for at in (text.find(s) for s in stop) if at >= 0]
        if not cuts:
            return Reply(text, not ended, len(tokens))

        def stopped(count: int) -> bool:
            begun = self._text(tokens[:count])
            return any(s in begun for s in stop)

        # Batches run on after a stop text; what was written by then is what the reply took.
        count = bisect.bisect_left(range(len(tokens)), True, key=stopped)
        return Reply(text[: min(cuts)], False, count)

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[Likelihood]:
        """See Engine."""
        if not pairs:
            return []
        prompts: list[list[int]] = self._tokenizer([p for p, _ in pairs])["input_ids"]
        answers: list[list[int]] = self._tokenizer([a for _, a in pairs], add_special_tokens=False)[
            "input_ids"
        ]
        targets = [[*answer, self._end] for answer in answers]
        # The last target is never an input: nothing is predicted from it.
        rows = [p + t[:-1] for p, t in zip(prompts, targets, strict=True)]

        def run(batch: list[int]) -> list[Likelihood]:
            longest = max(len(targets[i]) for i in batch)
            logits = self._logits([rows[i] for i in batch], longest)
            return _judged(logits.float(), [targets[i] for i in batch])

        return self._in_batches([len(row) for row in rows], run)

    def _logits(self, rows: list[list[int]], last: int) -> torch.Tensor:
        """At the `last` positions of each row: (rows, positions, vocabulary)."""
        ids, mask = self._padded(rows)
        with torch.inference_mode():
            logits: torch.Tensor = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=last,
            ).logits
        return logits

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, (rows, longest), padded on the left."""
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self._device), mask.to(self._device)

    def _in_batches(self, lengths: list[int], run: Callable[[list[int]], list[T]]) -> list[T]:
        """Run over positions sorted by length, and give the results in the original order."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        results: dict[int, T] = {}
        for batch in _chunks(order, self._batch_size):
            results |= dict(zip(batch, run(batch), strict=True))
        return [results[i] for i in range(len(lengths))]

    def close(self) -> None:
        """See Engine."""
        del self._model, self._resident, self._shells
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _judged(logits: torch.Tensor, targets: list[list[int]]) -> list[Likelihood]:
    """logits: (rows, longest target, vocabulary), aligned to the right."""
    longest = logits.shape[1]
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in targets], device=logits.device)
    lengths = torch.tensor([len(t) for t in targets], device=logits.device)
    real = torch.arange(longest, device=logits.device) >= longest - lengths[:, None]
    chosen = logits.log_softmax(dim=-1).gather(2, ids[:, :, None])[:, :, 0]
    greedy = ((logits.argmax(dim=-1) == ids) | ~real).all(dim=1)
    if not torch.isfinite(chosen[real]).all():
        raise BrokenModel("the merged model's outputs are not finite numbers")
    return [
        Likelihood(tuple(row[longest - len(target) :]), exact)
        for row, target, exact in zip(chosen.tolist(), targets, greedy.tolist(), strict=True)
    ]


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def open_whole(model: Checkpoint, device: torch.device) -> tuple[Any, Any]:
    """A model as it is in its files, not to be written to, and its tokenizer. Raises ModelError."""
    with torch.device("meta"):
        kind = type(_empty_model(model, model.dtype))
    try:
        live, report = kind.from_pretrained(
            None,
            config=_config(model.path),
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
    return live.to(device).eval(), _tokenizer(model.path)


def _tokenizer(path: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{path}': no usable tokenizer: {one_line(error)}") from None


def _empty_model(model: Checkpoint, dtype: torch.dtype) -> Any:
    """The architecture of a saved model; its tensors come with the first load."""
    config = _config(model.path)
    sees = len(model.parts) > 1 and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    try:
        # Nothing is drawn for tensors that are overwritten anyway; what an architecture draws all
        # the same must not move the process's own generator.
        with no_init_weights(), torch.random.fork_rng(devices=[]):
            return auto.from_config(config, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise ModelError(
            f"model '{model.path}': transformers cannot build it: {one_line(error)}"
        ) from None


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model '{path}': transformers cannot read its config: {one_line(error)}"
        ) from None


def _kinds(models: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """What each layer of each model is, where the architecture has several kinds; else ''."""
    kinds: dict[str, list[str]] = {}
    for name, model in models.items():
        found = getattr(_config(model.path).get_text_config(), "layer_types", None)
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
