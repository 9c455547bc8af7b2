"""Tokenizers read, joined, cut, compared and written as data; transformers is the judge."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken as Added
from tokenizers import Tokenizer as Library
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.tokenizer import (
    AddedToken,
    Comparison,
    Tokenizer,
    compare,
    edited_files,
    joined,
    read_tokenizers,
    tokenizer_files,
)
from tests.merge.tokenized import bpe, unigram, words, write_files, write_model
from tests.tiny import ZOO

LETTERS = "elowrst"


def special(*names: str) -> list[Added]:
    return [Added(name, special=True, normalized=False) for name in names]


def english(*more: str) -> Library:
    tokenizer = bpe(LETTERS + "".join(more), "l o", "lo w", "e r", "low er")
    tokenizer.add_tokens(special("<s>", "</s>"))
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def read(model: Checkpoint) -> Tokenizer:
    tokenizer = read_tokenizers({"model": model})["model"]
    assert tokenizer is not None
    return tokenizer


def loaded(folder: Path, model: Checkpoint, tokenizer: Tokenizer) -> Any:
    files = edited_files(model, read(model), tokenizer)
    return AutoTokenizer.from_pretrained(write_files(folder, files))


DESCRIBED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "special tokens": {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "[PAD]"},
    "an ordinary token that is special": {"unk_token": "<unk>", "eos_token": "w"},
    "lists": {"additional_special_tokens": ["<x>", "<y>"], "pad_token": "[PAD]"},
    "added tokens": {
        "mask_token": "<mask>",
        "added_tokens_decoder": {
            "90": {"content": "<late>", "special": False, "normalized": True},
            "12": {"content": "<s>", "special": True, "normalized": False, "rstrip": True},
            "40": {"content": "<tool>", "special": True, "normalized": False, "lstrip": True},
        },
    },
}


@pytest.mark.parametrize("described", DESCRIBED.values(), ids=DESCRIBED)
def test_numbers_are_those_that_transformers_gives(
    tmp_path: Path, described: dict[str, Any]
) -> None:
    model = write_model(tmp_path / "model", english(), described=described)
    tokenizer, theirs = read(model), AutoTokenizer.from_pretrained(model.path)
    assert tokenizer.numbers == theirs.get_vocab()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    assert {
        token: [getattr(added, flag) for flag in flags] for token, added in tokenizer.added.items()
    } == {
        added.content: [getattr(added, flag) for flag in flags]
        for added in theirs.added_tokens_decoder.values()
    }


@pytest.mark.parametrize("described", [{}, DESCRIBED["added tokens"]], ids=["older", "newer"])
def test_special_tokens_in_a_file_of_their_own(tmp_path: Path, described: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", english(), described={"eos_token": "w", **described})
    special = {"eos_token": {"content": "<end>", "lstrip": True, "normalized": False}}
    (model.path / "special_tokens_map.json").write_text(json.dumps(special))
    theirs = AutoTokenizer.from_pretrained(model.path)
    assert read(model).numbers == theirs.get_vocab()
    assert theirs.eos_token == ("w" if described else "<end>")
    assert theirs.eos_token in read(model).added


def test_the_zoos_numbers() -> None:
    model = Checkpoint.open(ZOO / "base")
    assert read(model).numbers == AutoTokenizer.from_pretrained(ZOO / "base").get_vocab()


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (english(), bpe("hi" + LETTERS, "h i"), "lower rest slow"),
        (words("?", "a", "b"), words("?", "c", "b"), "a b z a"),
        (unigram("?", "lo", "l", "o", "w"), unigram("?", "s", "lo"), "low lol wo"),
    ],
    ids=["BPE", "WordLevel", "Unigram"],
)
def test_a_union_encodes_the_first_ones_text_as_before(
    tmp_path: Path, first: Library, second: Library, text: str
) -> None:
    second.add_tokens(special("<|im_start|>", "<|im_end|>"))
    one = write_model(tmp_path / "one", first, described={"eos_token": first.id_to_token(1)})
    two = write_model(tmp_path / "two", second)
    union = joined(read(one), [read(two)])
    before, after = AutoTokenizer.from_pretrained(one.path), loaded(tmp_path / "out", one, union)
    assert after.get_vocab() == union.numbers
    assert set(union.numbers) == {*first.get_vocab(), *second.get_vocab()}
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert after.decode(before(text)["input_ids"]) == before.decode(before(text)["input_ids"])
    chat = after("<|im_start|>", add_special_tokens=False)["input_ids"]
    assert chat == [union.numbers["<|im_start|>"]]


def test_a_union_of_the_zoo_with_more_tokens(tmp_path: Path) -> None:
    base = Checkpoint.open(ZOO / "base")
    extended = Library.from_file(str(ZOO / "base" / "tokenizer.json"))
    extended.add_tokens(special("<tool>"))
    other = write_model(tmp_path / "other", extended)
    after = loaded(tmp_path / "out", base, joined(read(base), [read(other)]))
    before = AutoTokenizer.from_pretrained(ZOO / "base")
    text = "先頭 数列 昇順 一 七 三"
    assert after(text)["input_ids"] == before(text)["input_ids"]
    assert (after.convert_tokens_to_ids("<tool>"), after.pad_token) == (157, before.pad_token)


def test_a_token_added_anywhere_is_an_added_one(caplog: pytest.LogCaptureFixture) -> None:
    loose, strict = AddedToken("x", lstrip=True), AddedToken("x", special=True)
    first = Tokenizer({"a": 0, "x": 1}, {}, 2)
    second = Tokenizer({"x": 0, "b": 1}, {"x": loose}, 1)
    third = Tokenizer({"x": 0, "b": 1}, {"x": strict}, 1)
    union = joined(first, [second, third])
    assert union.numbers == {"a": 0, "x": 1, "b": 2}
    assert union.added == {"x": loose, "b": AddedToken("b")}
    assert "1 added tokens have other settings in other models" in caplog.text
    assert joined(first, [third, second]).added["x"] == strict


def test_extending_keeps_what_is_there() -> None:
    tokenizer = Tokenizer({"a": 0, "b": 1}, {"b": AddedToken("b", special=True)}, 1)
    assert tokenizer.extended([AddedToken("b"), AddedToken("c")]) == Tokenizer(
        {"a": 0, "b": 1, "c": 2}, {"b": AddedToken("b", special=True), "c": AddedToken("c")}, 1
    )


@pytest.mark.parametrize("library", [english(), unigram("?", *LETTERS, "lo", "low")])
def test_a_cut_tokenizer_loads_and_has_no_number_too_high(tmp_path: Path, library: Library) -> None:
    model = write_model(tmp_path / "model", library)
    cut = read(model).cut(9)
    after = loaded(tmp_path / "out", model, cut)
    assert after.get_vocab() == cut.numbers
    assert sorted(cut.numbers.values()) == list(range(9))
    assert max(after("slower lowest", add_special_tokens=False)["input_ids"]) < 9


def test_a_special_token_without_a_row_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    described = {"eos_token": "</s>", "pad_token": "[PAD]", "extra_special_tokens": ["<x>"]}
    model = write_model(tmp_path / "model", words("?", "a", "</s>"), described=described)
    after = loaded(tmp_path / "out", model, read(model).cut(3))
    assert (after.eos_token, after.pad_token, len(after)) == ("</s>", None, 3)
    assert "pad_token '[PAD]' is dropped: it has no embedding" in caplog.text


def test_nothing_is_rewritten_that_does_not_change(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", english())
    (model.path / "tokenizer.model").write_bytes(b"pieces")
    files = edited_files(model, read(model), read(model))
    assert files == tokenizer_files(model)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}


def test_other_forms_of_an_edited_vocabulary_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path / "model", english())
    (model.path / "tokenizer.model").write_bytes(b"pieces")
    with caplog.at_level(logging.INFO):
        files = edited_files(model, read(model), read(model).extended([AddedToken("new")]))
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert "tokenizer.model is left out" in caplog.text


def test_the_list_of_added_tokens_follows(tmp_path: Path) -> None:
    entry = {"content": "</s>", "special": True, "normalized": False}
    described = {"added_tokens_decoder": {"1": entry}}
    model = write_model(tmp_path / "model", words("?", "</s>"), described=described)
    files = edited_files(model, read(model), read(model).extended([AddedToken("new")]))
    listed = json.loads(files["tokenizer_config.json"])["added_tokens_decoder"]
    assert {number: entry["content"] for number, entry in listed.items()} == {
        "1": "</s>",
        "2": "new",
    }


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "{}",
        '{"model": {}}',
        '{"model": {"vocab": [["a"]]}}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}',
    ],
)
def test_malformed(tmp_path: Path, text: str) -> None:
    model = write_model(tmp_path / "model", words("?"))
    (model.path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json' is (no|not)"):
        read_tokenizers({"model": model})


@pytest.mark.parametrize(
    "described",
    [
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"0": {}}},
        {"added_tokens_decoder": ["a"]},
        {"eos_token": {"special": True}},
        {"bos_token": 1},
    ],
)
def test_a_malformed_description(tmp_path: Path, described: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", words("?"), described=described)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json .* lists no tokens"):
        read_tokenizers({"model": model})


def test_models_are_compared_with_the_base(tmp_path: Path) -> None:
    described = {"eos_token": "</s>"}
    models = {
        "base": write_model(tmp_path / "base", english(), described=described),
        "same": write_model(tmp_path / "same", english(), rows=20, described=described),
        "more": write_model(tmp_path / "more", english("h"), described={"eos_token": "<s>"}),
        "other": write_model(tmp_path / "other", bpe(LETTERS, "l o", "lo w", "e r", "o w")),
        "none": write_model(tmp_path / "none", None, rows=4),
    }
    (models["same"].path / "chat_template.jinja").write_text("{{ messages }}")
    found = compare(models, "base")
    assert found["none"] is None
    same = Comparison(14, 20, 0, 0, 0, True, False, ())
    assert (found["same"], same.same) == (same, True)
    assert found["base"] == Comparison(14, 14, 0, 0, 0, True, True, ())
    assert found["more"] == Comparison(
        15, 15, 0, 1, 6, False, True, (("eos_token", "<s>", "</s>"),)
    )
    other = found["other"]
    assert other is not None
    assert (other.lacking, other.extra, other.renumbered) == (3, 1, 0)
    assert (other.pipeline, other.same) == (False, False)
    assert other.special == (("eos_token", None, "</s>"),)


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    models = {
        "base": write_model(tmp_path / "base", None, rows=4),
        "x": write_model(tmp_path / "x", words("?")),
    }
    assert compare(models, "base") == {"base": None, "x": None}
