"""The engine on Hugging Face transformers, on CPU or CUDA."""

from collections.abc import Mapping, Sequence

import torch

from evomerge.engine import BrokenModel, Generation, Likelihood, Prompt, Reply
from evomerge.engine.batches import Batches, Row
from evomerge.engine.fitting import Wanted, judged, written
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
        ahead = section.merge_ahead
        self.merges_ahead = self._device.type == "cuda" if ahead == "auto" else ahead
        most = None if section.batch_size == "auto" else section.batch_size
        self._batches = Batches(self._device, most, self._live.footprint, self._live.forget)
        if len(models[first].parts) > 1:
            self._check_text_runs(first)

    def load(self, recipe: Recipe) -> None:
        """See Engine."""
        self._live.load(recipe)

    def prepare(self, recipe: Recipe) -> bool:
        """See Engine."""
        return self.merges_ahead and self._live.prepare(recipe)

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

        def write(wanted: list[Wanted]) -> list[Reply]:
            rows = [Row(len(one.tokens) + one.room, 1, one.room) for one in wanted]

            def run(batch: list[int]) -> list[Reply]:
                chosen = [wanted[i] for i in batch]
                steps = chosen[0].room
                draws = None
                if how.temperature:
                    draws = uniforms(how, [(one.text, one.sample) for one in chosen], steps)
                found = self._continued([one.tokens for one in chosen], steps, how, draws)
                return [self._texts.reply(row, how.stop) for row in found]

            return self._batches.run(rows, run)

        return written(self._texts, prompts, how, write)

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
        following: list[Tokens] = output[:, width:].tolist()
        return following

    def likelihoods(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool = True
    ) -> list[Likelihood]:
        """See Engine."""
        ends = self._texts.ends if ended else frozenset[int]()

        def judge(asked: list[tuple[Tokens, Tokens]]) -> list[Likelihood]:
            # The last target is never an input: nothing is predicted from it.
            inputs = [[*prompt, *target[:-1]] for prompt, target in asked]
            rows = [Row(len(i), len(t)) for i, (_, t) in zip(inputs, asked, strict=True)]

            def run(batch: list[int]) -> list[Likelihood]:
                targets = [asked[i][1] for i in batch]
                logits = self._logits([inputs[i] for i in batch], max(map(len, targets)))
                return _judged(logits.float(), targets, ends)

            return self._batches.run(rows, run)

        return judged(self._texts, pairs, ended, judge)

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
        self._live.close()
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
