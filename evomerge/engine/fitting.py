"""What fits into a model's context, for every engine alike: what is asked, and what is said of
the rest. Knows nothing of how a model is run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from evomerge.engine import Generation, Likelihood, Prompt, Reply
from evomerge.engine.texts import Texts, Tokens


@dataclass(frozen=True)
class Wanted:
    """A reply to be written: to a prompt, given as text and tokens; sample: its number;
    room: how many tokens it may have."""

    text: str
    tokens: Tokens
    sample: int
    room: int


def written(
    texts: Texts,
    prompts: Sequence[Prompt],
    how: Generation,
    write: Callable[[list[Wanted]], list[Reply]],
) -> list[tuple[Reply, ...]]:
    """As many replies to each prompt as asked for; `write` is asked for those with room."""
    samples = how.samples if how.temperature else 1  # all would be the same
    wanted = [
        Wanted(texts.written(prompt), tokens, sample, _room(texts, len(tokens), how.max_new_tokens))
        for prompt, tokens in zip(prompts, texts.prompts(prompts), strict=True)
        for sample in range(samples)
    ]
    found = iter(write([one for one in wanted if one.room > 0]))
    overlong = Reply("", False, 0, overlong=True)
    replies = [next(found) if one.room > 0 else overlong for one in wanted]
    copies = how.samples // samples
    return [tuple(replies[i * samples : (i + 1) * samples]) * copies for i in range(len(prompts))]


def judged(
    texts: Texts,
    pairs: Sequence[tuple[Prompt, str]],
    ended: bool,
    judge: Callable[[list[tuple[Tokens, Tokens]]], list[Likelihood]],
) -> list[Likelihood]:
    """The likelihood of each answer; `judge` is asked for those with tokens that fit."""
    known: list[Likelihood | None] = []
    asked = []
    for prompt, target in texts.pairs(pairs, ended):
        if _room(texts, len(prompt), len(target)) < len(target):
            known.append(Likelihood((), False, overlong=True))
        elif not target:
            known.append(Likelihood((), True))
        else:
            known.append(None)
            asked.append((prompt, target))
    found = iter(judge(asked))
    return [next(found) if one is None else one for one in known]


def _room(texts: Texts, prompt: int, wanted: int) -> int:
    """How many tokens may follow a prompt of so many."""
    return wanted if texts.context is None else min(wanted, texts.context - prompt)
