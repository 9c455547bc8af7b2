"""Calibration: what a model's layers see while text runs through it.

The wiring between a recipe that needs statistics and where they are kept (`merge.statistics`).
transformers is loaded only where a model has to be run. Knows nothing of merging.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evomerge.errors import InputError, ModelError, RecipeError
from evomerge.layout import split
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.statistics import ACTIVATION_MEAN, Origin, Statistics, recall
from evomerge.messages import one_line
from evomerge.recipe import Recipe

_log = logging.getLogger(__name__)

_BATCH = 4096  # tokens that run through a model at once, where there is memory for them
_PIECE = 1 << 16  # characters of plain text that are tokenised at once

Progress = Callable[[int, int], None]  # told how many blocks are done, and of how many


def statistics_for(
    recipe: Recipe,
    models: Mapping[str, Checkpoint],
    device: torch.device,
    progress: Progress = lambda done, blocks: None,
) -> dict[str, Statistics]:
    """The statistics that a recipe needs, by model: of each base under `aim`, else none.

    Kept ones are used, whatever device they were measured on; a model is loaded and run only where
    there are none. The calibration file's path is relative to the working directory, as those of
    models are. Raises InputError for a file that cannot be used, and what `measure` raises.
    """
    aim = recipe.aim
    if aim is None:
        return {}
    path = Path(aim.calibration)
    content = content_sha(path)
    found = {}
    for name in _bases(recipe):
        model = models[name]
        if model.plain:
            raise RecipeError(f"aim: '{name}' is a plain state dict: no text runs through it")
        origin = Origin(ACTIVATION_MEAN, model.sha, content, aim.blocks, aim.tokens)
        run = partial(measure, model, path, aim.blocks, aim.tokens, device, progress)
        found[name] = recall(origin, run)
    return found


def content_sha(calibration: Path) -> str:
    """SHA-256 of a calibration file. Raises InputError."""
    try:
        with calibration.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(calibration, error) from None


def _bases(recipe: Recipe) -> list[str]:
    """The base of every slice, or of the whole."""
    bodies = [recipe] if recipe.modules is None else list(recipe.modules.values())
    names = [
        base
        for body in bodies
        for base in ([s.base_model for s in body.slices] if body.slices else [None])
    ]
    return [name for name in dict.fromkeys(n or recipe.base_model for n in names) if name]


def measure(
    model: Checkpoint,
    calibration: Path,
    blocks: int,
    tokens: int,
    device: torch.device,
    progress: Progress = lambda done, blocks: None,
) -> Statistics:
    """The mean magnitude of each input channel of each linear layer (see ACTIVATION_MEAN), over
    the first `blocks` blocks of `tokens` tokens.

    calibration: a text file, or one of JSON lines (.jsonl) whose records have a 'text', or a
    'prompt' and an 'answer' that follows it. Records, and runs of lines of plain text, are
    tokenised one by one as the model's tokenizer does it, special tokens included, joined, and cut
    into blocks; what is left over is not read. Fewer blocks are taken with a warning.

    The model runs in its own dtype, sums are in float64. Layers that no token enters, and weights
    that transformers fuses or that are no layer's own matrix (experts), have no statistics.
    Raises InputError where the file cannot be read or has less than one block, or memory is short,
    and ModelError where transformers cannot run the model or its activations are no numbers.
    """
    from evomerge.engine.model import open_whole  # takes seconds to load

    try:
        live, tokenizer = open_whole(model, device)
        limit = getattr(live.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise RecipeError(
                f"aim.tokens: {tokens} is more than the {limit} positions of '{model.path}': "
                f"give {limit} at most"
            )
        ids = _blocks(calibration, tokenizer, blocks, tokens)
        with _Listener(live) as listener:
            _run(live, listener, ids.to(device), progress)
    except torch.OutOfMemoryError:
        raise InputError(
            f"model '{model.path}' and {tokens} tokens of text do not fit on {device}: lower "
            "aim.tokens, or compute on the cpu"
        ) from None
    means = listener.means()
    for name, mean in means.items():
        if not mean.isfinite().all():
            raise ModelError(f"model '{model.path}': what enters '{name}' is not finite numbers")
    stored = _stored_names(live, model)
    values = {
        (ACTIVATION_MEAN, stored[name]): mean for name, mean in means.items() if name in stored
    }
    return Statistics(values)


class _Listener:
    """Adds up the magnitudes of what enters the linear layers of a live model, by the name of
    their weight; inside `with`."""

    def __init__(self, live: Any) -> None:
        self._totals: dict[str, tuple[Tensor, int]] = {}
        self._batch: dict[str, tuple[Tensor, int]] = {}
        self._head = live.get_output_embeddings()
        self._linear = {f"{n}.weight": m for n, m in live.named_modules() if _is_linear(m)}
        self._rows = {name for name, m in self._linear.items() if _is_transposed(m)}

    def __enter__(self) -> "_Listener":
        self._handles = [
            module.register_forward_pre_hook(partial(self._hear, name), with_kwargs=True)
            for name, module in self._linear.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hear(
        self, name: str, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]
    ) -> Any:
        (entering,) = (*args, *kwargs.values())
        flat = entering.flatten(0, -2)
        _add(self._batch, name, flat.abs().sum(dim=0, dtype=torch.float64), len(flat))
        if module is self._head:  # nobody reads the logits, and they are large
            return (entering[..., :1, :],), {}
        return None

    def forget(self) -> None:
        """Leave out what entered since the last `keep`."""
        self._batch = {}

    def keep(self) -> None:
        """Count what entered since the last time."""
        for name, (sums, count) in self._batch.items():
            _add(self._totals, name, sums, count)
        self._batch = {}

    def means(self) -> dict[str, Tensor]:
        """By weight, shaped to broadcast against it: float32, on the CPU."""
        means = {n: (s / count).float().cpu() for n, (s, count) in self._totals.items() if count}
        return {n: mean[:, None] if n in self._rows else mean for n, mean in means.items()}


def _add(sums: dict[str, tuple[Tensor, int]], name: str, more: Tensor, count: int) -> None:
    if name in sums:
        before, counted = sums[name]
        more, count = before + more, counted + count
    sums[name] = more, count


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or _is_transposed(module)


def _is_transposed(module: torch.nn.Module) -> bool:
    """GPT-2's kind of linear layer, whose weight is (inputs, outputs)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _run(live: Any, listener: _Listener, ids: Tensor, progress: Progress) -> None:
    """Run all blocks, as many at once as there is memory for."""
    count, tokens = ids.shape
    rows = max(1, _BATCH // tokens)
    done = 0
    while done < count:
        try:
            with torch.inference_mode():
                live(input_ids=ids[done : done + rows], use_cache=False)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
            listener.forget()
            rows //= 2
            continue
        listener.keep()
        done = min(count, done + rows)
        progress(done, count)


def _blocks(calibration: Path, tokenizer: Any, blocks: int, tokens: int) -> Tensor:
    """Token numbers, (blocks, tokens)."""
    ids: list[int] = []
    for text in _texts(calibration):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= blocks * tokens:
            break
    found = min(blocks, len(ids) // tokens)
    if found == 0:
        raise InputError(
            f"calibration file '{calibration}' has {len(ids)} tokens, less than a block of "
            f"{tokens}: give more text, or lower aim.tokens"
        )
    if found < blocks:
        _log.warning(
            "calibration file '%s' is enough for %d blocks of %d tokens, not for %d",
            calibration,
            found,
            tokens,
            blocks,
        )
    return torch.tensor(ids[: found * tokens]).view(found, tokens)


def _texts(calibration: Path) -> Iterator[str]:
    try:
        with calibration.open(encoding="utf-8") as file:
            if calibration.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _record_text(line, f"calibration file '{calibration}' line {number}")
            else:
                while lines := file.readlines(_PIECE):
                    yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(calibration, error) from None


def _record_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        raise InputError(f"{where} is not JSON: give one record in each line") from None
    for keys in (("text",), ("prompt", "answer")):
        if isinstance(record, dict) and all(isinstance(record.get(key), str) for key in keys):
            return "".join(record[key] for key in keys)
    raise InputError(f"{where} has no text: give it a 'text', or a 'prompt' and an 'answer'")


def _unreadable(calibration: Path, error: Exception) -> InputError:
    return InputError(f"calibration file '{calibration}' cannot be read: {one_line(error)}")


def _stored_names(live: Any, model: Checkpoint) -> dict[str, str]:
    """What the model's files call a live tensor, where one of the same shape stands in its place:
    transformers puts other words before some names, and fuses some tensors."""
    shapes = {name: tuple(value.shape) for name, value in live.state_dict().items()}
    found = {}
    for part, layout in split(shapes).items():
        there = model.parts[part].index if part in model.parts else {}
        for at, name in layout.index.items():
            stored = name if name in model.headers else there.get(at)
            if stored is not None and model.headers[stored].shape == shapes[name]:
                found[name] = stored
    return found
