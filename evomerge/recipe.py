"""The recipe: what one merge is, in mergekit's YAML dialect, read, checked, written and hashed.

Knows which methods exist and which parameters they take, but nothing of tensors, files or models:
whether a recipe fits its models is found out by `evomerge.merge.planner`.
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from evomerge import yaml_text
from evomerge.errors import RecipeError, nearest
from evomerge.messages import explain, one_line
from evomerge.reference import model_name
from evomerge.signatures import METHODS, Scalar, Signature


class Filtered(BaseModel):
    """A value for the tensors whose name contains `filter`; without one, for all of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    filter: str | None = None
    value: Scalar | list[Scalar]


def _as_numbers(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; as in mergekit, text that is a number is one."""
    if isinstance(value, list):
        return [_as_numbers(entry) for entry in value]
    if isinstance(value, dict) and "value" in value:
        return {**value, "value": _as_numbers(value["value"])}
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _in_one_form(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """One message for a value that fits none of a parameter's forms, instead of one per form.
    A filter alone stands for a list of one."""
    if type(value) in (float, int, bool):
        return value  # nearly all of a search's candidates
    listed = [value] if isinstance(value, dict) else value
    checked: Any = []
    try:
        checked = handler(listed)
    except ValidationError:
        with suppress(ValidationError):
            checked = handler(_as_numbers(listed))
    forms = checked if isinstance(checked, list) else [checked]
    if not forms or any(isinstance(f, Filtered) and f.value == [] for f in forms):
        raise ValueError(
            f"{value!r}: give a number, a list of numbers or a list of {{filter, value}} entries"
        )
    return checked


Parameter = Annotated[
    list[Filtered] | Scalar | list[Scalar],
    Field(union_mode="left_to_right"),  # twice as fast for lists of filters
    WrapValidator(_in_one_form),
]
Parameters = dict[str, Parameter]


DTYPES = ("float32", "float16", "bfloat16", "float64")

# What mergekit's own files may hold and evomerge will not read past in silence.
_REFUSED_KEYS = {
    "residual_weight": "mergekit reads and never applies it: leave it out",
    "override_architecture": "layers are found from the tensors' names: leave it out",
}


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


ModelName = Annotated[str, BeforeValidator(model_name)]


class ModelEntry(_Node):
    """A parent that is merged as a whole."""

    model: ModelName
    parameters: Parameters = {}


class Source(_Node):
    """A range of a parent's layers, half open: [start, end)."""

    model: ModelName
    layer_range: tuple[int, int]
    parameters: Parameters = {}

    @property
    def length(self) -> int:
        """How many layers the range has."""
        return self.layer_range[1] - self.layer_range[0]


class Slice(_Node):
    """Consecutive layers of the output, merged from ranges of equal length."""

    sources: tuple[Source, ...]
    base_model: ModelName | None = None
    parameters: Parameters = {}


class Part(_Node):
    """What is merged into one part of a model. Exactly one of `models` and `slices` is given."""

    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    parameters: Parameters = {}


class ZeroRow(_Node):
    """An embedding of zeros."""

    kind: Literal["zero"]


class TokenRow(_Node):
    """A model's row of another token, by text or by number; exactly one of the two."""

    kind: Literal["model_token"]
    model: ModelName
    token: str | None = None
    token_id: Annotated[StrictInt, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _names_one(self) -> Self:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either 'token' or 'token_id', not both and not neither")
        return self


def _in_one_of_three_forms(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError(
            f"{value!r}: give a model, {{kind: zero}} or {{kind: model_token, model, and either "
            "token or token_id}"
        ) from None


class TokenRule(_Node):
    """Where the row of one token comes from in models that lack the token; `force`: in all."""

    source: Annotated[
        ModelName | ZeroRow | TokenRow | None, WrapValidator(_in_one_of_three_forms)
    ] = None
    force: StrictBool = False

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        if self.force and self.source is None:
            raise ValueError("force: true needs a source: name a model, {kind: zero} or a token")
        return self


class TokenizerSettings(_Node):
    """The output's tokenizer. source: 'union', 'base' or a model of the recipe."""

    source: ModelName = "union"
    pad_to_multiple_of: Annotated[StrictInt, Field(ge=1)] | None = None
    tokens: dict[str, TokenRule] = {}


class Aim(_Node):
    """Activation-informed merging (arXiv 2502.02421), on top of any method.

    calibration: a text or JSONL file; blocks x tokens of it are read. omega in [0, 1]: the share
    of its change that the most active input channel keeps; 1 changes nothing.
    """

    calibration: str
    omega: Annotated[StrictFloat, Field(ge=0, le=1)] = 0.4
    blocks: Annotated[StrictInt, Field(ge=1)] = 256
    tokens: Annotated[StrictInt, Field(ge=1)] = 512


def _as_dtype(value: Any) -> Any:
    return value.removeprefix("torch.") if isinstance(value, str) else value


DtypeName = Annotated[str, BeforeValidator(_as_dtype)]


class Recipe(_Node):
    """One merge. Exactly one of `models`, `slices` and `modules` is given.

    Model names are folders or hub ids, each as path@revision+adapter@revision where there are
    such. `dtype` is what inputs are cast to, `out_dtype` what outputs are; absent, both are the
    models' own. `modules` merges the parts of a multi-part model each in its own way. All of it
    is mergekit's dialect but `aim`.
    """

    merge_method: str
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    modules: dict[str, Part] | None = None
    base_model: ModelName | None = None
    parameters: Parameters = {}
    dtype: DtypeName | None = None
    out_dtype: DtypeName | None = None
    tokenizer_source: ModelName | None = None
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    aim: Aim | None = None

    @model_validator(mode="after")
    def _is_a_merge(self) -> Self:
        signature = METHODS.get(self.merge_method)
        if signature is None:
            raise ValueError(
                f"merge_method: '{self.merge_method}' is unknown: "
                f"{nearest(self.merge_method, METHODS)}"
            )
        if sum(given is not None for given in (self.models, self.slices, self.modules)) != 1:
            raise ValueError("give one of 'models', 'slices' and 'modules', and only one")
        if self.modules == {}:
            raise ValueError("modules: the mapping is empty: name at least one part")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give either 'tokenizer_source' or 'tokenizer', not both")
        for key in ("dtype", "out_dtype"):
            value = getattr(self, key)
            if value is not None and value not in DTYPES:
                raise ValueError(f"{key}: '{value}' is unknown: {nearest(value, DTYPES)}")
        needs_base = (
            self.merge_method if signature.base == "required" else "aim" if self.aim else None
        )
        if needs_base and self.base_model is None and self._lacks_slice_base():
            raise ValueError(f"base_model is missing: '{needs_base}' needs it")
        _check_parameters("parameters", self.parameters, self.merge_method)
        for where, part in self._bodies():
            _check_body(where, part, self.merge_method)
        return self

    def _bodies(self) -> list[tuple[str, "Recipe | Part"]]:
        """What holds `models` or `slices`, each with its place in messages."""
        if self.modules is None:
            return [("", self)]
        return [(f"modules.{name}.", part) for name, part in self.modules.items()]

    def _lacks_slice_base(self) -> bool:
        slices = [part.slices for _, part in self._bodies()]
        return any(each is None or any(s.base_model is None for s in each) for each in slices)

    @property
    def signature(self) -> Signature:
        """What this recipe's method takes."""
        return METHODS[self.merge_method]

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """The tokenizer settings, however they were given; None keeps the parents' vocabulary."""
        if self.tokenizer_source is None:
            return self.tokenizer
        return TokenizerSettings(source=self.tokenizer_source.removeprefix("model:"))

    def model_names(self) -> tuple[str, ...]:
        """Every model that the recipe names, once, the base last if it is named nowhere else."""
        names: list[str] = []
        for _, part in self._bodies():
            names += [entry.model for entry in part.models or ()]
            for piece in part.slices or ():
                names += [source.model for source in piece.sources]
                names += [piece.base_model] if piece.base_model else []
        names += [self.base_model] if self.base_model else []
        return tuple(dict.fromkeys(names))

    def parts(self, names: Collection[str]) -> dict[str, Part]:
        """What is merged into each part of a model, by the names of its parts (`layout.split`).

        `models` holds for every part. A part that `modules` leaves out is left out.
        Raises RecipeError for a part that the model lacks, and for slices of several parts.
        """
        if self.modules is not None:
            unknown = [name for name in self.modules if name not in names]
            if unknown:
                raise RecipeError(
                    f"modules: the model has no part '{unknown[0]}': {nearest(unknown[0], names)}"
                )
            return {name: self.modules[name] for name in names if name in self.modules}
        if self.slices is not None and len(names) > 1:
            raise RecipeError(
                f"slices: the model has the parts {', '.join(names)}: "
                "say which of them is sliced: use 'modules'"
            )
        part = Part.model_construct(models=self.models, slices=self.slices, parameters={})
        return dict.fromkeys(names, part)

    def skipped_layers(self) -> tuple[str, ...]:
        """Warnings of layers that fall out between two slices of one parent.

        Published frankenmerges, such as Goliath 120B (0-16, 17-32, ...), give the last layer of a
        range; read half open, as mergekit reads them, each loses that layer.
        """
        found = []
        for where, part in self._bodies():
            ranges: dict[str, list[tuple[int, int]]] = {}
            for piece in part.slices or ():
                for source in piece.sources:
                    ranges.setdefault(source.model, []).append(source.layer_range)
            for model, used in ranges.items():
                kept = {layer for start, end in used for layer in range(start, end)}
                ends = [end for (_, end), (start, _) in pairwise(used) if start == end + 1]
                lost = [str(end) for end in ends if end not in kept]
                if lost:
                    found.append(
                        f"{where}slices: '{model}' loses layers {', '.join(lost)} between its "
                        "slices: layer_range leaves out its end, so add 1 to the ends of a "
                        "layout that was published with its last layers"
                    )
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in YAML: nothing that was not given, no empty parts."""
        plain = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        for scope in _scopes(plain):
            if not scope.get("parameters", True):
                del scope["parameters"]
        return plain

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], "Recipe"], tuple[dict[str, Any]]]:
        """What is pickled for another process is plain data: a fifth of the time."""
        return Recipe.from_dict, (self.to_dict(),)

    def to_yaml(self) -> str:
        """mergekit YAML; reading it back gives an equal recipe."""
        return yaml.dump(self.to_dict(), Dumper=_FlowDumper, sort_keys=False, allow_unicode=True)

    def sha(self, content: Mapping[str, str]) -> str:
        """The canonical hash (64 hex digits) of the recipe on these very models.

        content: SHA-256 of each model's files, and of the calibration file, by its name in the
        recipe, so that neither moving a model nor another model under the same name goes
        unnoticed. Key order, number spelling (1, 1.0) and empty parts do not change the hash.
        Raises RecipeError for a model or file without a content hash.
        """
        missing = [name for name in self.model_names() if name not in content]
        if missing:
            raise RecipeError(f"model '{missing[0]}' has no content hash: it was never opened")
        if self.aim is not None and self.aim.calibration not in content:
            raise RecipeError(f"calibration file '{self.aim.calibration}' has no content hash")
        return sha_of(self.to_dict(), content)

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Read mergekit YAML. Raises RecipeError; `where` names the text in messages."""
        try:
            data = yaml_text.load(text)
        except (yaml.YAMLError, ValueError) as error:  # a date that is none is the latter
            raise RecipeError(f"{where}: not YAML: {one_line(error)}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{where}: not a recipe: expected keys such as 'merge_method'")
        return cls.from_dict(data, where)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "recipe") -> "Recipe":
        """Check plain data. Raises RecipeError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, cls, _REFUSED_KEYS)}") from None

    @classmethod
    def from_file(cls, path: Path) -> "Recipe":
        """Read a recipe file. Raises RecipeError."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe '{path}' cannot be read: {one_line(error)}") from None
        return cls.from_yaml(text, str(path))


def sha_of(document: Mapping[str, Any], content: Mapping[str, str]) -> str:
    """`Recipe.sha` of plain data as `to_dict` gives it, which is not checked."""
    text = json.dumps(_canonical(document, content), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def resolve(name: str, scopes: Sequence[Mapping[str, Any]], tensor: str, t: float) -> Scalar | None:
    """The value of a parameter for one tensor: the narrowest scope that has one decides.

    scopes: from narrow (source) to wide (recipe). t: the tensor's position in its slice, 0 to 1,
    for lists, which are linear gradients. A scope whose filters all miss the tensor has no value.
    """
    for scope in scopes:
        if name in scope:
            value: Scalar | None = _evaluate(scope[name], tensor, t)
            if value is not None:
                return value
    return None


def _evaluate(value: Any, tensor: str, t: float) -> Any:
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], Filtered):
        for entry in value:
            if entry.filter is None or entry.filter == "*" or entry.filter in tensor:
                return _evaluate(entry.value, tensor, t)
        return None
    position = t * (len(value) - 1)
    low = min(int(position), len(value) - 1)
    high = min(low + 1, len(value) - 1)
    if isinstance(value[low], bool):
        return value[low]
    share = position - low
    return (1 - share) * value[low] + share * value[high] if share else value[low]


def _check_body(where: str, part: Recipe | Part, method: str) -> None:
    if (part.models is None) == (part.slices is None):
        raise ValueError(f"{where[:-1]}: give either 'models' or 'slices', not both, not neither")
    if isinstance(part, Part):
        _check_parameters(f"{where}parameters", part.parameters, method)
    if part.models is not None:
        if not part.models:
            raise ValueError(f"{where}models: the list is empty: name at least one model")
        _check_entries(f"{where}models", part.models, method)
    if part.slices is not None:
        if not part.slices:
            raise ValueError(f"{where}slices: the list is empty: give at least one slice")
        for i, piece in enumerate(part.slices):
            _check_slice(f"{where}slices[{i}]", piece, method)


def _check_slice(where: str, piece: Slice, method: str) -> None:
    if not piece.sources:
        raise ValueError(f"{where}.sources: the list is empty: give at least one source")
    for j, source in enumerate(piece.sources):
        start, end = source.layer_range
        if not 0 <= start < end:
            raise ValueError(
                f"{where}.sources[{j}].layer_range: [{start}, {end}] holds no layer: "
                "give [start, end) with 0 <= start < end"
            )
    lengths = {source.length for source in piece.sources}
    if len(lengths) > 1:
        raise ValueError(
            f"{where}.sources: ranges of {sorted(lengths)} layers: make them equally long"
        )
    _check_parameters(f"{where}.parameters", piece.parameters, method)
    _check_entries(f"{where}.sources", piece.sources, method)


def _check_entries(where: str, entries: Sequence[ModelEntry | Source], method: str) -> None:
    """The models that are merged into the same layers: each once, with its own parameters."""
    seen: set[str] = set()
    for i, entry in enumerate(entries):
        if entry.model in seen:
            raise ValueError(
                f"{where}[{i}].model: '{entry.model}' is listed twice: "
                "give it once, with the sum of its weights"
            )
        seen.add(entry.model)
        _check_parameters(f"{where}[{i}].parameters", entry.parameters, method, of_model=True)


def _check_parameters(
    where: str, parameters: Parameters, method: str, of_model: bool = False
) -> None:
    """of_model: the parameters stand beside a model, where those of the whole merge may not."""
    per_model, shared = METHODS[method].per_model, METHODS[method].shared
    for name, value in parameters.items():
        if name not in per_model and name not in shared:
            known = [*per_model, *shared]
            remedy = nearest(name, known) if known else "it takes none"
            raise ValueError(f"{where}.{name}: '{method}' has no such parameter: {remedy}")
        if of_model and name not in per_model:
            raise ValueError(
                f"{where}.{name}: holds for all models of a merge: "
                "move it to the 'parameters' of the slice or of the recipe"
            )
        numbers = _numbers(value)
        if isinstance(per_model.get(name, shared.get(name)), bool):
            _check_flags(f"{where}.{name}", numbers)
        else:
            for number in numbers:
                _check_number(f"{where}.{name}", name, number)


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [n for entry in value for n in _numbers(entry)]
    return _numbers(value.value) if isinstance(value, Filtered) else [value]


def _check_flags(where: str, values: Sequence[Any]) -> None:
    """One alone may be 0 or 1; in a list these would be a gradient, and flags have none."""
    for value in values:
        if not isinstance(value, bool) and (value not in (0, 1) or len(values) > 1):
            raise ValueError(f"{where}: {value} is not a truth value: give true or false")


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "density": (lambda x: 0 < x <= 1, "(0, 1]: it is the share that is kept"),
    "select_topk": (lambda x: 0 < x <= 1, "(0, 1]: it is the share that is kept"),
    "gamma": (lambda x: 0 <= x < 1, "[0, 1): it is the share of the largest that is dropped"),
    "max_iter": (lambda x: x >= 1 and x == int(x), "1, 2, 3, ...: it is a number of steps"),
}


def _check_number(where: str, name: str, number: Any) -> None:
    if isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"{where}: {number} is not a finite number")
    within, text = _RANGES.get(name, (None, ""))
    if within is not None and not within(number):
        raise ValueError(f"{where}: {number} is outside {text}")


def _scopes(recipe: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every part of a recipe, as plain data, that may have parameters."""
    for body in (recipe, *recipe.get("modules", {}).values()):
        yield body
        yield from body.get("models", ())
        for piece in body.get("slices", ()):
            yield piece
            yield from piece["sources"]


def _canonical(node: Any, content: Mapping[str, str], key: str = "") -> Any:
    """Plain data with model names replaced by content hashes, and every number a float."""
    if type(node) is float:  # as most are
        return node + 0.0  # -0.0 is 0.0
    if isinstance(node, dict):
        return {k: v if k == "filter" else _canonical(v, content, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_canonical(v, content) for v in node]
    if key in ("model", "base_model", "calibration"):
        return content.get(node, node)
    if key in ("tokenizer_source", "source") and node not in ("base", "union"):
        name = node.removeprefix("model:")
        return content.get(name, name)
    if isinstance(node, int | float) and not isinstance(node, bool):
        return float(node) + 0.0
    return node


class _FlowDumper(yaml.SafeDumper):
    """Numbers in a list, and a filter with its value, each on one line."""


def _list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flat = all(isinstance(item, int | float) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flat)


def _dict(dumper: yaml.SafeDumper, data: dict[str, Any]) -> yaml.Node:
    flat = set(data) <= {"filter", "value"} and not isinstance(data.get("value"), dict)
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=flat)


_FlowDumper.add_representer(list, _list)
_FlowDumper.add_representer(dict, _dict)
