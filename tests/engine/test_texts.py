"""Texts into tokens: jointly, as lm-eval does it."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

from evomerge.engine.texts import Texts, open_config, open_tokenizer
from evomerge.errors import ModelError
from tests import tiny
from tests.merge import tokenized

BEGIN, END = "<s>", "</s>"


def written(folder: Path, **described: str) -> Texts:
    """A byte-level tokenizer, as most models have one, that adds the beginning."""
    letters = sorted(ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "c"), (":", "Ġ"), ("Ġa", "b"), ("c", "a"), ("Ċ", "Ċ")]
    tokens = [BEGIN, END, *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BEGIN, END])
    if "bos_token" in described:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)]
        )
    named = {"eos_token": END, **described}
    tokenized.write_model(folder, tokenizer, described=named, model_type="llama")
    return Texts(folder, "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return written(tmp_path_factory.mktemp("texts") / "model", bos_token=BEGIN)


@pytest.fixture(scope="module")
def without_begin(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return written(tmp_path_factory.mktemp("texts") / "model")


class Theirs:
    """What lm-eval asks of a model to encode a pair."""

    backend = "causal"

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    def tok_encode(self, text: str) -> list[int]:
        special = not text.startswith(BEGIN)
        ids: list[int] = self.texts.tokenizer.encode(text, add_special_tokens=special)
        return ids


letters = st.text("abc: \n", max_size=8)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(letters.filter(str.strip), letters.filter(str.strip))
def test_pairs_are_parted_as_lm_eval_parts_them(texts: Texts, prompt: str, answer: str) -> None:
    theirs = TemplateLM._encode_pair(Theirs(texts), prompt, answer)
    ((head, target),) = texts.pairs([(prompt, answer)], ended=False)
    whole = texts.tokenizer.encode(prompt + answer)
    kept = texts.tokenizer.encode(prompt.rstrip())
    if whole[: len(kept)] == kept:  # no token spans the border
        assert (head, target) == theirs
    spoken = texts.tokenizer.decode(head, skip_special_tokens=True)
    assert spoken + texts.tokenizer.decode(target) == prompt + answer  # nothing is lost


def test_the_end_is_a_token_more(texts: Texts) -> None:
    pairs = [("ab", " ca"), ("", "ab"), ("ab ", ""), ("", "")]
    for (head, target), (same, ended) in zip(
        texts.pairs(pairs, False), texts.pairs(pairs, True), strict=True
    ):
        assert head == same
        assert ended == [*target, texts.end]


def test_a_prompt_has_a_beginning_and_only_one(texts: Texts, without_begin: Texts) -> None:
    begin = texts.tokenizer.bos_token_id
    assert texts.prompts(["", f"{BEGIN}ab", "ab"]) == [[begin], *texts.prompts(["ab"]) * 2]
    assert texts.prompts(["ab"])[0][0] == begin
    assert without_begin.prompts([""]) == [[without_begin.end]]
    assert without_begin.prompts(["ab"])[0] == texts.prompts(["ab"])[0][1:]
    assert without_begin.pairs([("", "ab")], ended=False)[0][0] == [without_begin.end]
    assert texts.pairs([("", f"{BEGIN}ab")], False) == texts.pairs([("", "ab")], False)


def test_the_zoo_reads_prompts_and_answers_apart() -> None:
    """There 'word=4' would be one unknown word."""
    texts = Texts(tiny.ZOO / "base", "base")
    ((head, target),) = texts.pairs([("now ascend of 7 and one =", "4 7")], ended=True)
    encode = texts.tokenizer.encode
    assert head == encode("now ascend of 7 and one =")
    assert target == [*encode("4 7", add_special_tokens=False), texts.end]


def test_a_stop_text_that_is_a_special_token_ends_a_reply(texts: Texts) -> None:
    """Decoding leaves it out, so that no text ever shows it."""
    ids = texts.tokenizer.encode("ab: ca", add_special_tokens=False)
    begin = texts.tokenizer.bos_token_id
    reply = texts.reply([*ids, begin, *ids], (BEGIN, ": nowhere"))
    assert (reply.text, reply.truncated, reply.tokens) == ("ab: ca", False, len(ids))
    assert texts.reply([*ids, begin, *ids], ("nowhere",)).tokens == 2 * len(ids) + 1
    assert texts.ends_for((BEGIN, "ab")) == {begin, *texts.ends}


def test_a_reply_is_cut_at_its_end_and_at_a_stop_text(texts: Texts) -> None:
    ids = texts.tokenizer.encode("ab: ca: c", add_special_tokens=False)
    reply = texts.reply([*ids, texts.end, *ids], ())
    assert (reply.text, reply.truncated, reply.tokens) == ("ab: ca: c", False, len(ids))
    assert texts.reply(ids, ()).truncated
    reply = texts.reply(ids, (": c", "nowhere"))
    assert (reply.text, reply.truncated) == ("ab", False)
    begun = texts.tokenizer.encode("ab: c", add_special_tokens=False)
    assert reply.tokens == len(begun) or ids[: len(begun)] != begun


def test_code_that_a_model_brings_along_is_not_run_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None]}
    for file in ("config.json", "tokenizer_config.json"):
        (tmp_path / file).write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for opened in (open_config, open_tokenizer):
        with pytest.raises(ModelError):
            opened(tmp_path)
    assert not (tmp_path / "ran").exists()
