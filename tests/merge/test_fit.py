"""What models mean otherwise than each other: configs, tokenizers, special tokens, templates."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.fit import Finding, architectures, check_alike, differences
from evomerge.recipe import Recipe
from tests.merge.conftest import altered
from tests.merge.tokenized import words, write_model

LINEAR = Recipe.from_dict(
    {
        "merge_method": "linear",
        "models": [{"model": "base"}, {"model": "other"}],
        "parameters": {"weight": 1},
    }
)


def with_keys(**keys: Any) -> Recipe:
    return Recipe.from_dict({**LINEAR.to_dict(), **keys})


@pytest.fixture
def base(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    return Path(shutil.copytree(models["base"], tmp_path / "base"))


def found(base: Path, other: Path, recipe: Recipe = LINEAR) -> list[Finding]:
    opened = {"base": Checkpoint.open(base), "other": Checkpoint.open(other)}
    return differences(opened, "base", recipe)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def test_models_alike_have_no_findings(base: Path, models: dict[str, Path]) -> None:
    assert found(base, models["a"]) == []


def test_another_value_in_a_config_is_a_warning(base: Path, tmp_path: Path) -> None:
    other = altered(base, tmp_path / "other", rms_norm_eps=0.1, initializer_range=0.5)
    low, high = found(base, other)
    assert (low.level, low.about, high.level) == ("warning", "config", "warning")
    assert "'rms_norm_eps' is 0.1 in 'other' and " in high.text
    assert "'base', whose config the merge gets" in high.text


def test_a_part_of_a_config_is_compared_key_by_key(base: Path, tmp_path: Path) -> None:
    mine = altered(base, tmp_path / "mine", text_config={"rope_theta": 1e4, "vocab_size": 5})
    other = altered(base, tmp_path / "other", text_config={"rope_theta": 1e6, "vocab_size": 6})
    one, sizes = found(mine, other)
    assert "'text_config.rope_theta' is 1000000.0 in 'other' and 10000.0 in 'base'" in one.text
    assert (sizes.about, sizes.text) == (
        "vocabulary",
        "rows of embeddings: 5 in 'base', 6 in 'other'",
    )


def test_a_key_that_one_config_leaves_out_is_worth_a_word(base: Path, tmp_path: Path) -> None:
    other = altered(base, tmp_path / "other", **{f"new_{i}": i for i in range(9)})
    (one,) = found(base, other)
    assert one == Finding(
        "info",
        "config",
        "only the config of 'other' says new_0, new_1, new_2, new_3, new_4, new_5 ...; "
        "that of 'base' does not",
    )


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 5e5}, {"rope_theta": 5e5, "rope_type": "default"}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0},
        ),
    ],
)
def test_both_ways_of_writing_rotary_settings_are_one(
    base: Path, tmp_path: Path, older: dict[str, Any], newer: dict[str, Any]
) -> None:
    edit(base / "config.json", rope_parameters=None)
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        shutil.copytree(base, folder)
    edit(one / "config.json", **older)
    edit(other / "config.json", rope_parameters=newer)
    assert found(one, other) == []
    check_alike({"one": Checkpoint.open(one), "other": Checkpoint.open(other)}, "one")
    edit(other / "config.json", rope_parameters=newer | {"rope_theta": 7.0})
    assert ["'rope_theta' is 7.0 in 'other'" in f.text for f in found(one, other)] == [True]
    with pytest.raises(ModelError, match=r"'rope_theta' of config\.json"):
        check_alike({"one": Checkpoint.open(one), "other": Checkpoint.open(other)}, "one")


def test_models_of_another_kind_are_named(base: Path, tmp_path: Path) -> None:
    other = altered(base, tmp_path / "other", model_type="mistral", rms_norm_eps=3)
    opened = {"base": Checkpoint.open(base), "other": Checkpoint.open(other)}
    (one,) = architectures(opened, "base")
    assert "'other' is of the kind mistral and 'base', which gives the config, llama" in one.text
    assert found(base, other) == []  # their keys mean different things


def test_several_dtypes_are_told_unless_the_recipe_chooses(
    folders: dict[str, Path],
) -> None:
    (one,) = found(folders["base"], folders["half"])
    assert (one.level, one.about) == ("info", "dtype")
    assert "stored as float32 and bfloat16" in one.text
    assert found(folders["base"], folders["half"], with_keys(dtype="float32")) == []


def of_tokenizers(tmp_path: Path, *more: Any, recipe: Recipe = LINEAR, **described: Any) -> Any:
    """Findings on a base with the words a b c, against other words."""
    tokens, settings = more if len(more) == 2 else (more[0], {})
    base = write_model(tmp_path / "base", words("a", "b", "c"), described=described)
    other = write_model(tmp_path / "other", words(*tokens), described=settings)
    return found(base.path, other.path, recipe)


def test_tokens_under_other_numbers_are_a_warning(tmp_path: Path) -> None:
    (one,) = of_tokenizers(tmp_path, ["a", "c", "b"])
    assert (one.level, one.about) == ("warning", "tokenizer")
    assert "lacks 0 tokens of 'base', has 0 of its own and 2 under other numbers" in one.text
    assert "give a tokenizer_source" in one.text


def test_tokens_under_other_numbers_are_fine_with_a_tokenizer_source(tmp_path: Path) -> None:
    (one,) = of_tokenizers(tmp_path, ["a", "c", "b"], recipe=with_keys(tokenizer_source="union"))
    assert one.level == "info"
    assert "rows are put in the output's order" in one.text


def test_more_tokens_are_told_with_the_rows_they_have(tmp_path: Path) -> None:
    rows, tokens = of_tokenizers(tmp_path, ["a", "b", "c", "d"])
    assert rows.text == "rows of embeddings: 3 in 'base', 4 in 'other'"
    assert "has 1 of its own" in tokens.text


def test_text_cut_otherwise_is_a_warning(tmp_path: Path) -> None:
    other = words("a", "b", "c")
    other.pre_tokenizer = None
    write_model(tmp_path / "base", words("a", "b", "c"))
    write_model(tmp_path / "other", other)
    (one,) = found(tmp_path / "base", tmp_path / "other")
    assert one.level == "warning"
    assert "cuts text into tokens otherwise than 'base'" in one.text


@pytest.mark.parametrize(("theirs", "level"), [("b", "warning"), (None, "info")])
def test_special_tokens_that_differ_are_named(
    tmp_path: Path, theirs: str | None, level: str
) -> None:
    settings = {"eos_token": theirs} if theirs else {}
    (one,) = of_tokenizers(tmp_path, ["a", "b", "c"], settings, eos_token="a")
    assert (one.level, one.about) == (level, "special tokens")
    assert f"eos_token {json.dumps(theirs)} (there " in one.text


TEMPLATE = {"chat_template": "{{ messages[0].content }}"}


def test_a_chat_template_that_is_lost_is_a_warning(tmp_path: Path) -> None:
    (one,) = of_tokenizers(tmp_path, ["a", "b", "c"], TEMPLATE)
    assert (one.level, one.about) == ("warning", "chat template")
    assert "that of 'other' is lost: the output gets none" in one.text


def test_a_chat_template_of_the_base_alone_is_kept(tmp_path: Path) -> None:
    assert of_tokenizers(tmp_path, ["a", "b", "c"], **TEMPLATE) == []


def test_a_chat_template_is_no_matter_where_the_recipe_chooses(tmp_path: Path) -> None:
    recipe = with_keys(chat_template="auto")
    assert of_tokenizers(tmp_path, ["a", "b", "c"], TEMPLATE, recipe=recipe) == []


def test_the_output_gets_the_tokenizer_that_the_recipe_names(tmp_path: Path) -> None:
    recipe = with_keys(tokenizer_source="other")
    (one,) = of_tokenizers(tmp_path, ["a", "b", "c"], recipe=recipe, **TEMPLATE)
    assert "that of 'base' is lost: the output gets none, as 'other'" in one.text


def test_a_tokenizer_that_cannot_be_compared_is_told(base: Path, tmp_path: Path) -> None:
    other = altered(base, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    (one,) = found(base, other)
    assert (one.level, one.about) == ("warning", "tokenizer")
    assert "is no tokenizer" in one.text
    (other / "tokenizer.json").unlink()
    (one,) = found(base, other)
    assert one == Finding("info", "tokenizer", "not compared: 'other' without tokenizer.json")


def seeing(language: Path, folder: Path, **text: Any) -> Path:
    """A model that also sees, around a language model whose config it abridges."""
    tower = {"vision_tower.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 4)}
    config = json.loads((language / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("hidden_act", "initializer_range")}
    whole = altered(
        language,
        folder,
        lambda tensors: tower | {f"language_model.{k}": v for k, v in tensors.items()},
    )
    (whole / "config.json").write_text(
        json.dumps({"model_type": "llava", "vision_config": {}, "text_config": kept | text})
    )
    return whole


@pytest.mark.parametrize("first", ["language", "seeing"])
def test_a_model_that_also_sees_is_alike_a_language_model_as_far_as_both_say(
    base: Path, tmp_path: Path, first: str
) -> None:
    folders = {"language": base, "seeing": seeing(base, tmp_path / "seeing")}
    check_alike({name: Checkpoint.open(path) for name, path in folders.items()}, first)


def test_a_language_part_of_another_meaning_is_refused(base: Path, tmp_path: Path) -> None:
    other = seeing(base, tmp_path / "seeing", rms_norm_eps=0.5)
    models = {"language": Checkpoint.open(base), "seeing": Checkpoint.open(other)}
    with pytest.raises(ModelError, match="differ in 'rms_norm_eps' of config"):
        check_alike(models, "language")
