"""The engine on vLLM, on CPU or CUDA, in processes of its own.

One `vllm.LLM` lives as long as it can: recipes go to its workers, which merge there (see
`vllm_worker`). It starts again where a recipe needs layers that it has no room for, and where it
died. Nothing of vLLM is imported before the first engine is made.
"""

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import InvalidStateError
from contextlib import contextmanager, suppress
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, TypeVar

from evomerge import errors
from evomerge.engine import BrokenModel, Generation, Likelihood, Prompt, Reply
from evomerge.engine.fitting import Wanted, judged, written
from evomerge.engine.texts import Texts, Tokens, open_config
from evomerge.errors import EvomergeError, InputError, ModelError
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.depth import layer_config
from evomerge.merge.device import named_device
from evomerge.messages import one_line
from evomerge.recipe import Recipe
from evomerge.seeds import derive

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CACHE_GB = 1.0  # of a CPU's memory
_SPARE = 1.25  # of the slots, where a recipe is deeper: the next may be deeper yet
_ROWS = 256  # in one forward; vLLM itself sees to the memory
_LEAVE = 2.0  # seconds for its processes to end in order; then they are killed, and lose nothing

_WORKER = "evomerge.engine.vllm_worker.MergeWorker"

# Of the processes that vLLM starts. Spawned, for forks of a process with threads may hang.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


class VllmEngine:
    """See Engine. Requests of any length run together; vLLM batches them as they come.

    Nothing is merged ahead: vLLM's worker computes or merges, one call after the other, and its
    memory beside the parents is the KV cache's.
    """

    merges_ahead = False

    def __init__(
        self, section: EngineSection, models: Mapping[str, Checkpoint], first: str
    ) -> None:
        self._vllm = _imported()
        self._dead: type[Exception] = self._vllm.v1.engine.exceptions.EngineDeadError
        self._section = section
        self._models = models
        self._first = first
        self._llm: Any = None
        self._texts = Texts(models[first].path, first, section.context)
        self._device = _checked_device(section)
        _check_models(models, first)
        if self._device == "cpu":
            _check_heads(models[first], first)
        self._slots = layer_kinds(models)[first]
        self._recipe: Recipe | None = None
        self._spoiled = self._broken = False
        self._start()

    # -- the processes -----------------------------------------------------------------------------

    def _start(self) -> None:
        """Start vLLM with the slots that there are to be, and open the parents in its workers."""
        self._stop()
        section, model = self._section, self._models[self._first]
        dtype = dtype_name(model.dtype) if section.dtype == "auto" else section.dtype
        memory = section.cache_gb or (_CACHE_GB if self._device == "cpu" else None)
        with TemporaryDirectory(prefix="evomerge-") as folder, self._environment():
            config = _config(model, self._slots, has_head(self._models, self._device))
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            try:
                self._llm = self._vllm.LLM(
                    model=folder,
                    tokenizer=str(model.path),
                    load_format="dummy",
                    generation_config="vllm",
                    dtype=dtype,
                    max_model_len=self._texts.context,
                    max_num_seqs=_ROWS if section.batch_size == "auto" else section.batch_size,
                    enforce_eager=section.eager,
                    tensor_parallel_size=section.tensor_parallel,
                    gpu_memory_utilization=section.gpu_memory,
                    kv_cache_memory_bytes=int(memory * 1e9) if memory else None,
                    device_ids=_device_ids(section),
                    worker_extension_cls=_WORKER,
                    disable_log_stats=True,
                )
            except Exception as error:  # whatever it raises, here or in its processes
                failure = one_line(error)
            gc.collect()  # of what a failed one leaves
        if self._llm is None:
            raise ModelError(
                f"model '{self._first}': vLLM does not start with it: {failure}; "
                "VLLM_LOGGING_LEVEL=ERROR shows more"
            )
        core = self._llm.llm_engine.engine_core
        Thread(target=_watch, args=(core, self._dead()), daemon=True).start()
        self._spoiled = False
        uris = {name: model.uri for name, model in self._models.items()}
        try:
            self._call("follow", os.getpid())
            self._call("open_parents", uris, self._first, self._slots)
        except self._dead:
            self._stop()
            raise ModelError(
                f"model '{self._first}': vLLM's process died over the parents; "
                "VLLM_LOGGING_LEVEL=ERROR shows more"
            ) from None
        except EvomergeError:
            self._stop()
            raise

    def _stop(self) -> None:
        if self._llm is None:
            return
        core = self._llm.llm_engine.engine_core
        self._llm = None
        core.shutdown(timeout=_LEAVE)
        core.output_queue_thread.join()
        core.ctx.destroy(linger=0)  # which it leaves open
        gc.collect()

    @contextmanager
    def _environment(self) -> Iterator[None]:
        """What vLLM reads from the environment as it starts, and its children inherit."""
        wanted = dict(_ENVIRONMENT)
        if self._section.threads != "auto":
            wanted["OMP_NUM_THREADS"] = str(self._section.threads)
            wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else it counts the cores itself
        if self._section.eager and self._device == "cpu":
            wanted["TORCHDYNAMO_DISABLE"] = "1"  # or small helpers take a compiler most of a minute
        before = {key: os.environ.get(key) for key in wanted}
        os.environ.update(wanted)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value

    def _call(self, method: str, *given: Any) -> Any:
        """Ask all workers, and give what the first one says; raise what one of them says."""
        try:
            answers = self._llm.collective_rpc(method, args=given)
        except self._dead:
            raise
        except Exception as error:  # its worker died, or failed in a way that nobody foresaw
            _log.warning("engine: %s", one_line(error))
            raise self._dead() from None
        for answer in answers:
            if "error" in answer:
                self._spoiled |= answer.get("spoiled", False)
                raise getattr(errors, answer["error"])(answer["message"])
        return answers[0]["value"]

    def _surviving(self, call: Callable[[], T]) -> T:
        """The result of a call, made again in a new engine if the one that there is dies. Raises
        BrokenModel if that one dies too."""
        try:
            return call()
        except self._dead:
            _log.warning("engine: vLLM's process died; it is started again")
        try:
            self._start()
        except ModelError as error:  # which would be taken for the candidate's fault
            raise EvomergeError(str(error)) from None
        try:
            if self._recipe is not None:
                self._load(self._recipe)
            return call()
        except self._dead:
            self._spoiled = True
            raise BrokenModel(
                "vLLM's process died twice with this model; VLLM_LOGGING_LEVEL=ERROR shows why"
            ) from None

    def close(self) -> None:
        """See Engine."""
        self._stop()

    # -- the model ---------------------------------------------------------------------------------

    def load(self, recipe: Recipe) -> None:
        """See Engine."""
        self._recipe = None
        try:
            self._surviving(lambda: self._load(recipe))
        except BrokenModel as error:
            raise ModelError(str(error)) from None
        self._recipe = recipe

    def prepare(self, recipe: Recipe) -> bool:
        """See Engine."""
        return False

    def _load(self, recipe: Recipe) -> None:
        if self._spoiled:
            self._start()
        found = self._call("load_recipe", recipe.to_dict())
        if "slots" in found:
            before, self._slots = self._slots, found["slots"]
            if found["spare"] and len(self._slots) > len(before):
                more = math.ceil(_SPARE * len(before)) - len(self._slots)
                self._slots = self._slots + self._slots[:1] * more
            try:
                self._start()
            except ModelError:  # so many layers do not fit
                self._slots, self._spoiled = before, True
                raise
            found = self._call("load_recipe", recipe.to_dict())
            if "slots" in found:
                raise ModelError("vLLM has no place for the layers of this recipe")
        self._broken = not found["finite"]
        if not self._llm.reset_prefix_cache():
            raise EvomergeError("engine: vLLM does not forget the prompts of the model before")

    # -- texts -------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[tuple[Reply, ...]]:
        """See Engine."""

        def write(wanted: list[Wanted]) -> list[Reply]:
            requests = []
            for one in wanted:
                seed = derive(how.seed, f"draw/{one.text}", one.sample) if how.temperature else None
                requests.append((one.tokens, self._sampling(how, one.room, seed)))
            return self._written(requests, how.stop)

        return written(self._texts, prompts, how, write)

    def _sampling(self, how: Generation, most: int, seed: int | None) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=most,
            temperature=how.temperature,
            top_p=how.top_p if how.temperature else 1.0,
            seed=seed,
            stop=list(how.stop),
            stop_token_ids=sorted(self._texts.ends),
            ignore_eos=True,  # it is among the stop tokens
            logprobs=0,  # of the written tokens: they tell whether the model is broken
            flat_logprobs=True,
            detokenize=bool(how.stop),
        )

    def _written(self, requests: list[tuple[Tokens, Any]], stop: Sequence[str]) -> list[Reply]:
        """The replies to prompts that were given as tokens."""
        outputs = self._run(requests)
        for output in outputs:
            if not math.isfinite(output.outputs[0].cumulative_logprob):
                raise BrokenModel(_NOT_FINITE)
        replies = [self._texts.reply(list(o.outputs[0].token_ids), stop) for o in outputs]
        # vLLM decodes token by token, and may see a stop text where the whole has none.
        early = [
            i
            for i, output in enumerate(outputs)
            if isinstance(output.outputs[0].stop_reason, str) and replies[i].truncated
        ]
        again = [(tokens, sampling.clone()) for tokens, sampling in (requests[i] for i in early)]
        for _, sampling in again:
            sampling.stop = []
        for i, reply in zip(early, self._written(again, stop) if again else [], strict=True):
            replies[i] = reply
        return replies

    def likelihoods(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool = True
    ) -> list[Likelihood]:
        """See Engine."""
        ends = self._texts.ends if ended else frozenset[int]()

        def judge(asked: list[tuple[Tokens, Tokens]]) -> list[Likelihood]:
            # The last target is never an input: its likelihood is that of what would come next.
            requests = [([*p, *t[:-1]], self._judging(t)) for p, t in asked]
            outputs = zip(self._run(requests), asked, strict=True)
            return [_judged(output, target, ends) for output, (_, target) in outputs]

        return judged(self._texts, pairs, ended, judge)

    def _judging(self, target: Tokens) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=1 if len(target) > 1 else None,
            logprob_token_ids=target[-1:],
            detokenize=False,
        )

    def _run(self, requests: list[tuple[Tokens, Any]]) -> list[Any]:
        """vLLM's outputs, in the order of the requests."""
        if self._broken:
            raise BrokenModel(_NOT_FINITE)
        if not requests:
            return []
        prompts = [{"prompt_token_ids": tokens} for tokens, _ in requests]
        sampling = [params for _, params in requests]
        outputs: list[Any] = self._surviving(
            lambda: self._llm.generate(prompts, sampling, use_tqdm=False)
        )
        return outputs


_NOT_FINITE = "the merged model's outputs are not finite numbers"


def _judged(output: Any, target: Tokens, ends: frozenset[int]) -> Likelihood:
    """ends: any of them at the last place would have ended the answer."""
    (best,) = output.outputs[0].token_ids
    last = output.outputs[0].logprobs[0][target[-1]].logprob
    places = output.prompt_logprobs[1 - len(target) :] if len(target) > 1 else []
    values = [place[token].logprob for place, token in zip(places, target, strict=False)]
    if not all(map(math.isfinite, [*values, last])):
        raise BrokenModel(_NOT_FINITE)
    greedy = all(
        min(place, key=lambda token: place[token].rank) == token
        for place, token in zip(places, target, strict=False)
    )
    ended = best == target[-1] or best in ends
    return Likelihood((*values, last), greedy and ended)


def _watch(core: Any, dead: Exception) -> None:
    """Wait until a process of the engine's ends, and tell whoever waits for what it was asked:
    vLLM's own client waits for ever. core: that client."""
    connection.wait([process.sentinel for process in core.resources.engine_manager.processes])
    core.resources.engine_dead = True  # before the calls that wait now are looked up
    core.outputs_queue.put_nowait(dead)
    for future in list(core.utility_results.values()):
        with suppress(InvalidStateError):
            future.set_exception(dead)


def layer_kinds(models: Mapping[str, Checkpoint]) -> dict[str, list[str]]:
    """What each layer of each model is, where the architecture has several kinds; else ''."""
    kinds: dict[str, list[str]] = {}
    for name, model in models.items():
        found = getattr(open_config(model.path).get_text_config(), "layer_types", None)
        kinds[name] = list(found or [""] * model.layout.layers)
    return kinds


def has_head(models: Mapping[str, Checkpoint], device: str) -> bool:
    """Whether the live model has a head of its own: where one of the models has, and on a CPU,
    where vLLM would pack a tied one once and never again."""
    if device == "cpu":
        return True
    places = (place for model in models.values() for place in model.layout.places.values())
    return any(place.module == "head" for place in places)


def _imported() -> Any:
    """vLLM, quiet. Raises ModelError where it is not installed."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import vllm
            import vllm.v1.engine.exceptions
    except ImportError as error:
        raise ModelError(
            f"engine.kind: vllm: vLLM cannot be loaded: {one_line(error)}: "
            "pip install 'evomerge[vllm]'"
        ) from None
    return vllm


def _checked_device(section: EngineSection) -> str:
    """What the installed vLLM runs on: cpu or cuda. Raises InputError if that is not the section's
    device."""
    from vllm.platforms import current_platform

    runs_on: str = current_platform.device_type
    if runs_on == "cpu" and not section.eager:
        raise InputError(
            "engine.eager: false: on a CPU compiled code keeps the tensors of the first merge: "
            "leave it out"
        )
    if section.device != "auto":
        device = named_device(section.device, "engine.device")
        if device.type != runs_on:
            raise InputError(
                f"engine.device: '{section.device}': the installed vLLM runs on {runs_on}: give "
                f"{runs_on} or auto"
            )
    return runs_on


def _device_ids(section: EngineSection) -> list[int] | None:
    """The GPUs to use, where one is named: it and those that follow it."""
    _, _, index = section.device.partition(":")
    return [int(index) + i for i in range(section.tensor_parallel)] if index else None


def _check_models(models: Mapping[str, Checkpoint], first: str) -> None:
    """Raises ModelError for what does not run here, though transformers may run it."""
    for name, model in models.items():
        if len(model.parts) > 1:
            raise ModelError(
                f"model '{name}' has parts ({', '.join(model.parts)}): vLLM runs it whole and the "
                "merge has its text decoder alone: choose engine.kind: transformers"
            )
    counted = open_config(models[first].path).get_text_config().num_hidden_layers
    if counted != models[first].layout.layers:
        raise ModelError(
            f"model '{first}' has {models[first].layout.layers} layers in its files and {counted} "
            "in config.json: correct the config"
        )


def _check_heads(model: Checkpoint, name: str) -> None:
    """On a CPU vLLM finds out with the first prompt, and dies."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = open_config(model.path).get_text_config()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if size not in sizes:
        raise ModelError(
            f"model '{name}': its attention heads have {size} values, and vLLM on a CPU runs "
            f"{', '.join(map(str, sizes))}: choose engine.kind: transformers"
        )


def _config(model: Checkpoint, slots: Sequence[str], head: bool) -> dict[str, Any]:
    """config.json of a model with other layers: each slot's is like one of its own, of its kind."""
    (kinds,) = layer_kinds({"": model}).values()
    alike = [i if kinds[i : i + 1] == [kind] else kinds.index(kind) for i, kind in enumerate(slots)]
    changed = layer_config({"": model.config}, [("", layer) for layer in alike], "")
    return {**model.config, **changed, "tie_word_embeddings": not head}
