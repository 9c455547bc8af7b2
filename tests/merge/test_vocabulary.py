"""Which rows make the embeddings of a merge of models whose tokenizers differ."""

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from evomerge.errors import ModelError, RecipeError
from evomerge.merge.checkpoint import Checkpoint, Read
from evomerge.merge.vocabulary import Vocabulary, aligned, plan_vocabulary
from evomerge.recipe import TokenizerSettings
from tests.merge.tokenized import EMBEDDINGS, WIDTH, unigram, words, write_files, write_model

Models = Mapping[str, Checkpoint]


def make_models(folder: Path, tokens: Mapping[str, str], **rows: int) -> dict[str, Checkpoint]:
    return {
        name: write_model(folder / name, words(*text.split()), rows.get(name), seed)
        for seed, (name, text) in enumerate(tokens.items())
    }


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Checkpoint]:
    """The base, and two models that lack some of its words and have others."""
    return make_models(tmp_path, {"base": "? a b c", "x": "? d c a e", "y": "? e a f"})


def plan(models: Models, donor: str = "base", **given: Any) -> Vocabulary:
    return plan_vocabulary(TokenizerSettings.model_validate(given), models, donor)


def numbers(vocabulary: Vocabulary) -> dict[str, int]:
    found: dict[str, int] = Tokenizer.from_str(
        vocabulary.files["tokenizer.json"].decode()
    ).get_vocab()
    return found


def in_order(vocabulary: Vocabulary) -> str:
    found = numbers(vocabulary)
    return " ".join(sorted(found, key=found.__getitem__))


def read_of(tensor: torch.Tensor) -> Read:
    return lambda start, stop: tensor.reshape(-1)[start:stop]


def heights(models: Models, inputs: Sequence[str]) -> dict[str, int]:
    return {name: models[name].headers[EMBEDDINGS].shape[0] for name in inputs}


def moved(
    vocabulary: Vocabulary, models: Models, inputs: Sequence[str], base: str | None
) -> dict[str, torch.Tensor]:
    """Each input's embeddings as they enter the merge."""
    reads = {name: models[name].values(EMBEDDINGS) for name in inputs}
    rows = vocabulary.rows(inputs, base, heights(models, inputs))
    result = {}
    for name, own in rows.items():
        read = reads[name] if own is None else aligned(own, reads, WIDTH, torch.float32)
        result[name] = read(0, vocabulary.size * WIDTH).view(-1, WIDTH)
    return result


def own_row(model: Checkpoint, number: int) -> torch.Tensor:
    return model.tensor(EMBEDDINGS)[number]


def test_a_union_adds_tokens_in_the_order_of_the_recipe(three: dict[str, Checkpoint]) -> None:
    first, second = plan(three, source="union"), plan(dict(reversed(three.items())))
    assert in_order(first) == "? a b c d e f"
    assert in_order(second) == "? a b c e f d"
    assert first.size == 7
    assert first.configured(three["base"].config)["vocab_size"] == 7


def test_a_token_has_its_own_row_wherever_it_is_numbered(three: dict[str, Checkpoint]) -> None:
    vocabulary = plan(three, source="union")
    result, place = moved(vocabulary, three, ["x", "y", "base"], "base"), numbers(vocabulary)
    for name, text in {"base": "? a b c", "x": "? d c a e", "y": "? e a f"}.items():
        for number, token in enumerate(text.split()):
            assert torch.equal(result[name][place[token]], own_row(three[name], number))


def test_a_missing_token_is_its_only_owners_then_the_bases_then_the_mean(
    three: dict[str, Checkpoint],
) -> None:
    vocabulary = plan(three, source="union")
    place = numbers(vocabulary)
    result = moved(vocabulary, three, ["x", "y", "base"], "base")
    assert torch.equal(result["y"][place["d"]], own_row(three["x"], 1))  # x alone has it
    assert torch.equal(result["y"][place["c"]], own_row(three["base"], 3))  # so does x, at 2
    both = (own_row(three["x"], 4) + own_row(three["y"], 1)) / 2
    assert torch.equal(result["base"][place["e"]], both)


def test_a_base_that_is_no_input_gives_no_rows(
    three: dict[str, Checkpoint], caplog: pytest.LogCaptureFixture
) -> None:
    vocabulary = plan(three, source="base")
    with caplog.at_level(logging.WARNING):
        result = moved(vocabulary, three, ["x", "y"], "base")
    assert torch.equal(result["y"][3], own_row(three["x"], 2))
    assert torch.equal(result["x"][2], torch.zeros(WIDTH))
    assert "1 tokens are in none of the models merged and get rows of zeros: 'b'" in caplog.text


@pytest.mark.parametrize("source", ["base", "union"])
def test_with_one_tokenizer_nothing_moves(tmp_path: Path, source: str) -> None:
    models = make_models(tmp_path, {"base": "? a b", "x": "? a b"})
    vocabulary = plan(models, source=source)
    assert vocabulary.rows(["x", "base"], "base", {"x": 3, "base": 3}) == {"x": None, "base": None}
    for name, content in vocabulary.files.items():
        assert content == (models["base"].path / name).read_bytes()


def test_only_the_models_with_other_rows_move(three: dict[str, Checkpoint]) -> None:
    rows = plan(three, source="x").rows(["x", "y"], None, heights(three, ["x", "y"]))
    assert (rows["x"], rows["y"] is None) == (None, False)


def test_the_tokenizer_of_a_model_comes_with_its_numbers(tmp_path: Path) -> None:
    models = {
        "base": write_model(tmp_path / "base", words("?", "a", "</s>"), eos_token_id=2),
        "x": write_model(tmp_path / "x", words("?", "</s>", "a", "b"), eos_token_id=1),
    }
    config = models["base"].config
    assert plan(models, source="base").configured(config)["eos_token_id"] == 2
    assert plan(models, source="union").configured(config)["eos_token_id"] == 2
    changed = plan(models, source="x").configured(config)
    assert (changed["eos_token_id"], changed["vocab_size"]) == (1, 4)


def test_the_size_stands_where_the_config_has_it(three: dict[str, Checkpoint]) -> None:
    vocabulary, text = plan(three, source="union"), {"vocab_size": 3, "hidden_size": 8}
    nested = {"text_config": text | {"vocab_size": 7}}
    assert vocabulary.configured({"text_config": text}) == nested
    assert vocabulary.configured({"text_config": text, "vocab_size": 3}) == nested | {
        "vocab_size": 7
    }
    assert vocabulary.configured({"text_config": {}}) == {"text_config": {}, "vocab_size": 7}


def test_padding_rows_vanish(tmp_path: Path) -> None:
    models = make_models(tmp_path, {"base": "? a b", "x": "? a b"}, base=8)
    vocabulary = plan(models, source="base")
    assert vocabulary.size == 3
    result = moved(vocabulary, models, ["x", "base"], "base")
    assert torch.equal(result["base"], models["base"].tensor(EMBEDDINGS)[:3])


def test_new_padding_is_the_mean_of_the_rows(three: dict[str, Checkpoint]) -> None:
    vocabulary = plan(three, source="union", pad_to_multiple_of=4)
    assert vocabulary.size == 8
    for rows in moved(vocabulary, three, ["x", "y", "base"], "base").values():
        torch.testing.assert_close(rows[7], rows[:7].mean(dim=0), rtol=1e-6, atol=1e-7)


def test_tokens_without_rows_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models = make_models(tmp_path, {"base": "? a b", "x": "? b c a"}, base=2)
    with caplog.at_level(logging.WARNING):
        vocabulary = plan(models, source="base")
    assert numbers(vocabulary) == {"?": 0, "a": 1}
    assert "'base' has 2 rows of embeddings, none for 1 of its tokens" in caplog.text
    result = moved(vocabulary, models, ["x", "base"], "base")
    assert torch.equal(result["x"][1], own_row(models["x"], 3))


class TestRules:
    """Rules for single tokens."""

    @staticmethod
    def row(models: Models, token: str, rule: dict[str, Any], of: str) -> torch.Tensor:
        vocabulary = plan(models, source="union", tokens={token: rule})
        result = moved(vocabulary, models, ["x", "y", "base"], "base")
        return result[of][numbers(vocabulary)[token]]

    def test_for_those_that_lack_the_token(self, three: dict[str, Checkpoint]) -> None:
        rule = {"source": {"kind": "zero"}}
        assert torch.equal(self.row(three, "c", rule, of="y"), torch.zeros(WIDTH))
        assert torch.equal(self.row(three, "c", rule, of="x"), own_row(three["x"], 2))

    def test_for_all_by_force(self, three: dict[str, Checkpoint]) -> None:
        rule = {"source": "x", "force": True}
        for model in three:
            assert torch.equal(self.row(three, "c", rule, of=model), own_row(three["x"], 2))

    @pytest.mark.parametrize("which", [{"token": "f"}, {"token_id": 3}])
    def test_another_token(self, three: dict[str, Checkpoint], which: dict[str, Any]) -> None:
        rule = {"source": {"kind": "model_token", "model": "y", **which}}
        for model in three:
            assert torch.equal(self.row(three, "<new>", rule, of=model), own_row(three["y"], 3))

    def test_a_rule_without_a_source_only_adds_the_token(
        self, three: dict[str, Checkpoint], caplog: pytest.LogCaptureFixture
    ) -> None:
        assert torch.equal(self.row(three, "<new>", {}, of="x"), torch.zeros(WIDTH))
        assert "'<new>'" in caplog.text

    def test_a_row_of_padding_is_not_the_new_tokens(self, tmp_path: Path) -> None:
        models = make_models(tmp_path, {"base": "? a", "x": "? a b"}, base=4)
        given = {"source": "base", "tokens": {"b": {"source": "x"}}}
        result = moved(plan(models, **given), models, ["x", "base"], "base")
        assert torch.equal(result["base"][2], own_row(models["x"], 2))

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ({"source": "z"}, "source: 'z' is no model of the recipe: known: base, x, y"),
            ({"source": "x"}, "tokens.b.source: 'x' has no such token"),
            (
                {"source": {"kind": "model_token", "model": "x", "token": "b"}},
                "source.token: 'x' has no token 'b'",
            ),
            (
                {"source": {"kind": "model_token", "model": "x", "token_id": 5}},
                "source: 'x' has no row 5: it has 5",
            ),
        ],
    )
    def test_that_cannot_be_kept(
        self, three: dict[str, Checkpoint], rule: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(RecipeError, match=message):
            self.row(three, "b", rule, of="x")

    def test_with_a_model_that_a_tensor_does_not_have(self, three: dict[str, Checkpoint]) -> None:
        vocabulary = plan(three, source="union", tokens={"c": {"source": "base"}})
        with pytest.raises(RecipeError, match=r"tokens\.c\.source: 'base' is no input"):
            vocabulary.rows(["x", "y"], None, heights(three, ["x", "y"]))


def test_a_source_that_is_not_merged(three: dict[str, Checkpoint]) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer\.source: 'bas' .* did you mean 'base'"):
        plan(three, source="bas")


def test_fewer_rows_than_the_config_counts(three: dict[str, Checkpoint]) -> None:
    with pytest.raises(ModelError, match="'x' has 4 rows of embeddings"):
        plan(three).rows(["x", "base"], "base", {"x": 4, "base": 4})


class TestWithoutATokenizer:
    """Models that bring no tokenizer.json."""

    def test_the_bases_stands_for_it(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        models = make_models(tmp_path, {"base": "? a b"})
        models["x"] = write_model(tmp_path / "x", None, rows=3)
        rows = plan(models).rows(["x", "base"], "base", {"x": 3, "base": 3})
        assert rows == {"x": None, "base": None}
        assert "model 'x' has no tokenizer: taken to be that of 'base'" in caplog.text

    def test_the_base_needs_one(self, tmp_path: Path) -> None:
        models = {"base": write_model(tmp_path / "base", None, rows=3)}
        with pytest.raises(ModelError, match="'base' has no tokenizer"):
            plan(models)

    def test_the_source_needs_one(self, tmp_path: Path) -> None:
        models = make_models(tmp_path, {"base": "? a b"})
        models["x"] = write_model(tmp_path / "x", None, rows=3)
        with pytest.raises(ModelError, match="'x' has no tokenizer"):
            plan(models, source="x")

    def test_one_in_another_form_has_to_be_converted(self, three: dict[str, Checkpoint]) -> None:
        (three["x"].path / "tokenizer.json").rename(three["x"].path / "tokenizer.model")
        with pytest.raises(ModelError, match=r"as tokenizer\.model only: save it once"):
            plan(three)


def test_a_union_of_unigrams_loads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    models = {
        "base": write_model(tmp_path / "base", unigram("?", "lo", "w", "l", "o")),
        "x": write_model(tmp_path / "x", unigram("?", "new", "lo")),
    }
    loaded = AutoTokenizer.from_pretrained(write_files(tmp_path / "out", plan(models).files))
    assert loaded.get_vocab() == {"?": 0, "lo": 1, "w": 2, "l": 3, "o": 4, "new": 5}
    assert loaded("low new lol")["input_ids"] == [1, 2, 5, 1, 3]


TOKENS = [f"t{number}" for number in range(12)]
vocabularies = st.lists(
    st.lists(st.sampled_from(TOKENS), min_size=1, max_size=12, unique=True),
    min_size=1,
    max_size=4,
)


def expected_row(
    token: str, name: str, owners: dict[str, torch.Tensor], base: str | None, dtype: torch.dtype
) -> torch.Tensor:
    """What a model has for one token. owners: the row of each model that has the token."""
    if name in owners:
        return owners[name]
    if len(owners) > 1 and base in owners:
        return owners[base]
    total = torch.zeros(WIDTH, dtype=dtype)
    for row in owners.values():
        total = total + row
    return total / len(owners) if owners else total


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    tokens=vocabularies,
    source=st.sampled_from(["union", "base"]),
    with_base=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    cuts=st.lists(st.integers(0, 12 * WIDTH), max_size=4),
)
def test_spans_of_any_length_follow_the_rules(
    tmp_path_factory: pytest.TempPathFactory,
    tokens: list[list[str]],
    source: str,
    with_base: bool,
    dtype: torch.dtype,
    cuts: list[int],
) -> None:
    folder = tmp_path_factory.mktemp("spans")
    names = ["base", "x", "y", "z"][: len(tokens)]
    listed = dict(zip(names, tokens, strict=True))
    models = make_models(folder, {name: " ".join(own) for name, own in listed.items()})
    base = "base" if with_base else None
    vocabulary = plan(models, source=source)
    tensors = {name: models[name].tensor(EMBEDDINGS).to(dtype) for name in names}
    reads = {name: read_of(tensor) for name, tensor in tensors.items()}
    rows = vocabulary.rows(names, base, heights(models, names))
    total = vocabulary.size * WIDTH
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    for name, own in rows.items():
        read = reads[name] if own is None else aligned(own, reads, WIDTH, dtype)
        result = torch.cat([read(start, stop) for start, stop in pairwise(edges)])
        for token, number in numbers(vocabulary).items():
            owners = {n: tensors[n][own.index(token)] for n, own in listed.items() if token in own}
            expected = expected_row(token, name, owners, base, dtype)
            assert torch.equal(result.view(-1, WIDTH)[number], expected)


def test_means_are_rounded_at_each_step(three: dict[str, Checkpoint]) -> None:
    """As mergekit does it: added up in the tensor's dtype, then divided."""
    rows = plan(three, source="union").rows(["x", "y", "base"], None, dict.fromkeys(three, 5))
    values = {name: torch.full((5 * WIDTH,), 256.0) for name in ("x", "base")}
    values["y"] = torch.full((5 * WIDTH,), 1.0)
    reads = {name: read_of(tensor) for name, tensor in values.items()}
    assert rows["base"] is not None
    merged = aligned(rows["base"], reads, WIDTH, torch.bfloat16)(5 * WIDTH, 5 * WIDTH + 1)
    assert merged.dtype == torch.bfloat16
    assert merged.item() == 128.0  # 256 + 1 is 256 in bfloat16


def test_a_span_reads_about_as_much_as_it_gives(tmp_path: Path) -> None:
    count, width = 600, 64
    tokens = [f"t{number}" for number in range(count)]
    listed = {"base": " ".join(tokens), "x": " ".join(tokens[100:] + tokens[:100])}
    models = make_models(tmp_path, listed)
    rows = plan(models).rows(["x", "base"], "base", {"x": count, "base": count})["x"]
    assert rows is not None
    read: list[int] = []

    def counted(start: int, stop: int) -> torch.Tensor:
        read.append(stop - start)
        return torch.zeros(stop - start)

    span = 40 * width
    for start in range(0, count * width, span):
        read.clear()
        aligned(rows, {"x": counted, "base": counted}, width, torch.float32)(start, start + span)
        assert sum(read) == span
        assert len(read) <= 2


def test_a_bias_has_rows_of_one(three: dict[str, Checkpoint]) -> None:
    rows = plan(three, source="x").rows(["y", "x"], None, {"y": 4, "x": 5})["y"]
    assert rows is not None
    biases = {"x": torch.arange(5.0), "y": 10 + torch.arange(4.0)}
    reads = {name: read_of(bias) for name, bias in biases.items()}
    assert aligned(rows, reads, 1, torch.float32)(0, 5).tolist() == [10, 1, 2, 12, 11]


def test_three_large_vocabularies_are_joined(tmp_path: Path) -> None:
    """Numbers of a size at which loops over pairs of tokens would not end."""
    count = 40_000
    listed = {
        name: " ".join(f"t{number}" for number in range(shift, shift + count))
        for name, shift in {"base": 0, "x": 1000, "y": 0}.items()
    }
    models = make_models(tmp_path, listed)
    vocabulary = plan(models, source="union")
    assert vocabulary.size == count + 1000
    vocabulary = plan(models, source="base")
    rows = vocabulary.rows(["x", "y", "base"], "base", heights(models, list(models)))
    assert [rows[name] is None for name in ("x", "y", "base")] == [False, True, True]
    assert json.loads(vocabulary.files["tokenizer.json"])["model"]["vocab"]["t7"] == 7
