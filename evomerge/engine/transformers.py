"""The engine on Hugging Face transformers, on CPU or CUDA."""

from collections.abc import Mapping, Sequence

import torch

from evomerge.engine import BrokenModel, Generation, Likelihood, Prompt, Reply
from evomerge.engine.batches import Batches, Row
from evomerge.engine.model import LiveModel
from evomerge.engine.sampling import Choice, Stopped, uniforms
from evomerge.engine.texts import Texts, Tokens
from evomerge.errors import ModelError
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.device import named_device
from evomerge.messages import one_line
from evomerge.recipe import Recipe


class TransformersEngine:
    """See Engine. Batches are sorted by length, so that little is padded."""

    def __init__(
        self, section: EngineSection, models: Mapping[str, Checkpoint], first: str
    ) -> None:
        if section.threads != "auto":
            torch.set_num_threads(section.threads)
        self._device = named_device(section.device, "engine.device")
        self._texts = Texts(models[first].path, first, section.context)
        dtype = None if section.dtype == "auto" else getattr(torch, section.dtype)
        self._live = LiveModel(models, first, self._device, dtype)
        most = None if section.batch_size == "auto" else section.batch_size
        self._batches = Batches(self._device, most, self._live.footprint, self._live.forget)
        if len(models[first].parts) > 1:
            self._check_text_runs(first)

    def load(self, recipe: Recipe) -> None:
        """See Engine."""
        self._live.load(recipe)

    def _check_text_runs(self, first: str) -> None:
        """Whether a model that also sees runs on text alone, and reads it in one direction: where a
        token sees those after it, nothing that is measured by one forward is true."""
        whole = {"merge_method": "passthrough", "models": [{"model": first}]}
        self.load(Recipe.from_dict(whole))
        rows = [[self._texts.end, 0], [self._texts.end, 1]]
        try:
            one, other = self._logits(rows, 2)[:, 0].float()
            self._continued(rows, 2, Generation(2), None)
        except Exception as error:  # whatever its code raises where it misses an image
            raise ModelError(
                f"model '{first}': it does not run on text alone: {one_line(error)}"
            ) from None
        if (one - other).abs().max() > 0.01 * one.abs().max():
            raise ModelError(
                f"model '{first}': its tokens see those that follow them: as a language model it "
                "cannot be scored"
            )

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[tuple[Reply, ...]]:
        """See Engine."""
        encoded = self._texts.prompts(prompts)
        samples = how.samples if how.temperature else 1  # all would be the same
        asked = [(i, sample) for i in range(len(prompts)) for sample in range(samples)]
        room = [self._room(len(encoded[i]), how.max_new_tokens) for i, _ in asked]
        fits = [at for at, new in enumerate(room) if new > 0]
        rows = [Row(len(encoded[asked[at][0]]) + room[at], 1, room[at]) for at in fits]

        def run(batch: list[int]) -> list[Reply]:
            chosen = [asked[fits[i]] for i in batch]
            steps = rows[batch[0]].written
            draws = None
            if how.temperature:
                named = [(self._texts.written(prompts[i]), sample) for i, sample in chosen]
                draws = uniforms(how, named, steps)
            written = self._continued([encoded[i] for i, _ in chosen], steps, how, draws)
            return [self._texts.reply(row, how.stop) for row in written]

        found = dict(zip(fits, self._batches.run(rows, run), strict=True))
        overlong = Reply("", False, 0, overlong=True)
        replies = [found.get(at, overlong) for at in range(len(asked))]
        copies = how.samples // samples
        return [
            tuple(replies[i * samples : (i + 1) * samples]) * copies for i in range(len(prompts))
        ]

    def _room(self, prompt: int, wanted: int) -> int:
        """How many tokens may follow a prompt of so many."""
        context = self._texts.context
        return wanted if context is None else min(wanted, context - prompt)

    def _continued(
        self, rows: list[Tokens], steps: int, how: Generation, draws: torch.Tensor | None
    ) -> list[Tokens]:
        """The tokens that follow each row, at most `steps`. draws: see Choice."""
        ids, mask = self._padded(rows)
        width = ids.shape[1]
        with torch.inference_mode():
            output = self._live.run.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=steps,
                do_sample=False,
                num_beams=1,
                eos_token_id=sorted(self._texts.ends_for(how.stop)),
                pad_token_id=self._texts.pad,
                logits_processor=[Choice(how, width, draws)],
                stopping_criteria=[Stopped(self._texts, how.stop, width)] if how.stop else [],
            )
        written: list[Tokens] = output[:, width:].tolist()
        return written

    def likelihoods(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool = True
    ) -> list[Likelihood]:
        """See Engine."""
        encoded = self._texts.pairs(pairs, ended)
        found: dict[int, Likelihood] = {}
        asked = []
        for at, (prompt, target) in enumerate(encoded):
            if self._room(len(prompt), len(target)) < len(target):
                found[at] = Likelihood((), False, overlong=True)
            elif not target:
                found[at] = Likelihood((), True)
            else:
                asked.append(at)
        # The last target is never an input: nothing is predicted from it.
        inputs = [[*encoded[at][0], *encoded[at][1][:-1]] for at in asked]
        targets = [encoded[at][1] for at in asked]
        rows = [Row(len(i), len(t)) for i, t in zip(inputs, targets, strict=True)]
        ends = self._texts.ends if ended else frozenset[int]()

        def run(batch: list[int]) -> list[Likelihood]:
            longest = max(len(targets[i]) for i in batch)
            logits = self._logits([inputs[i] for i in batch], longest)
            return _judged(logits.float(), [targets[i] for i in batch], ends)

        found |= dict(zip(asked, self._batches.run(rows, run), strict=True))
        return [found[at] for at in range(len(pairs))]

    def _logits(self, rows: list[Tokens], last: int) -> torch.Tensor:
        """At the `last` positions of each row: (rows, positions, vocabulary)."""
        ids, mask = self._padded(rows)
        with torch.inference_mode():
            logits: torch.Tensor = self._live.run(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=last,
            ).logits
        return logits

    def _padded(self, rows: list[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and attention mask, (rows, longest), padded on the left."""
        longest = max(len(row) for row in rows)
        pad = self._texts.pad
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        return ids.to(self._device), mask.to(self._device)

    def close(self) -> None:
        """See Engine."""
        del self._live, self._batches
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _judged(logits: torch.Tensor, targets: list[Tokens], ends: frozenset[int]) -> list[Likelihood]:
    """logits: (rows, longest target, vocabulary), aligned to the right. ends: any of them at the
    last place would have ended the answer."""
    longest = logits.shape[1]
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in targets], device=logits.device)
    lengths = torch.tensor([len(t) for t in targets], device=logits.device)
    real = torch.arange(longest, device=logits.device) >= longest - lengths[:, None]
    chosen = logits.log_softmax(dim=-1).gather(2, ids[:, :, None])[:, :, 0]
    best = logits.argmax(dim=-1)
    right = best == ids
    right[:, -1] |= torch.isin(best[:, -1], torch.tensor(sorted(ends), device=best.device))
    greedy = (right | ~real).all(dim=1)
    if not torch.isfinite(chosen[real]).all():
        raise BrokenModel("the merged model's outputs are not finite numbers")
    return [
        Likelihood(tuple(row[longest - len(target) :]), exact)
        for row, target, exact in zip(chosen.tolist(), targets, greedy.tolist(), strict=True)
    ]
