"""Models that are little but a tokenizer and embeddings, for tests of vocabularies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from evomerge.merge.checkpoint import Checkpoint

EMBEDDINGS = "model.embed_tokens.weight"
WIDTH = 3


def words(*tokens: str) -> Tokenizer:
    """A word is a token, and the first one stands for unknown words."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def bpe(letters: str, *merges: str) -> Tokenizer:
    """Tokens are numbered as given: letters, then what each merge ('l o') makes."""
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = ["<unk>", *letters, *("".join(pair) for pair in pairs)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, pairs, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def unigram(*tokens: str) -> Tokenizer:
    """The first token stands for unknown text; longer ones are likelier."""
    scored = [(token, -10.0 / len(token)) for token in tokens]
    tokenizer = Tokenizer(Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer


def write_model(
    folder: Path,
    tokenizer: Tokenizer | None,
    rows: int | None = None,
    seed: int = 0,
    described: Mapping[str, Any] | None = None,
    **config: Any,
) -> Checkpoint:
    """A model with `rows` rows of embeddings, by default as many as the tokenizer has tokens.

    described: what tokenizer_config.json says beside the class. config: keys of config.json.
    """
    folder.mkdir(parents=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        text = {"tokenizer_class": "PreTrainedTokenizerFast", **(described or {})}
        (folder / "tokenizer_config.json").write_text(json.dumps(text))
        rows = rows or tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    tensors = {EMBEDDINGS: torch.randn(rows or 1, WIDTH, generator=generator)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows, **config}))
    return Checkpoint.open(folder)


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Tokenizer files in a folder of their own, for a library to load."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder
