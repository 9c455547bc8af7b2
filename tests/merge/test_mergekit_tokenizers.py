"""The same vocabulary and the same row for every token, through mergekit 0.1.5 and evomerge.

Parents whose tokenizers differ are merged with equal weights, and with all the weight on one of
them, so that the output is that parent's embeddings in the new order. mergekit numbers the tokens
of a union differently on each run: rows are compared token by token.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE
from transformers import AutoTokenizer

from tests.merge.test_mergekit import DRIVER, MERGEKIT, ROOT, reference_python

pytestmark = pytest.mark.mergekit

HIDDEN = 16
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# The models in the order of the inputs, and the rest of the recipe.
CASES: dict[str, tuple[str, str]] = {
    "union": ("a b c base", "{base_model: $base, tokenizer_source: union}"),
    "union-base-first": ("base c b", "{base_model: $base, tokenizer_source: union}"),
    "union-without-base": ("a b c", "{tokenizer_source: union}"),
    "union-stripped": ("a short", "{base_model: $short, tokenizer_source: union}"),
    "base": ("a b c base", "{base_model: $base, tokenizer_source: base}"),
    "base-stripped": ("base short", "{base_model: $short, tokenizer_source: base}"),
    "model": ("a b base", "{base_model: $base, tokenizer_source: $b}"),
    "model-without-base": ("a b c", "{tokenizer_source: $c}"),
    "same": ("base tuned", "{base_model: $base, tokenizer_source: base}"),
    "padded": (
        "a b c base",
        "{base_model: $base, tokenizer: {source: union, pad_to_multiple_of: 64}}",
    ),
    "chat-auto": (
        "a b c base",
        "{base_model: $base, tokenizer_source: union, chat_template: auto}",
    ),
    "chat-named": (
        "a b",
        "{base_model: $b, tokenizer_source: base, chat_template: chatml}",
    ),
    "rules": (
        "a b c base",
        """
        base_model: $base
        tokenizer:
          source: union
          pad_to_multiple_of: 32
          tokens:
            <|im_start|>: {source: {kind: zero}}
            <|im_end|>: {source: $b, force: true}
            </s>: {source: {kind: zero}, force: true}
            o: {source: $a}
            <new>: {source: {kind: model_token, model: $c, token: hello}}
            <newer>: {source: {kind: model_token, model: $b, token_id: 3}, force: true}
        """,
    ),
    "model-rules": (
        "a b base",
        """
        base_model: $base
        tokenizer:
          source: $a
          pad_to_multiple_of: 8
          tokens:
            <new>: {source: {kind: model_token, model: $b, token: hello}}
            <nothing>: {source: {kind: zero}}
            tool: {source: {kind: model_token, model: $base, token_id: 0}}
        """,
    ),
    "base-rules": (
        "a b base",
        """
        base_model: $base
        tokenizer:
          source: base
          tokens:
            <new>: {source: {kind: model_token, model: $b, token: hello}, force: true}
            <nothing>: {source: {kind: zero}, force: true}
            # Without force, mergekit takes the base's padding for its row of a new token.
            <|im_start|>: {source: $a, force: true}
        """,
    ),
}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
JINJA = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "mixed": None}


def bpe(merges: list[str], letters: str) -> Tokenizer:
    """A BPE whose vocabulary is numbered in the order of the letters, then of the merges."""
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = ["<unk>", *letters, *("".join(pair) for pair in pairs)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return Tokenizer(BPE(vocabulary, pairs, unk_token="<unk>"))


def special(*names: str) -> list[AddedToken]:
    return [AddedToken(name, special=True, normalized=False) for name in names]


def tokenizers() -> dict[str, Tokenizer]:
    letters = "abcdehlmnorstwy "
    merges = ["l o", "lo w", "h e", "he l", "hel lo", "t he"]
    one = {name: bpe(merges, letters) for name in ("base", "tuned", "short")}
    for tokenizer in one.values():
        tokenizer.add_tokens(special("<s>", "</s>"))
    one["short"].add_tokens([*special("<pad>"), "more"])
    one["a"] = bpe(["l o", "h e", "lo w", "r y"], letters[::-1] + "xz")
    one["a"].add_tokens([*special("</s>", "<s>", "<|im_start|>", "<|im_end|>"), "tool"])
    one["b"] = bpe(["h e", "he l", "hel l", "hell o"], letters.replace("o", "") + "o")
    one["b"].add_tokens([*special("<s>", "</s>", "<|im_end|>"), AddedToken("<b>", lstrip=True)])
    one["c"] = bpe(["h e", "he l"], "hewlordq")
    one["c"].add_tokens(["hello", *special("</s>"), "lo"])
    return one


def write_parent(folder: Path, tokenizer: Tokenizer, seed: int, dtype: str) -> None:
    name = folder.name
    count = tokenizer.get_vocab_size()
    rows = count + {"b": 5, "base": 3, "tuned": 3, "short": -2}.get(name, 0)
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDINGS: (rows, HIDDEN)}
    if name != "c":
        shapes[HEAD] = (rows, HIDDEN)
    layer = "model.layers.0."
    for key in ("q", "k", "v", "o"):
        shapes[f"{layer}self_attn.{key}_proj.weight"] = (HIDDEN, HIDDEN)
    for key in ("gate", "up", "down"):
        shapes[f"{layer}mlp.{key}_proj.weight"] = (HIDDEN, HIDDEN)
    for key in (f"{layer}input_layernorm", f"{layer}post_attention_layernorm", "model.norm"):
        shapes[f"{key}.weight"] = (HIDDEN,)
    stored = {
        key: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for key, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": dtype,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": rows,
        "tie_word_embeddings": name == "c",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save(str(folder / "tokenizer.json"))
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    described |= {"eos_token": "</s>", "unk_token": "<unk>"}
    described |= {"chat_template": JINJA} if name in {"a", "b"} else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def recipe(parents: Path, case: str, heavy: str) -> dict[str, Any]:
    """Linear, with all the weight on one model, or the same on 'all'."""
    names, rest = CASES[case]
    paths = {path.name: str(path) for path in parents.iterdir()}
    models = [
        {"model": paths[name], "parameters": {"weight": float(heavy in (name, "all"))}}
        for name in names.split()
    ]
    more: dict[str, Any] = yaml.safe_load(Template(rest).substitute(paths))
    return {"merge_method": "linear", "models": models} | more


def runs() -> list[tuple[str, str]]:
    """Each case, and the model with all the weight."""
    return [(case, one) for case, (names, _) in CASES.items() for one in (*names.split(), "all")]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each program made in `PROGRAM/CASE-HEAVY-MODE`."""
    python = reference_python()
    folder = tmp_path_factory.mktemp("mergekit-tokenizers")
    recipes = []
    for mode, dtype in DTYPES.items():
        for seed, (name, tokenizer) in enumerate(tokenizers().items()):
            stored = dtype or ("float32" if name == "a" else "bfloat16")
            write_parent(folder / "parents" / mode / name, tokenizer, seed, stored)
        for case, heavy in runs():
            recipes.append(folder / f"{case}-{heavy}-{mode}.yaml")
            text = yaml.safe_dump(recipe(folder / "parents" / mode, case, heavy))
            recipes[-1].write_text(text)
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    for program, command in {
        "mergekit": (python, "-c", DRIVER, MERGEKIT.resolve()),
        "evomerge": (sys.executable, "-c", DRIVER, "evomerge", "merge"),
    }.items():
        (folder / program).mkdir()
        jobs = json.dumps([(str(x), str(folder / program / x.stem)) for x in recipes])
        ended = subprocess.run(
            [*command, jobs], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
        )
        assert ended.returncode == 0, f"{program} stopped: {ended.stderr[-2000:]}"
    return folder


@pytest.mark.parametrize("mode", DTYPES)
@pytest.mark.parametrize(("case", "heavy"), runs())
def test_same_rows(merged: Path, case: str, heavy: str, mode: str) -> None:
    folders = [merged / program / f"{case}-{heavy}-{mode}" for program in ("mergekit", "evomerge")]
    for folder in folders:
        error = folder.with_name(f"{folder.name}.error").read_text()
        assert not error, f"{folder.parent.name}: {error}"
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in folders)
    tokens = sorted(theirs.get_vocab())
    assert sorted(ours.get_vocab()) == tokens
    if case != "union-without-base":  # there mergekit adds to the tokenizer of any of the models
        settings = {t.content: t for t in ours.added_tokens_decoder.values()}
        assert settings == {t.content: t for t in theirs.added_tokens_decoder.values()}
    if "chat" in case:
        texts = [t.apply_chat_template(CHAT, tokenize=False) for t in (theirs, ours)]
        assert texts[0] == texts[1]
    sizes = [json.loads((x / "config.json").read_text())["vocab_size"] for x in folders]
    assert sizes[0] == sizes[1]
    there, here = (torch.tensor(t.convert_tokens_to_ids(tokens)) for t in (theirs, ours))
    expected, result = (load_file(folder / "model.safetensors") for folder in folders)
    shapes = {name: (x.dtype, x.shape) for name, x in expected.items()}
    assert {name: (x.dtype, x.shape) for name, x in result.items()} == shapes
    for name in (EMBEDDINGS, HEAD):
        different = (result[name][here] != expected[name][there]).any(dim=1)
        assert [tokens[i] for i in different.nonzero()] == []
        # The mean of all rows depends on their order, which is mergekit's own in each run.
        torch.testing.assert_close(
            result[name][len(tokens) :],
            expected[name][len(tokens) :],
            rtol=torch.finfo(result[name].dtype).eps,
            atol=1e-6,
        )
