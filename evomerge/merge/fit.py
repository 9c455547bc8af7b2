"""Whether models may share one config and one tokenizer, as they do in a search.

Shapes and names of tensors are the plan's business; here is what tensors mean: a model that was
trained with other rotary frequencies or other token numbers is another model under this config.
"""

import json
from collections.abc import Mapping
from typing import Any

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint

# Keys that do not change what the tensors compute, or that the plan settles.
_FREE = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "n_layer",
        "num_hidden_layers",
        "num_layers",
        "pad_token_id",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def check_alike(models: Mapping[str, Checkpoint], first: str) -> None:
    """Raise ModelError unless every model computes under the config and tokenizer of `first`."""
    ours, words = _meaning(models[first]), _vocabulary(models[first])
    for name, model in models.items():
        theirs = _meaning(model)
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise ModelError(
                    f"'{name}' and '{first}' differ in '{key}' of config.json "
                    f"({theirs.get(key)} and {ours.get(key)}): they do not fit together: merged "
                    "models share one config"
                )
        if words is not None and _vocabulary(model) not in (None, words):
            raise ModelError(
                f"'{name}' and '{first}' number their tokens differently: they do not fit "
                "together: merged models share one tokenizer"
            )


def _meaning(model: Checkpoint) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if key not in _FREE}


def _vocabulary(model: Checkpoint) -> Any:
    """What tells which token has which number; None without a tokenizer.json."""
    path = model.path / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        return tokenizer["model"].get("vocab"), [
            (token["id"], token["content"]) for token in tokenizer.get("added_tokens") or ()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"model file '{path}' is no tokenizer: {error}") from None
