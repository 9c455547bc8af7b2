"""Texts into tokens and back, the same for every engine.

What a prompt, an answer, an end of sequence and a model's context are. Knows nothing of what runs
the model.
"""

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from evomerge.engine import Prompt, Reply
from evomerge.errors import InputError, ModelError
from evomerge.messages import one_line

Tokens = list[int]

_REMEMBERED = 1 << 20  # tokens of texts, some 40 MB


class Texts:
    """What a model's tokenizer, chat template and configs say of texts.

    context: tokens of prompt and reply at most, None where the model sets no limit. end: the token
    that ends a sequence; ends: all that end a generation, `end` among them. pad: what fills a
    batch.
    """

    def __init__(self, path: Path, name: str, context: int | None = None) -> None:
        """path: of the model's files. name: what messages call it. context: a limit below the
        model's own. Raises ModelError for files that cannot be used, InputError for a context that
        the model does not have."""
        self.tokenizer = open_tokenizer(path)
        self._name = name
        if self.tokenizer.eos_token_id is None:
            raise ModelError(f"model '{name}': its tokenizer has no end-of-sequence token")
        self.end: int = self.tokenizer.eos_token_id
        pad, begin = self.tokenizer.pad_token_id, self.tokenizer.bos_token_id
        self.pad: int = self.end if pad is None else pad
        self._prefix: int = self.end if begin is None else begin
        self._prefix_text: str = self.tokenizer.decode([self._prefix])
        self.ends = frozenset({self.end, *_generation_ends(path)})
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {token.content: number for number, token in added if token.special}
        positions = getattr(open_config(path).get_text_config(), "max_position_embeddings", None)
        if context is not None and positions is not None and context > positions:
            raise InputError(
                f"engine.context: {context} is more than the {positions} positions of model "
                f"'{name}': give {positions} at most"
            )
        self.context: int | None = positions if context is None else context
        self._known: dict[tuple[str, bool], Tokens] = {}

    def written(self, prompt: Prompt) -> str:
        """The text that the model is given: of a conversation, as its chat template writes it out.
        Raises ModelError where it has none."""
        if isinstance(prompt, str):
            return prompt
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"model '{self._name}' has no chat template: ask without --chat, or with "
                "`chat: false` in job or task file, or choose a model that has one"
            )
        turns = [{"role": turn.role, "content": turn.text} for turn in prompt]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # whatever a template raises, such as for a role it refuses
            raise ModelError(
                f"model '{self._name}': its chat template fails: {one_line(error)}"
            ) from None
        return text

    def prompts(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        """The tokens of each prompt, at least one."""
        texts = [self.written(prompt) for prompt in prompts]
        special = [self._wants_special(p, t) for p, t in zip(prompts, texts, strict=True)]
        return [tokens or [self._prefix] for tokens in self._encoded(texts, special)]

    def pairs(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool
    ) -> list[tuple[Tokens, Tokens]]:
        """The tokens of each prompt and of the answer to it. ended: the end of sequence is the
        answer's last token.

        Both are encoded as one text and parted behind the prompt's own tokens, and white space at
        the end of a plain prompt belongs to the answer, as in lm-eval. Where a token would span
        the border, which lm-eval then cuts in two, the answer is encoded by itself: as a
        generation after the prompt's tokens would write it.
        """
        prompts: list[str] = []
        wholes: list[str] = []
        answers: list[str] = []
        special: list[bool] = []
        for prompt, answer in pairs:
            text = self.written(prompt)
            special.append(self._wants_special(prompt, text))
            kept = text.rstrip() if isinstance(prompt, str) else text
            prompts.append(kept)
            wholes.append(text + answer)
            answers.append(text[len(kept) :] + answer)
        heads = self._encoded(prompts, special)
        joint = self._encoded(wholes, special)
        alone = self._encoded(answers, [False] * len(answers))
        found = []
        for text, head, whole, own in zip(prompts, heads, joint, alone, strict=True):
            clean = whole[: len(head)] == head and (len(whole) > len(head)) == bool(own)
            target = whole[len(head) :] if text and clean else own
            before = head or [self._prefix]
            if not text and target[:1] == before:  # it brings its own
                target = target[1:]
            found.append((before, [*target, self.end] if ended else target))
        return found

    def _wants_special(self, prompt: Prompt, text: str) -> bool:
        """Whether the tokenizer is to add its special tokens: a chat template has written them."""
        begun = bool(self._prefix_text) and text.startswith(self._prefix_text)
        return isinstance(prompt, str) and not begun

    def _encoded(self, texts: Sequence[str], special: Sequence[bool]) -> list[Tokens]:
        """Of a text and whether special tokens are added: remembered, for a search asks the same
        examples of every candidate."""
        wanted = list(zip(texts, special, strict=True))
        found = {key: self._known[key] for key in wanted if key in self._known}
        for add in (False, True):
            new = [text for text, wants in dict.fromkeys(wanted) if wants == add]
            new = [text for text in new if (text, add) not in found]
            if new:
                ids = self.tokenizer(new, add_special_tokens=add)["input_ids"]
                found |= {(text, add): tokens for text, tokens in zip(new, ids, strict=True)}
        if sum(map(len, self._known.values())) > _REMEMBERED:
            self._known.clear()
        self._known |= found
        return [found[key] for key in wanted]

    def ends_for(self, stop: Sequence[str]) -> frozenset[int]:
        """The tokens that end a reply: the model's ends, and those of the stop texts that are
        special tokens, such as '<|im_end|>', which no decoded text shows."""
        return self.ends | {self._special[text] for text in stop if text in self._special}

    def reply(self, tokens: Tokens, stop: Sequence[str]) -> Reply:
        """What a model has generated, cut at its end and at the first of the stop texts."""
        ends = self.ends_for(stop)
        count = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        ended, tokens = count < len(tokens), tokens[:count]
        text = self._text(tokens)
        cuts = [at for at in (text.find(s) for s in stop) if at >= 0]
        if not cuts:
            return Reply(text, not ended, len(tokens))

        def stopped(count: int) -> bool:
            return self.stopped(tokens[:count], stop)

        # Engines may run on after a stop text; what was written by then is what the reply took.
        count = bisect.bisect_left(range(len(tokens)), True, key=stopped)
        return Reply(text[: min(cuts)], False, count)

    def stopped(self, tokens: Tokens, stop: Sequence[str]) -> bool:
        """Whether a stop text is complete."""
        text = self._text(tokens)
        return any(s in text for s in stop)

    def _text(self, tokens: Tokens) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def open_tokenizer(path: Path) -> Any:
    """Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"model '{path}': no usable tokenizer: {one_line(error)}") from None


def open_config(path: Path) -> Any:
    """Raises ModelError."""
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model '{path}': transformers cannot read its config: {one_line(error)}"
        ) from None


def _generation_ends(path: Path) -> tuple[int, ...]:
    """The tokens that end a generation: a model may have several, one for each kind of turn."""
    try:
        ends = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:  # it has none: its config says
        ends = getattr(open_config(path).get_text_config(), "eos_token_id", None)
    except ValueError as error:
        raise ModelError(
            f"model '{path}': generation_config.json is not valid: {one_line(error)}"
        ) from None
    if ends is None:
        return ()
    return (ends,) if isinstance(ends, int) else tuple(ends)
