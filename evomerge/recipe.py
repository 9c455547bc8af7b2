"""The recipe: what one merge is, in mergekit's YAML dialect, read, checked, written and hashed.

Knows which methods exist and which parameters they take, but nothing of tensors, files or models:
whether a recipe fits its models is found out by `evomerge.merge.plan`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from evomerge.errors import RecipeError, nearest

Scalar = StrictBool | StrictInt | StrictFloat


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
    """One message for a value that fits none of a parameter's forms, instead of one per form."""
    try:
        checked = handler(_as_numbers(value))
    except ValidationError:
        checked = []
    forms = checked if isinstance(checked, list) else [checked]
    if not forms or any(isinstance(f, Filtered) and f.value == [] for f in forms):
        raise ValueError(
            f"{value!r}: give a number, a list of numbers or a list of {{filter, value}} entries"
        )
    return checked


Parameter = Annotated[
    Scalar | list[Scalar] | list[Filtered],
    WrapValidator(_in_one_form),
]
Parameters = dict[str, Parameter]


@dataclass(frozen=True)
class Signature:
    """What a method takes.

    per_model: parameters that each parent has a value of; shared: those of the whole merge.
    Each maps a name to its default, None where the recipe has to give it.
    task_vectors: True where parents enter as their difference from the base, so that the base is
    required and, listed among the models, changes nothing.
    models: how many models a merge has (lowest, highest).
    """

    per_model: Mapping[str, Scalar | None]
    shared: Mapping[str, Scalar | None]
    base: bool
    task_vectors: bool
    models: tuple[int, float]


_TASK_VECTORS: dict[str, Any] = {"base": True, "task_vectors": True, "models": (1, math.inf)}

METHODS: dict[str, Signature] = {
    "linear": Signature({"weight": None}, {"normalize": True}, False, False, (1, math.inf)),
    "slerp": Signature({}, {"t": None}, True, False, (2, 2)),
    "task_arithmetic": Signature(
        {"weight": None}, {"normalize": False, "lambda": 1.0}, **_TASK_VECTORS
    ),
    "ties": Signature(
        {"weight": None, "density": 1.0},
        {"normalize": True, "rescale": False, "lambda": 1.0, "int8_mask": False},
        **_TASK_VECTORS,
    ),
    "dare_ties": Signature(
        {"weight": None, "density": 1.0},
        {"normalize": False, "rescale": True, "lambda": 1.0, "int8_mask": False},
        **_TASK_VECTORS,
    ),
    "dare_linear": Signature(
        {"weight": None, "density": 1.0},
        {"normalize": False, "rescale": True, "lambda": 1.0, "int8_mask": False},
        **_TASK_VECTORS,
    ),
    "passthrough": Signature({"scale": 1.0}, {}, False, False, (1, 1)),
}

_FLAGS = {"normalize", "rescale", "int8_mask"}
DTYPES = ("float32", "float16", "bfloat16", "float64")


class _Node(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(_Node):
    """A parent that is merged as a whole."""

    model: str
    parameters: Parameters = {}


class Source(_Node):
    """A range of a parent's layers, half open: [start, end)."""

    model: str
    layer_range: tuple[int, int]
    parameters: Parameters = {}

    @property
    def length(self) -> int:
        """How many layers the range has."""
        return self.layer_range[1] - self.layer_range[0]


class Slice(_Node):
    """Consecutive layers of the output, merged from ranges of equal length."""

    sources: tuple[Source, ...]
    base_model: str | None = None
    parameters: Parameters = {}


class Recipe(_Node):
    """One merge. Exactly one of `models` and `slices` is given.

    Model names are taken as they stand: folders or hub ids. `dtype` is what inputs are cast to,
    `out_dtype` what outputs are; absent, both are the models' own.
    """

    merge_method: str
    models: tuple[ModelEntry, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    base_model: str | None = None
    parameters: Parameters = {}
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None

    @model_validator(mode="after")
    def _is_a_merge(self) -> Self:
        signature = METHODS.get(self.merge_method)
        if signature is None:
            raise ValueError(
                f"merge_method: '{self.merge_method}' is unknown: "
                f"{nearest(self.merge_method, METHODS)}"
            )
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either 'models' or 'slices', not both and not neither")
        for key in ("dtype", "out_dtype"):
            value = getattr(self, key)
            if value is not None and value not in DTYPES:
                raise ValueError(f"{key}: '{value}' is unknown: {nearest(value, DTYPES)}")
        if signature.base and self.base_model is None and self._lacks_slice_base():
            raise ValueError(f"base_model is missing: '{self.merge_method}' needs it")
        if self.slices is not None:
            _check_slices(self.slices)
        elif not self.models:
            raise ValueError("models: the list is empty: name at least one model")
        for where, parameters in self._scopes():
            _check_parameters(where, parameters, self.merge_method, signature)
        return self

    def _lacks_slice_base(self) -> bool:
        return self.slices is None or any(part.base_model is None for part in self.slices)

    def _scopes(self) -> list[tuple[str, Parameters]]:
        scopes = [("parameters", self.parameters)]
        for i, entry in enumerate(self.models or ()):
            scopes.append((f"models[{i}].parameters", entry.parameters))
        for i, part in enumerate(self.slices or ()):
            scopes.append((f"slices[{i}].parameters", part.parameters))
            for j, source in enumerate(part.sources):
                scopes.append((f"slices[{i}].sources[{j}].parameters", source.parameters))
        return scopes

    @property
    def signature(self) -> Signature:
        """What this recipe's method takes."""
        return METHODS[self.merge_method]

    def model_names(self) -> tuple[str, ...]:
        """Every model that the recipe names, once, the base last if it is named nowhere else."""
        names = [entry.model for entry in self.models or ()]
        for part in self.slices or ():
            names += [source.model for source in part.sources]
            names += [part.base_model] if part.base_model else []
        names += [self.base_model] if self.base_model else []
        return tuple(dict.fromkeys(names))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in YAML: nothing that was not given, no empty parts."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True)
        without_empty: dict[str, Any] = _without_empty(plain)
        return without_empty

    def to_yaml(self) -> str:
        """mergekit YAML; reading it back gives an equal recipe."""
        return yaml.dump(self.to_dict(), Dumper=_FlowDumper, sort_keys=False, allow_unicode=True)

    def sha(self, content: Mapping[str, str]) -> str:
        """The canonical hash (64 hex digits) of the recipe on these very models.

        content: SHA-256 of each model's files by its name in the recipe, so that neither moving a
        model nor another model under the same name goes unnoticed. Key order, number spelling
        (1, 1.0) and empty parts do not change the hash. Raises RecipeError for a model without
        a content hash.
        """
        missing = [name for name in self.model_names() if name not in content]
        if missing:
            raise RecipeError(f"model '{missing[0]}' has no content hash: it was never opened")
        text = json.dumps(_canonical(self.to_dict(), content), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_yaml(cls, text: str, where: str = "recipe") -> "Recipe":
        """Read mergekit YAML. Raises RecipeError; `where` names the text in messages."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
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
            raise RecipeError(f"{where}: {explain(error, cls)}") from None

    @classmethod
    def from_file(cls, path: Path) -> "Recipe":
        """Read a recipe file. Raises RecipeError."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe '{path}' cannot be read: {one_line(error)}") from None
        return cls.from_yaml(text, str(path))


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


def _check_slices(slices: Sequence[Slice]) -> None:
    if not slices:
        raise ValueError("slices: the list is empty: give at least one slice")
    for i, part in enumerate(slices):
        if not part.sources:
            raise ValueError(f"slices[{i}].sources: the list is empty: give at least one source")
        for j, source in enumerate(part.sources):
            start, end = source.layer_range
            if not 0 <= start < end:
                raise ValueError(
                    f"slices[{i}].sources[{j}].layer_range: [{start}, {end}] holds no layer: "
                    "give [start, end) with 0 <= start < end"
                )
        lengths = {source.length for source in part.sources}
        if len(lengths) > 1:
            raise ValueError(
                f"slices[{i}].sources: ranges of {sorted(lengths)} layers: make them equally long"
            )


def _check_parameters(
    where: str, parameters: Parameters, method: str, signature: Signature
) -> None:
    known = {*signature.per_model, *signature.shared}
    for name, value in parameters.items():
        if name not in known:
            remedy = nearest(name, known) if known else "it takes none"
            raise ValueError(f"{where}.{name}: '{method}' has no such parameter: {remedy}")
        for number in _numbers(value):
            _check_number(f"{where}.{name}", name, number)


def _numbers(value: Any) -> list[Any]:
    if isinstance(value, list):
        return [n for entry in value for n in _numbers(entry)]
    return _numbers(value.value) if isinstance(value, Filtered) else [value]


def _check_number(where: str, name: str, number: Any) -> None:
    if name in _FLAGS:
        if not isinstance(number, bool) and number not in (0, 1):
            raise ValueError(f"{where}: {number} is not a truth value: give true or false")
        return
    if isinstance(number, bool) or not math.isfinite(number):
        raise ValueError(f"{where}: {number} is not a finite number")
    if name == "density" and not 0 < number <= 1:
        raise ValueError(f"{where}: {number} is outside (0, 1]: it is the share that is kept")


_BRANCHES = {"bool", "int", "float", "str", "constrained-int"}


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error in one line: the key, the value, the remedy.

    Unknown keys come first: a misspelt key that is required is also missing.
    """
    problems = error.errors()
    problem = min(problems, key=lambda p: p["type"] != "extra_forbidden")
    key = _dotted(problem["loc"])
    if problem["type"] == "value_error":
        text = str(problem["ctx"]["error"])
    elif problem["type"] == "missing":
        text = "required, and missing"
    elif problem["type"] == "extra_forbidden":
        text = f"unknown key: {nearest(str(problem['loc'][-1]), _keys(model))}"
    elif problem["type"] == "too_short":
        text = f"{problem['ctx']['actual_length']} given: give at least "
        text += str(problem["ctx"]["min_length"])
    else:  # the branches of a union share a key
        remedies = dict.fromkeys(_remedy(p) for p in problems if _dotted(p["loc"]) == key)
        text = f"{problem['input']!r}: {' or '.join(remedies)}"
    text = f"{key}: {text}" if key and not text.startswith(key) else text
    return " ".join(text.split())


def _remedy(problem: Mapping[str, Any]) -> str:
    if problem["type"] in ("model_type", "dict_type"):
        return "give keys and their values"
    if problem["type"] in ("tuple_type", "list_type"):
        return "give a list"
    message: str = problem["msg"]
    return message[0].lower() + message[1:]


def _dotted(location: Sequence[str | int]) -> str:
    """`a.b[0]`, without the names that pydantic gives to the branches of a union."""
    text = ""
    for position, part in enumerate(location, 1):
        if isinstance(part, int):
            text += f"[{part}]"
        elif "[" not in part and not (position == len(location) > 1 and part in _BRANCHES):
            text += f".{part}" if text else part
    return text


def _keys(model: type[BaseModel]) -> set[str]:
    """All keys of a model and of the models inside it."""
    text = json.dumps(model.model_json_schema())
    found: set[str] = set()
    stack: list[Any] = [json.loads(text)]
    while stack:
        node = stack.pop()
        if isinstance(node, dict):
            found |= set(node.get("properties", {}))
            stack += node.values()
        elif isinstance(node, list):
            stack += node
    return found


def one_line(error: BaseException) -> str:
    """An exception's message without line breaks; of an OSError only what went wrong."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def _without_empty(node: Any) -> Any:
    if isinstance(node, dict):
        kept = {k: _without_empty(v) for k, v in node.items()}
        return {k: v for k, v in kept.items() if v is not None and v != {}}
    return [_without_empty(v) for v in node] if isinstance(node, list) else node


def _canonical(node: Any, content: Mapping[str, str], key: str = "") -> Any:
    """Plain data with model names replaced by content hashes, and every number a float."""
    if isinstance(node, dict):
        return {k: _canonical(v, content, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_canonical(v, content) for v in node]
    if key in ("model", "base_model"):
        return content[node]
    if key == "tokenizer_source" and node not in ("base", "union"):
        name = node.removeprefix("model:")
        return content.get(name, name)
    if isinstance(node, int | float) and not isinstance(node, bool):
        return float(node) + 0.0  # -0.0 is 0.0
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
