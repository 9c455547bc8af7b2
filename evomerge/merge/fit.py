"""Whether models mean the same by their tensors: config, tokenizer, special tokens, chat template.

Shapes and names of tensors are the plan's business. A model that was trained with other rotary
frequencies or other token numbers is another model under this config: a search refuses it, a merge
by hand goes through and its reader should know.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from evomerge.errors import ModelError
from evomerge.merge.chat_template import template_of
from evomerge.merge.checkpoint import Checkpoint, dtype_name
from evomerge.merge.tokenizer import Comparison, compare, vocabulary_size
from evomerge.recipe import Recipe

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
_SHOWN = 6  # keys of a config in one finding
_LONGEST = 60  # characters of a config's value


def check_alike(models: Mapping[str, Checkpoint], first: str) -> None:
    """Raise ModelError unless every model computes under the config and tokenizer of `first`.

    Of a model of several parts and a language model only what both say of the latter is compared.
    """
    words = _vocabulary(models[first])
    for name, model in models.items():
        ours, theirs = _comparable(models[first], model)
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


def _comparable(one: Checkpoint, other: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """What two configs say that has to agree."""
    texts = [model.config.get("text_config") for model in (one, other)]
    if (texts[0] is None) == (texts[1] is None):
        return _meaning(one), _meaning(other)
    ours, theirs = (
        dict(_entries(text or model.config))
        for text, model in zip(texts, (one, other), strict=True)
    )
    # A part's config leaves out what is its architecture's default.
    both = ours.keys() & theirs.keys()
    return {key: ours[key] for key in both}, {key: theirs[key] for key in both}


@dataclass(frozen=True)
class Finding:
    """Something that a reader should know before a merge.

    level: 'error', the merge would be refused; 'warning', it would go through and may not be what
    is wanted; 'info'. about: what it concerns, in a word or two.
    """

    level: Literal["error", "warning", "info"]
    about: str
    text: str


def architectures(models: Mapping[str, Checkpoint], donor: str) -> list[Finding]:
    """Models of another kind than the one that gives the config."""
    ours = models[donor].config.get("model_type")
    kinds = {name: model.config.get("model_type") for name, model in models.items()}
    return [
        Finding(
            "warning",
            "architecture",
            f"'{name}' is of the kind {kind} and '{donor}', which gives the config, {ours}: they "
            "are merged as far as their tensors fit",
        )
        for name, kind in kinds.items()
        if kind != ours
    ]


def differences(models: Mapping[str, Checkpoint], donor: str, recipe: Recipe) -> list[Finding]:
    """What the models mean otherwise than the donor, whose config the merge gets."""
    others = {name: model for name, model in models.items() if name != donor}
    found = [f for name in others for f in _of_config(models[donor], donor, others[name], name)]
    found += _of_dtypes(models, recipe)
    if not models[donor].plain:
        found += _of_vocabularies(models, donor, recipe)
    return found


def _meaning(model: Checkpoint) -> dict[str, Any]:
    """What of a config tells how its tensors are used, keys of parts as 'text_config.rope_theta'.
    A key without a value is as good as none."""
    return dict(_entries(model.config))


def _entries(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in _with_older_rope(config).items():
        if key in _FREE or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _with_older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as they were written before `rope_parameters`: a model saved again by a newer
    transformers is the same model."""
    changed = dict(config)
    newer = changed.get("rope_parameters")
    if isinstance(newer, Mapping) and not any(isinstance(v, Mapping) for v in newer.values()):
        del changed["rope_parameters"]
        changed["rope_theta"] = newer.get("rope_theta")
        changed["rope_scaling"] = {k: v for k, v in newer.items() if k != "rope_theta"}
    scaling = changed.get("rope_scaling")
    if isinstance(scaling, Mapping):
        kind = scaling.get("rope_type", scaling.get("type"))
        rest = {k: v for k, v in scaling.items() if k not in ("rope_type", "type")}
        changed["rope_scaling"] = rest if kind in (None, "default") else {"rope_type": kind, **rest}
    return changed


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


def _of_config(donor: Checkpoint, donor_name: str, model: Checkpoint, name: str) -> list[Finding]:
    if donor.config.get("model_type") != model.config.get("model_type"):
        return []  # their keys are not comparable
    ours, theirs = _meaning(donor), _meaning(model)
    kept = [key for key in sorted({**ours, **theirs}) if key.split(".")[-1] != "vocab_size"]
    unlike = [key for key in kept if key in ours and key in theirs and ours[key] != theirs[key]]
    found = [
        Finding(
            "warning",
            "config",
            f"'{key}' is {_short(theirs[key])} in '{name}' and {_short(ours[key])} in "
            f"'{donor_name}', whose config the merge gets",
        )
        for key in unlike
    ]
    for owner, own, other in ((name, theirs, ours), (donor_name, ours, theirs)):
        alone = [key for key in kept if key in own and key not in other]
        if alone:
            keys = ", ".join(alone[:_SHOWN]) + " ..." * (len(alone) > _SHOWN)
            beside = donor_name if owner == name else name
            text = f"only the config of '{owner}' says {keys}; that of '{beside}' does not"
            found.append(Finding("info", "config", text))
    return found


def _of_dtypes(models: Mapping[str, Checkpoint], recipe: Recipe) -> list[Finding]:
    dtypes = dict.fromkeys(dtype_name(model.dtype) for model in models.values())
    if recipe.dtype is not None or len(dtypes) == 1:
        return []
    text = (
        f"models are stored as {' and '.join(dtypes)}: without 'dtype' a tensor becomes what holds "
        "all its inputs"
    )
    return [Finding("info", "dtype", text)]


def _of_vocabularies(models: Mapping[str, Checkpoint], donor: str, recipe: Recipe) -> list[Finding]:
    """Everything that turns text into rows of embeddings, against what the output gets."""
    settings = recipe.vocabulary
    owner = settings.source if settings and settings.source in models else donor
    sizes = {name: vocabulary_size(model.config) for name, model in models.items()}
    found = []
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{size} in '{name}'" for name, size in sizes.items())
        found.append(Finding("info", "vocabulary", f"rows of embeddings: {listed}"))
    try:
        compared = compare(models, owner)
        templates = {name: template_of(model) for name, model in models.items()}
    except ModelError as error:
        found.append(Finding("warning", "tokenizer", f"not compared: {error}"))
        return found
    lacking = [f"'{name}'" for name, comparison in compared.items() if comparison is None]
    if compared[owner] is None or lacking:
        which = f"'{owner}'" if compared[owner] is None else ", ".join(lacking)
        text = f"not compared: {which} without tokenizer.json"
        found.append(Finding("info", "tokenizer", text))
    for name, comparison in compared.items():
        if comparison is not None and name != owner:
            found += _of_tokenizer(name, owner, comparison, aligned=settings is not None)
    return found if recipe.chat_template is not None else found + _of_templates(templates, owner)


def _of_tokenizer(name: str, owner: str, found: Comparison, aligned: bool) -> Iterator[Finding]:
    if found.lacking or found.extra or found.renumbered:
        numbers = (
            f"'{name}' lacks {found.lacking} tokens of '{owner}', has {found.extra} of its own and "
            f"{found.renumbered} under other numbers"
        )
        if aligned:
            yield Finding("info", "tokenizer", f"{numbers}: rows are put in the output's order")
        else:
            remedy = "rows are merged by number, whatever their tokens: give a tokenizer_source"
            yield Finding("warning", "tokenizer", f"{numbers}: {remedy}")
    elif not found.pipeline:
        text = f"'{name}' cuts text into tokens otherwise than '{owner}', as whose the output will"
        yield Finding("warning", "tokenizer", text)
    if found.special:
        listed = [
            f"{key} {_short(here)} (there {_short(there)})" for key, here, there in found.special
        ]
        contradict = any(here and there for _, here, there in found.special)
        yield Finding(
            "warning" if contradict else "info",
            "special tokens",
            f"'{name}' has others than '{owner}', whose the output gets: {', '.join(listed)}",
        )


def _of_templates(templates: Mapping[str, str | None], owner: str) -> list[Finding]:
    ours = templates[owner]
    unlike = [f"'{name}'" for name, theirs in templates.items() if theirs not in (None, ours)]
    if not unlike:
        return []
    gets = "gets none" if ours is None else "has another"
    text = (
        f"that of {', '.join(unlike)} is lost: the output {gets}, as '{owner}': choose by "
        "chat_template"
    )
    return [Finding("warning", "chat template", text)]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
