"""What runs inside vLLM's worker processes: the parents stay there, and only recipes come in.

A mixin of vLLM's worker class, called by name. Every worker of a tensor-parallel engine merges
whole tensors, of which vLLM's own loaders take its share. Knows nothing of texts.
"""

import atexit
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing import parent_process
from threading import Thread
from typing import Any

import torch

from evomerge.engine.calibration import statistics_for
from evomerge.engine.texts import open_config
from evomerge.engine.vllm import has_head, layer_kinds
from evomerge.engine.vllm_probe import At, Probe
from evomerge.errors import EvomergeError, ModelError
from evomerge.layout import Layout, infer
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.live import Resident
from evomerge.merge.plan import COPY, Plan, TensorPlan, compute
from evomerge.merge.planner import make_plan
from evomerge.merge.sources import open_model
from evomerge.messages import one_line
from evomerge.recipe import Recipe

# Plain data, which is all that vLLM carries between processes: `value`, or `error` (the name of
# an exception of evomerge's) with `message`. spoiled: the live model cannot be written to again.
Answer = dict[str, Any]


_HEAD: At = (None, "lm_head.weight")


class MergeWorker:
    """The calls that an engine makes; each gives an Answer."""

    _live: "_Live"

    def follow(self, driver: int) -> Answer:
        """End with the process that the engine was made in, however that ends: vLLM's would stay,
        and keep their memory. When it ends in order, it does so at once: taking all modules apart
        takes Python seconds, for which whoever starts the next engine would wait."""
        atexit.register(os._exit, 0)
        return _answered(lambda: Thread(target=_follow, args=(driver,), daemon=True).start())

    def open_parents(self, uris: Mapping[str, str], first: str, slots: Sequence[str]) -> Answer:
        """Open the models (by their names in recipes) that are merged into the live one, which has
        the config of `first` with a layer of each of these kinds."""

        def opened() -> None:
            models = {name: open_model(uri) for name, uri in uris.items()}
            self._live = _Live(self, models, first, slots)

        return _answered(opened)

    def load_recipe(self, recipe: Mapping[str, Any]) -> Answer:
        """Merge into the live model. The value: `finite`, whether all values are. Where the engine
        has no slots for these layers nothing is done, and the value is: `slots`, the kinds that
        there have to be, and `spare`, whether there may be more."""
        return _answered(lambda: self._live.load(Recipe.from_dict(recipe)))


def _follow(driver: int) -> None:
    with suppress(ProcessLookupError):  # it has ended already
        ended = os.pidfd_open(driver)
        select.select([ended], [], [])
    core = parent_process()  # of a worker with a process of its own; else the driver
    if core is not None and core.pid not in (None, driver) and core.pid == os.getppid():
        os.kill(core.pid, signal.SIGKILL)
    os._exit(1)


class _Spoiled(ModelError):
    """vLLM's loader has failed halfway."""


def _answered(call: Callable[[], Any]) -> Answer:
    try:
        return {"value": call()}
    except _Spoiled as error:
        return {"error": "ModelError", "message": str(error), "spoiled": True}
    except EvomergeError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except torch.OutOfMemoryError:
        message = "the merge does not fit into the memory that vLLM leaves: lower engine.gpu_memory"
        return {"error": "OutOfMemory", "message": message, "spoiled": True}


class _Live:
    """The live model of one worker, and the parents beside it."""

    def __init__(
        self, worker: Any, models: Mapping[str, Checkpoint], first: str, slots: Sequence[str]
    ) -> None:
        self._worker = worker
        self._run: torch.nn.Module = worker.model_runner.get_model()
        self._models = models
        self._resident = Resident(models, worker.device)  # in the room that vLLM leaves
        self._kinds = layer_kinds(models)
        self._slots = list(slots)
        self._layout = models[first].layout
        self._shapes = {
            key: models[first].headers[name].shape for (_, key), name in self._layout.index.items()
        }
        self._has_head = has_head(models, worker.device.type)
        self._embeddings = _embeddings(models[first])
        if self._has_head and self._embeddings is not None:
            self._shapes.setdefault(_HEAD[1], self._shapes[self._embeddings[1]])
        self._stack: Any = next((m for m in self._run.modules() if hasattr(m, "end_layer")), None)
        self._probe = Probe(self._run)

    def load(self, recipe: Recipe) -> dict[str, Any]:
        """See MergeWorker.load_recipe."""
        statistics = statistics_for(recipe, self._models, self._worker.device)
        plan = make_plan(recipe, self._models, statistics=statistics)
        (layers,) = plan.layers.values()
        kinds = [self._kinds[model][layer] for model, layer in layers]
        # Where the number of layers is compiled in, the slots have to be these and no more.
        elastic = self._stack is not None and self._worker.model_config.enforce_eager
        if kinds != (self._slots[: len(kinds)] if elastic else self._slots):
            return {"slots": kinds, "spare": elastic and len(set(kinds)) == 1}
        tensors = self._placed(plan)
        finite, wrong = self._swap(tensors, plan.seed, len(kinds))
        if wrong is not None:
            finite, wrong = self._swap(tensors, plan.seed, len(kinds))
        if wrong is not None:
            raise ModelError(
                f"tensor '{wrong}': vLLM did not take over the merged values, twice: choose "
                "engine.kind: transformers"
            )
        return {"finite": finite}

    def _placed(self, plan: Plan) -> dict[At, TensorPlan]:
        """What is written, by its place, layer by layer: so that vLLM, which finishes a module when
        it has all of its tensors, holds few at a time. Raises ModelError for what does not fit."""
        by_name = {tensor.name: tensor for tensor in plan.tensors}
        placed = {at: by_name[name] for at, name in infer(by_name).index.items()}
        if self._has_head and _HEAD not in placed and self._embeddings in placed:
            placed[_HEAD] = placed[self._embeddings]
        for (layer, key), tensor in list(placed.items()):
            shape = self._shapes.get(key)
            if shape is None and tensor.method == COPY:
                del placed[layer, key]  # buffers follow from the config
            elif shape is None:
                raise ModelError(f"the live model has no tensor '{tensor.name}'")
            elif shape != tensor.shape:
                raise ModelError(
                    f"tensor '{tensor.name}' is {list(tensor.shape)} in the merge and "
                    f"{list(shape)} in the live model: correct config.json of the models"
                )
        return dict(sorted(placed.items(), key=_order))

    def _swap(
        self, tensors: Mapping[At, TensorPlan], seed: int, depth: int
    ) -> tuple[bool, str | None]:
        """Merge, and hand each tensor to vLLM; whether all values are finite, and a tensor that
        vLLM did not take over."""
        finite = True
        self._probe.forget()

        def merged() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal finite
            for at, tensor in tensors.items():
                values = compute(tensor, self._resident, seed).whole()
                finite = finite and bool(torch.isfinite(values).all())
                self._probe.note(at, values)
                yield _name(at, self._layout), values

        try:
            with torch.no_grad():
                self._worker.reload_weights(weights_iterator=merged())
        except EvomergeError as error:
            raise _Spoiled(str(error)) from None
        except Exception as error:  # whatever an architecture's own loader raises
            raise _Spoiled(f"vLLM cannot load the merged tensors: {one_line(error)}") from None
        if self._stack is not None:
            self._stack.end_layer = self._stack.start_layer + depth
        # Of what is no number no column can be read: its outputs are none either.
        return finite, self._probe.wrong(depth) if finite else None


def _embeddings(model: Checkpoint) -> At | None:
    """Where those of the tokens stand, which a tied head shares."""
    words = open_config(model.path).get_text_config().vocab_size
    for at, name in model.layout.index.items():
        place, shape = model.layout.places[name], model.headers[name].shape
        if place.module == "embeddings" and shape[:1] == (words,):
            return at
    return None


def _order(item: tuple[At, TensorPlan]) -> tuple[int, str]:
    (layer, key), _ = item
    return -1 if layer is None else layer, key


def _name(at: At, layout: Layout) -> str:
    """What a tensor is called in files like the layout's, which may have fewer layers."""
    layer, key = at
    if layer is not None:
        return f"{layout.prefix}.{layer}.{key}"
    return layout.index.get(at, key)
