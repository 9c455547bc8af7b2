"""A model's tokenizer as data: which token has which number, joined, cut, compared and written.

Works on `tokenizer.json` and the files beside it as JSON and never encodes text. Numbers are those
that transformers gives on loading: tokens of the model part keep theirs, and added tokens without
one follow in order, those that only `tokenizer_config.json` names last. Knows nothing of weights.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from evomerge.errors import ModelError
from evomerge.merge.chat_template import template_of
from evomerge.merge.checkpoint import TOKENIZER_FILES, Checkpoint
from evomerge.merge.shards import read_bytes, read_json

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_SPECIAL_NAMES = tuple(f"{name}_token" for name in _SPECIAL)
_SPECIAL_LISTS = ("extra_special_tokens", "additional_special_tokens")
_OTHER_FORMS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
# What holds the vocabulary a second time, and would contradict an edited tokenizer.json.
_SECOND_FORMS = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before the rest is split; the fields are the format's."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True)
class Tokenizer:
    """numbers: of every token. added: settings of those that are added ones, by token.
    learned: how many tokens the model part (BPE, Unigram...) has of itself."""

    numbers: Mapping[str, int]
    added: Mapping[str, AddedToken]
    learned: int

    def cut(self, rows: int) -> "Tokenizer":
        """Without the tokens numbered `rows` and above, which have no row in the embeddings."""
        if max(self.numbers.values(), default=-1) < rows:
            return self
        numbers = {token: number for token, number in self.numbers.items() if number < rows}
        dropped = self.numbers.keys() - numbers.keys()
        learned = self.learned - len(dropped - self.added.keys())
        added = {token: added for token, added in self.added.items() if token in numbers}
        return Tokenizer(numbers, added, learned)

    def extended(self, tokens: Iterable[AddedToken]) -> "Tokenizer":
        """With more added tokens. One that is there keeps its number, and its settings if it was
        an added one."""
        numbers, added = dict(self.numbers), dict(self.added)
        highest = max((numbers[token] for token in added), default=-1)
        for token in tokens:
            if token.content not in numbers:
                highest = max(highest + 1, self.learned)
                numbers[token.content] = highest
            added.setdefault(token.content, token)
        return Tokenizer(numbers, added, self.learned)


def read_tokenizers(models: Mapping[str, Checkpoint]) -> dict[str, Tokenizer | None]:
    """Each model's tokenizer, by the model's name; None for a folder that has none at all.

    Equal files are read once and give one and the same object. Raises ModelError for a tokenizer
    in another form than tokenizer.json, or a malformed one.
    """
    return _by_content(models, _read)


def joined(first: Tokenizer, others: Iterable[Tokenizer]) -> Tokenizer:
    """`first`, and after its tokens those of the others as added tokens, by number.

    What is an added token anywhere becomes one, with the settings of the first that has it so.
    """
    others = list(others)
    settings: dict[str, AddedToken] = {}
    unlike: set[str] = set()
    for tokenizer in (first, *others):
        for token, added in tokenizer.added.items():
            if settings.setdefault(token, added) != added:
                unlike.add(token)
    if unlike:
        _log.warning(
            "%d added tokens have other settings in other models, the first one's are kept: %s",
            len(unlike),
            shown(unlike),
        )
    wanted: dict[str, AddedToken] = {}
    for tokenizer in others:
        for token in sorted(tokenizer.numbers, key=tokenizer.numbers.__getitem__):
            if token in settings or token not in first.numbers:
                wanted.setdefault(token, settings.get(token, AddedToken(token)))
    return first.extended(wanted.values())


def tokenizer_files(model: Checkpoint) -> dict[str, bytes]:
    """A model's tokenizer files as they are, by name."""
    files = {name: model.path / name for name in TOKENIZER_FILES}
    return {name: read_bytes(path) for name, path in files.items() if path.is_file()}


def edited_files(model: Checkpoint, before: Tokenizer, after: Tokenizer) -> dict[str, bytes]:
    """The files of a model's tokenizer, `before`, once it has become `after`, by name.

    Nothing is rewritten that does not change. Raises ModelError as read_tokenizers does.
    """
    files = tokenizer_files(model)
    data = None if before == after else _tokenizer_json(model)
    if data is None:
        return files
    for name in _SECOND_FORMS:
        if files.pop(name, None) is not None:
            _log.info("%s is left out: the vocabulary of tokenizer.json has changed", name)
    gone = before.numbers.keys() - after.numbers.keys()
    if gone:
        _drop(data["model"], gone)
    order = sorted(after.added, key=after.numbers.__getitem__)
    data["added_tokens"] = [
        {"id": after.numbers[token], **asdict(after.added[token])} for token in order
    ]
    files["tokenizer.json"] = _dumped(data)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if name in files:
            described = read_json(model.path / name)
            files[name] = _dumped(_described(described, after, gone))
    return files


@dataclass(frozen=True)
class Comparison:
    """How a model's tokenizer stands to the base's.

    tokens: how many it has; rows: vocab_size of the model's config, None if it has none.
    lacking, extra, renumbered: tokens that only the base has, that only this one has, and that
    both have under other numbers. pipeline: the rest of tokenizer.json (normalizer, merges...) is
    the same; template: so is the chat template. special: (key, here, in the base) of special
    tokens that differ.
    """

    tokens: int
    rows: int | None
    lacking: int
    extra: int
    renumbered: int
    pipeline: bool
    template: bool
    special: tuple[tuple[str, str | None, str | None], ...]

    @property
    def same(self) -> bool:
        """Text becomes the same numbers with both."""
        return self.pipeline and not (self.lacking or self.extra or self.renumbered)


def compare(models: Mapping[str, Checkpoint], base: str) -> dict[str, Comparison | None]:
    """Each model's tokenizer against the base's, by name; None where one of the two has no
    tokenizer.json. Raises ModelError for a malformed one."""
    readable = {name: model for name, model in models.items() if _path(model).is_file()}
    whole = _by_content(readable, _read_whole)
    if base not in whole:
        return dict.fromkeys(models)
    theirs = template_of(models[base])
    return {
        name: _compared(model, whole[name], whole[base], template_of(model) == theirs)
        if name in whole
        else None
        for name, model in models.items()
    }


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """`vocab_size`, of the text part in models of several parts; None if config.json has none."""
    for part in (config.get("text_config"), config):
        size = part.get("vocab_size") if isinstance(part, Mapping) else None
        if isinstance(size, int):
            return size
    return None


def shown(tokens: Iterable[str], most: int = 5) -> str:
    """A few of many tokens, for a message."""
    ordered = sorted(tokens)
    return ", ".join(repr(token) for token in ordered[:most]) + (" ..." * (len(ordered) > most))


def _by_content(
    models: Mapping[str, Checkpoint], read: Callable[[Checkpoint], _T]
) -> dict[str, _T]:
    """What `read` makes of each model, once for those whose tokenizer files are the same."""
    known: dict[bytes, _T] = {}
    result: dict[str, _T] = {}
    for name, model in models.items():
        digest = hashlib.sha256()
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
            path = model.path / file
            digest.update(hashlib.sha256(read_bytes(path) if path.is_file() else b"").digest())
        key = digest.digest()
        if key not in known:
            known[key] = read(model)
        result[name] = known[key]
    return result


def _read(model: Checkpoint) -> Tokenizer | None:
    data = _tokenizer_json(model)
    return None if data is None else _tokenizer(model, data)


def _tokenizer(model: Checkpoint, data: Mapping[str, Any]) -> Tokenizer:
    try:
        learned = _learned(data["model"])
        entries = [_added(entry) for entry in data.get("added_tokens") or ()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _malformed(model, error) from None
    described = _settings(model)
    try:
        declared = {added.content: added for added in _declared(described)}
        special = _special(described)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"model '{model.path}': tokenizer_config.json (or special_tokens_map.json) lists no "
            f"tokens: {error}: copy it again"
        ) from None
    entries = [declared.get(added.content, added) for added in entries]
    entries += [*declared.values(), *special.values()]
    return Tokenizer(learned, {}, len(learned)).extended(entries)


@dataclass(frozen=True)
class _Whole:
    tokenizer: Tokenizer
    special: Mapping[str, str]
    pipeline: str


def _read_whole(model: Checkpoint) -> _Whole:
    data = _tokenizer_json(model) or {}
    tokenizer = _tokenizer(model, data)
    special = {key: added.content for key, added in _special(_settings(model)).items()}
    merges = data["model"].get("merges") or ()
    rest = {k: v for k, v in data.items() if k not in ("model", "added_tokens", "version")}
    rest["model"] = {k: v for k, v in data["model"].items() if k not in ("vocab", "merges")}
    rest["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return _Whole(tokenizer, special, digest)


def _compared(model: Checkpoint, ours: _Whole, theirs: _Whole, template: bool) -> Comparison:
    here, there = ours.tokenizer.numbers, theirs.tokenizer.numbers
    shared = here.keys() & there.keys()
    keys = [key for key in _SPECIAL_NAMES if ours.special.get(key) != theirs.special.get(key)]
    return Comparison(
        tokens=len(here),
        rows=vocabulary_size(model.config),
        lacking=len(there) - len(shared),
        extra=len(here) - len(shared),
        renumbered=sum(here[token] != there[token] for token in shared),
        pipeline=ours.pipeline == theirs.pipeline,
        template=template,
        special=tuple((key, ours.special.get(key), theirs.special.get(key)) for key in keys),
    )


def _path(model: Checkpoint) -> Path:
    return model.path / "tokenizer.json"


def _tokenizer_json(model: Checkpoint) -> dict[str, Any] | None:
    if _path(model).is_file():
        data = read_json(_path(model))
        if not isinstance(data.get("model"), dict):
            raise _malformed(model, "it has no 'model'")
        return data
    other = next((name for name in _OTHER_FORMS if (model.path / name).is_file()), None)
    if other is None:
        return None
    raise ModelError(
        f"model '{model.path}' has its tokenizer as {other} only: save it once with transformers' "
        "AutoTokenizer, which writes the tokenizer.json that joining needs"
    )


def _malformed(model: Checkpoint, reason: object) -> ModelError:
    return ModelError(f"model file '{_path(model)}' is no tokenizer: {reason}: copy it again")


def _learned(part: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of the model part's own tokens; Unigram lists them in order, with a score each."""
    vocabulary = part["vocab"]
    if isinstance(vocabulary, list):
        return {token: number for number, (token, _score) in enumerate(vocabulary)}
    if not set(map(type, vocabulary.values())) <= {int}:
        raise ValueError("a token of its vocabulary has no number")
    return dict(vocabulary)


def _drop(part: dict[str, Any], gone: Iterable[str]) -> None:
    """Take tokens, and merges that need them, out of the model part."""
    gone = set(gone)
    if isinstance(part["vocab"], list):
        part["vocab"] = [entry for entry in part["vocab"] if entry[0] not in gone]
    else:
        part["vocab"] = {token: n for token, n in part["vocab"].items() if token not in gone}
    if part.get("merges"):
        part["merges"] = [merge for merge in part["merges"] if gone.isdisjoint(_merged(merge))]


def _merged(merge: str | Sequence[str]) -> tuple[str, ...]:
    """The two tokens of a merge and the one that they make."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right


def _added(entry: Any, **defaults: bool) -> AddedToken:
    """From JSON: the token itself, or its text with settings."""
    if isinstance(entry, str):
        return AddedToken(entry, **defaults)
    known = {field.name for field in fields(AddedToken)}
    return AddedToken(**{**defaults, **{k: v for k, v in entry.items() if k in known}})


def _settings(model: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json; in the older form, which does not list the added tokens, with what
    special_tokens_map.json says in its stead."""
    config, older = model.path / "tokenizer_config.json", model.path / "special_tokens_map.json"
    described = read_json(config) if config.is_file() else {}
    if "added_tokens_decoder" not in described and older.is_file():
        described |= read_json(older)
    return described


def _declared(described: Mapping[str, Any]) -> list[AddedToken]:
    """The added tokens that tokenizer_config.json lists, by number."""
    listed: Mapping[str, Any] = described.get("added_tokens_decoder") or {}
    return [_added(listed[number]) for number in sorted(listed, key=int)]


def _special(described: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The special tokens by key, in the order in which transformers adds those that are missing."""
    flags = {"normalized": False, "special": True}
    named = {key: described[key] for key in _SPECIAL_NAMES if described.get(key)}
    for key in _SPECIAL_LISTS:
        listed = described.get(key) or ()
        values = listed.values() if isinstance(listed, Mapping) else listed
        named |= {f"{key}[{position}]": value for position, value in enumerate(values)}
    return {key: _added(value, **flags) for key, value in named.items()}


def _described(described: dict[str, Any], tokenizer: Tokenizer, gone: set[str]) -> dict[str, Any]:
    """tokenizer_config.json or special_tokens_map.json, made to agree with an edited tokenizer."""
    if described.get("added_tokens_decoder"):
        order = sorted(tokenizer.added, key=tokenizer.numbers.__getitem__)
        described["added_tokens_decoder"] = {
            str(tokenizer.numbers[token]): asdict(tokenizer.added[token]) for token in order
        }
    for key in _SPECIAL_NAMES:
        if described.get(key) and _added(described[key]).content in gone:
            _log.warning("%s %r is dropped: it has no embedding", key, described.pop(key))
    for key in _SPECIAL_LISTS:
        if isinstance(described.get(key), list):
            described[key] = [v for v in described[key] if _added(v).content not in gone]
    return described


def _dumped(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, ensure_ascii=False).encode()  # indentation takes seconds here
