"""The vocabulary of a merge: its tokens, and which rows of which inputs make each output row.

Models with other tokenizers are brought to one numbering before they are merged: every tensor with
a row per token is read through `aligned`, which puts rows in their new places and fills those that
a model lacks. The rules are mergekit's; where rows stand in files is the checkpoint's business.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evomerge.errors import ModelError, RecipeError, nearest
from evomerge.merge.checkpoint import Checkpoint, Read
from evomerge.merge.tokenizer import (
    AddedToken,
    Tokenizer,
    edited_files,
    joined,
    read_tokenizers,
    shown,
    vocabulary_size,
)
from evomerge.recipe import TokenizerSettings, TokenRow, TokenRule

_log = logging.getLogger(__name__)

_LACKING = -1  # in `owned`: the model has no row for this token
# Donors that are no input:
_ZERO = -1  # the row is zeros
_MEAN = -2  # the mean of the inputs that have the token
_FILL = -3  # no token has this number: the mean of all rows that have one

_GAP = 4096  # elements: rows this close together are read in one go
_BLOCK = 1 << 19  # elements held while a mean over all rows is made

_NUMBER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

Numbers = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the rows of one input come from, [size] each.

    donor: a position in `inputs`, or _ZERO, _MEAN or _FILL. row: the row there, where it is one.
    owned: [inputs, size], the row that each input has of each output row's token, or _LACKING.
    """

    inputs: tuple[str, ...]
    donor: Numbers
    row: Numbers
    owned: Numbers


@dataclass(frozen=True)
class _Rule:
    """A token's rule, resolved. donor: None for zeros; row: _LACKING if the donor has none."""

    token: str
    donor: str | None
    row: int
    force: bool


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of the output. It concerns every tensor whose rows are tokens: the embeddings,
    the head, and the head's bias.

    size: rows of such a tensor, padding included. files: the tokenizer's, by name.
    """

    size: int
    files: Mapping[str, bytes]
    _tokens: Mapping[str, int]
    _owned: Mapping[str, Numbers]  # by model, [size]: its row of each output row's token
    _rules: Mapping[int, _Rule]  # by output row
    _special: Mapping[str, Any]  # keys of config.json that number special tokens

    def configured(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with this vocabulary's size and special tokens."""
        changed = {**config, **self._special}
        text = config.get("text_config")
        in_text = isinstance(text, Mapping) and "vocab_size" in text
        if in_text:
            changed["text_config"] = {**changed["text_config"], "vocab_size": self.size}
        if not in_text or "vocab_size" in config:
            changed["vocab_size"] = self.size
        return changed

    def rows(
        self, inputs: Sequence[str], base: str | None, heights: Mapping[str, int]
    ) -> dict[str, Rows | None]:
        """Where the rows of each input of one tensor come from; None where they stay as they are.

        An input has the row of a token that its tokenizer has. The others take it from the only
        input that has it, else from `base` if it is an input and has it, else as the mean of those
        that have it, else zeros; a token's own rule comes before all that.
        heights: how many rows the tensor of each input has.
        Raises RecipeError for a rule that needs a model that is no input or lacks the token, and
        ModelError for an input with fewer rows than its config says.
        """
        inputs = tuple(inputs)
        owned = np.stack([self._owned[name] for name in inputs])
        for name, rows in zip(inputs, owned, strict=True):
            if rows.max(initial=0) >= heights[name]:
                raise ModelError(
                    f"model '{name}' has {heights[name]} rows of embeddings and its config.json "
                    f"counts at least {rows.max() + 1}: correct vocab_size"
                )
        has = owned != _LACKING
        donor, row = self._defaults(inputs, base, owned, has)
        forced = np.zeros(self.size, dtype=bool)
        for number, rule in self._rules.items():
            forced[number] = rule.force
            if rule.force or not has[:, number].all():
                donor[number], row[number] = _resolved(rule, inputs, heights)
        self._warn_of_zeros(donor)
        result: dict[str, Rows | None] = {}
        here = np.arange(self.size)
        for position, name in enumerate(inputs):
            own = has[position] & ~forced
            if own.all() and np.array_equal(owned[position], here) and heights[name] == self.size:
                result[name] = None
                continue
            result[name] = Rows(
                inputs,
                np.where(own, np.int32(position), donor),
                np.where(own, owned[position], row),
                owned,
            )
        return result

    def _defaults(
        self, inputs: tuple[str, ...], base: str | None, owned: Numbers, has: NDArray[np.bool_]
    ) -> tuple[Numbers, Numbers]:
        """Donor and row for inputs that lack a token, without the tokens' own rules."""
        count = has.sum(axis=0)
        donor = np.full(self.size, _MEAN, dtype=np.int32)
        if base in inputs:
            position = inputs.index(base)
            donor[has[position]] = position
        donor[count == 1] = has.argmax(axis=0)[count == 1]
        donor[count == 0] = _FILL
        tokens = np.fromiter(self._tokens.values(), dtype=np.int64, count=len(self._tokens))
        donor[tokens[count[tokens] == 0]] = _ZERO
        row = np.where(donor >= 0, owned[donor.clip(0), np.arange(self.size)], np.int32(0))
        return donor, row

    def _warn_of_zeros(self, donor: Numbers) -> None:
        zeros = set(np.flatnonzero(donor == _ZERO).tolist()) - self._rules.keys()
        if zeros:
            tokens = [token for token, number in self._tokens.items() if number in zeros]
            _log.warning(
                "%d tokens are in none of the models merged and get rows of zeros: %s",
                len(tokens),
                shown(tokens),
            )


def plan_vocabulary(
    settings: TokenizerSettings, models: Mapping[str, Checkpoint], donor: str
) -> Vocabulary:
    """The vocabulary that `settings` ask for.

    models: all of the recipe, in its order, which is the order in which a union adds tokens.
    donor: the base, or without one the model that gives config.json; its tokenizer is the 'base'
    one, and stands for models without any. Raises RecipeError for a model that the recipe does not
    merge, ModelError for a tokenizer that cannot be read.
    """
    source = donor if settings.source in ("base", "union") else settings.source
    _check_known("tokenizer.source", source, models)
    read = _read_all(models, donor, source)
    cut = {name: _without_rowless(name, models[name], read[name]) for name in models}
    output = cut[source]
    if settings.source == "union":
        output = joined(output, [cut[name] for name in models if name != source])
    output = output.extended(
        AddedToken(token) for token in settings.tokens if token not in output.numbers
    )
    size = max(output.numbers.values()) + 1
    size += -size % (settings.pad_to_multiple_of or 1)
    rules = {
        output.numbers[token]: _rule(token, rule, models, read, cut)
        for token, rule in settings.tokens.items()
        if rule.source is not None
    }
    config = models[source].config if source != donor else {}
    return Vocabulary(
        size,
        edited_files(models[source], read[source], output),
        output.numbers,
        _owned(output, size, cut),
        rules,
        {key: config[key] for key in _NUMBER_KEYS if key in config},
    )


def aligned(rows: Rows, reads: Mapping[str, Read], width: int, dtype: torch.dtype) -> Read:
    """Read an input with its rows put in the places of the output's tokens.

    reads: of every input of the tensor, in any dtype: values are cast to `dtype`, and means are
    made in it. width: elements of a row. Holds the rows of one span, never the tensor.
    """
    gathered = _Gathered(rows, tuple(reads[name] for name in rows.inputs), width, dtype)

    def read(start: int, stop: int) -> torch.Tensor:
        first, last = start // width, -(-stop // width)
        flat = gathered.block(first, last).view(-1)
        return flat[start - first * width : stop - first * width]

    return read


class _Gathered:
    """A re-ordered input as blocks of rows."""

    def __init__(self, rows: Rows, reads: tuple[Read, ...], width: int, dtype: torch.dtype) -> None:
        self._rows = rows
        self._reads = reads
        self._width = width
        self._dtype = dtype
        self._fill: torch.Tensor | None = None

    def block(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last), as [last - first, width]; not to be written to."""
        donor, row = self._rows.donor[first:last], self._rows.row[first:last]
        donors = np.unique(donor)
        if len(donors) == 1 and donors[0] >= 0:
            return self._gather(donors[0], row)
        block = torch.zeros(last - first, self._width, dtype=self._dtype)
        for one in donors.tolist():
            places = np.flatnonzero(donor == one)
            if one >= 0:
                values = self._gather(one, row[places])
            elif one == _MEAN:
                values = self._mean(first + places)
            elif one == _FILL:
                values = self._filling().expand(len(places), -1)
            else:
                continue
            block.index_copy_(0, torch.from_numpy(places), values)
        return block

    def _gather(self, position: int, rows: Numbers) -> torch.Tensor:
        """Rows of one input, in any order, read in runs of neighbours."""
        wanted, back = np.unique(rows, return_inverse=True)
        cuts = np.flatnonzero(np.diff(wanted) > max(1, _GAP // self._width)) + 1
        parts = []
        for run in np.split(wanted, cuts):
            start, stop = int(run[0]), int(run[-1]) + 1
            part = self._reads[position](start * self._width, stop * self._width)
            part = part.view(-1, self._width)
            if len(run) < stop - start:
                part = part[torch.from_numpy(run - start)]
            parts.append(part.to(self._dtype))
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        ordered = len(back) == len(wanted) and bool((np.diff(back) > 0).all())
        return values if ordered else values[torch.from_numpy(back)]

    def _mean(self, places: NDArray[np.intp]) -> torch.Tensor:
        """The mean of the inputs that have each token, added up and divided in the dtype."""
        total = torch.zeros(len(places), self._width, dtype=self._dtype)
        owned = self._rows.owned[:, places]
        for position, rows in enumerate(owned):
            has = np.flatnonzero(rows != _LACKING)
            if len(has):
                total.index_add_(0, torch.from_numpy(has), self._gather(position, rows[has]))
        count = torch.from_numpy((owned != _LACKING).sum(axis=0)).to(self._dtype)
        return total.div_(count[:, None])

    def _filling(self) -> torch.Tensor:
        """The mean of all rows that are tokens', made once; exact, whatever their order."""
        if self._fill is None:
            places = np.flatnonzero(self._rows.donor != _FILL)
            total = torch.zeros(self._width, dtype=torch.float64)
            step = max(1, _BLOCK // self._width)
            end = int(places[-1]) + 1
            for first in range(0, end, step):
                last = min(first + step, end)
                tokens = np.flatnonzero(self._rows.donor[first:last] != _FILL)
                if len(tokens):
                    values = self.block(first, last)[torch.from_numpy(tokens)]
                    total += values.sum(dim=0, dtype=torch.float64)
            self._fill = (total / len(places)).to(self._dtype)
        return self._fill


def _read_all(models: Mapping[str, Checkpoint], donor: str, source: str) -> dict[str, Tokenizer]:
    """Each model's tokenizer; the donor's for those without any."""
    read = read_tokenizers(models)
    theirs = read[donor]
    if theirs is None or read[source] is None:
        name = donor if theirs is None else source
        raise ModelError(f"model '{name}' has no tokenizer, which the recipe asks for: add one")
    for name in (name for name, tokenizer in read.items() if tokenizer is None):
        _log.warning("model '%s' has no tokenizer: taken to be that of '%s'", name, donor)
    return {name: tokenizer or theirs for name, tokenizer in read.items()}


def _without_rowless(name: str, model: Checkpoint, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer as far as the model has rows for it, which config.json tells."""
    rows = vocabulary_size(model.config)
    if rows is None or (cut := tokenizer.cut(rows)) is tokenizer:
        return tokenizer
    gone = tokenizer.numbers.keys() - cut.numbers.keys()
    _log.warning(
        "model '%s' has %d rows of embeddings, none for %d of its tokens, which are left out: %s",
        name,
        rows,
        len(gone),
        shown(gone),
    )
    return cut


def _owned(output: Tokenizer, size: int, cut: Mapping[str, Tokenizer]) -> dict[str, Numbers]:
    """For each model its row of each output row's token."""
    places = np.fromiter(output.numbers.values(), dtype=np.int64, count=len(output.numbers))
    known: dict[int, Numbers] = {}
    owned: dict[str, Numbers] = {}
    for name, tokenizer in cut.items():
        if id(tokenizer) not in known:
            own = tokenizer.numbers.get
            rows = np.full(size, _LACKING, dtype=np.int32)
            rows[places] = [own(token, _LACKING) for token in output.numbers]
            known[id(tokenizer)] = rows
        owned[name] = known[id(tokenizer)]
    return owned


def _rule(
    token: str,
    rule: TokenRule,
    models: Mapping[str, Checkpoint],
    read: Mapping[str, Tokenizer],
    cut: Mapping[str, Tokenizer],
) -> _Rule:
    source, where = rule.source, f"tokenizer.tokens.{token}.source"
    if isinstance(source, str):
        _check_known(where, source, models)
        return _Rule(token, source, cut[source].numbers.get(token, _LACKING), rule.force)
    if not isinstance(source, TokenRow):
        return _Rule(token, None, _LACKING, rule.force)
    _check_known(f"{where}.model", source.model, models)
    if source.token is None:
        number = source.token_id
    else:
        number = read[source.model].numbers.get(source.token)
    if number is None:
        raise RecipeError(
            f"{where}.token: '{source.model}' has no token {source.token!r}: name one that it has"
        )
    return _Rule(token, source.model, number, rule.force)


def _resolved(rule: _Rule, inputs: tuple[str, ...], heights: Mapping[str, int]) -> tuple[int, int]:
    """Donor and row of a token with a rule of its own."""
    if rule.donor is None:
        return _ZERO, 0
    where = f"tokenizer.tokens.{rule.token}.source"
    if rule.donor not in inputs:
        raise RecipeError(
            f"{where}: '{rule.donor}' is no input of every tensor with tokens: name one that is"
        )
    if rule.row == _LACKING:
        raise RecipeError(f"{where}: '{rule.donor}' has no such token: name a model that has it")
    if rule.row >= heights[rule.donor]:
        raise RecipeError(
            f"{where}: '{rule.donor}' has no row {rule.row}: it has {heights[rule.donor]}"
        )
    return inputs.index(rule.donor), rule.row


def _check_known(where: str, name: str, models: Mapping[str, Checkpoint]) -> None:
    if name not in models:
        raise RecipeError(f"{where}: '{name}' is no model of the recipe: {nearest(name, models)}")
