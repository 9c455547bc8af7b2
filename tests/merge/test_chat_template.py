"""The chat template that a recipe asks for."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from evomerge.errors import ModelError, RecipeError
from evomerge.merge.chat_template import BUILT_IN, chosen_template, template_of, with_template
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.tokenizer import tokenizer_files
from tests.merge.tokenized import words, write_files, write_model

JINJA = "{% for message in messages %}{{ message.content }}{% endfor %}"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes"},
    {"role": "user", "content": "More"},
]
RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nYes\n\n"
    "### Instruction:\nMore\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes[|endofturn|]\n"
    "[|user|]More\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nMore<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nHi [/INST] Yes</s> [INST] More [/INST]",
}


def make_model(folder: Path, template: Any = None) -> Checkpoint:
    described = {"bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        described["chat_template"] = template
    return write_model(folder, words("?", "<s>", "</s>"), described=described)


def loaded(folder: Path, model: Checkpoint, template: str) -> Any:
    files = with_template(tokenizer_files(model), template)
    return AutoTokenizer.from_pretrained(write_files(folder, files))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_render_the_published_format(tmp_path: Path, name: str) -> None:
    tokenizer = loaded(tmp_path / "out", make_model(tmp_path / "model"), chosen_template(name, {}))
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == RENDERED[name]


def test_exaone_begins_with_a_system_turn(tmp_path: Path) -> None:
    tokenizer = loaded(tmp_path / "out", make_model(tmp_path / "model"), BUILT_IN["exaone"])
    text = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False)
    assert text == "[|system|][|endofturn|]\n[|user|]Hi\n"


def test_auto_is_the_most_common_one_and_the_first_of_equals(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["{{ 1 }}", "{{ 2 }}\n", None, "{{ 2 }}", "{{ 1 }}", "{{ 2 }}"]
    models = {str(i): make_model(tmp_path / str(i), text) for i, text in enumerate(texts)}
    assert chosen_template("auto", models) == "{{ 2 }}"
    del models["5"]
    assert chosen_template("auto", models) == "{{ 1 }}"
    assert chosen_template("auto", {"2": models["2"]}) is None
    assert "no model has a chat template" in caplog.text


def test_where_a_model_has_its_template(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    model = make_model(tmp_path / "model", several)
    assert template_of(model) == "d"
    (model.path / "chat_template.jinja").write_text("{{ 3 }}")
    assert template_of(model) == "{{ 3 }}"
    assert template_of(make_model(tmp_path / "bare")) is None
    assert template_of(write_model(tmp_path / "none", None, rows=2)) is None


@pytest.mark.parametrize(
    "text",
    [
        JINJA,
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}",
    ],
)
def test_jinja_is_taken_as_it_is(text: str) -> None:
    assert chosen_template(text, {}) == text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("chatlm", "'chatlm' is no template and no name of one: did you mean 'chatml'?"),
        ("{{ x }}", "'{{ x }}' is no template and no name of one: known: alpaca, auto"),
        ("a sentence that is no template at all", "is no template and no name of one"),
        ("\n\n{% for m in messages %}{{ m }}", "line 3 is not Jinja: Unexpected end of template"),
        ("{% loop %} over nothing at all", "line 1 is not Jinja: .*unknown tag 'loop'"),
    ],
)
def test_what_is_no_template(setting: str, message: str) -> None:
    pattern = message if ".*" in message else re.escape(message)
    with pytest.raises(RecipeError, match=pattern):
        chosen_template(setting, {})


def test_the_files_have_one_template(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "{{ 'old' }}")
    (model.path / "chat_template.json").write_text('{"chat_template": "old"}')
    files = with_template(tokenizer_files(model), JINJA)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert json.loads(files["tokenizer_config.json"])["eos_token"] == "</s>"
    tokenizer = AutoTokenizer.from_pretrained(write_files(tmp_path / "out", files))
    assert tokenizer.apply_chat_template(CHAT[:2], tokenize=False) == "Be brief.Hi"


def test_damaged_files(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model.path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelError, match=r"chat_template\.jinja' cannot be read"):
        chosen_template("auto", {"model": model})
    with pytest.raises(ModelError, match=r"tokenizer_config\.json is not JSON"):
        with_template({"tokenizer_config.json": b"{"}, JINJA)
