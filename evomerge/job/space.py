"""The space section of a job: what is searched, one pydantic model per kind of space.

Knows the form of a space and nothing of models; whether it fits them is found in `space`.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator

from evomerge.errors import nearest
from evomerge.job.sections import Section
from evomerge.signatures import METHODS


class Range(Section):
    """The values that one kind of coefficient may take."""

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    start: float | Literal["equal"] | None = Field(
        None,
        description="Where the search starts; equal: one divided by the number of parents; "
        "default: the middle.",
    )
    scale: Literal["linear", "log"] = Field(
        "linear", description="log: equal steps of the optimizer are equal factors; low > 0."
    )
    first: float | None = Field(
        None,
        allow_inf_nan=False,
        description="Fixes the value of the first parent, which is then not searched.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.low < self.high:
            raise ValueError(f"[{self.low}, {self.high}] is empty: give [low, high], low < high")
        if isinstance(self.start, float) and not self.low <= self.start <= self.high:
            raise ValueError(f"start {self.start} is outside [{self.low}, {self.high}]")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low > 0, not {self.low}")
        return self

    def value(self, unit: float) -> float:
        """What a coordinate in [0, 1] stands for, in the bounds, rounded to six digits, of narrow
        bounds to six of their width: finer than any merge can feel, and readable."""
        if self.scale == "log":
            found = float(f"{self.low * (self.high / self.low) ** unit:.6g}")
        else:
            width = self.high - self.low
            found = round(self.low + unit * width, max(6, 6 - math.ceil(math.log10(width))))
        return min(max(found, self.low), self.high) + 0.0  # rounding may step over a bound; no -0.0

    def unit(self, value: float) -> float:
        """The coordinate, in [0, 1], that stands for a value within the bounds."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def start_unit(self, parents: int) -> float:
        """Where the search starts, in [0, 1]. Raises ValueError where that is outside the bounds,
        which `equal` may be."""
        if self.start is None:
            return 0.5
        start = 1 / parents if self.start == "equal" else self.start
        if not self.low <= start <= self.high:
            raise ValueError(f"start equal, {start:.6g}, is outside [{self.low}, {self.high}]")
        return self.unit(start)


def _pair_as_range(value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"low": value[0], "high": value[1]}
    if not isinstance(value, Mapping | Range | float | int):
        raise ValueError(f"{value!r}: give [low, high]")
    return value


Bounds = Annotated[
    Range, BeforeValidator(_pair_as_range, json_schema_input_type=Range | tuple[float, float])
]


def _from_one(value: Any) -> Any:
    bounds = _pair_as_range(value)
    if isinstance(bounds, Mapping) and bounds.get("start") is None:
        return {**bounds, "start": 1.0}
    return bounds


# Of what is multiplied by: a search begins where that changes nothing.
Factor = Annotated[
    Range, BeforeValidator(_from_one, json_schema_input_type=Range | tuple[float, float])
]
# Bounds are searched, a single value is the same for every candidate.
Coefficient = Annotated[
    Range | float,
    BeforeValidator(_pair_as_range, json_schema_input_type=Range | tuple[float, float] | float),
]


_PARAMETERS = {name for one in METHODS.values() for name in (*one.per_model, *one.shared)}


def _with_nothing_required(schema: dict[str, Any]) -> None:
    schema.pop("required", None)


class _Space(Section):
    # In a file, what a preset gives may be left out.
    model_config = ConfigDict(json_schema_extra=_with_nothing_required)

    preset: str | None = Field(None, description="A file of search_spaces/, or a path.")


class WeightSpace(_Space):
    """Mixing coefficients per parent and group of tensors."""

    kind: Literal["weight"]
    method: str | tuple[str, ...] = Field(
        description="The merge method; several: which of them is searched too."
    )
    per: Literal["model", "layer", "module", "slice"] = Field(
        description="What shares a coefficient: the whole model; a layer, with groups of their own "
        "for what stands before and after the layers; a module of one; or a layer, with what "
        "stands before and after in the first and the last group, as in mergekit's slices.",
    )
    granularity: int = Field(
        1, ge=1, description="How many consecutive layers share their coefficients."
    )
    filters: tuple[str, ...] = Field(
        (),
        description="Parts of tensor names: in every group, the tensors of each have coefficients "
        "of their own.",
    )
    part: str | None = Field(
        None,
        description="Merge this part of multi-part models alone, such as text_decoder, with "
        "language models where it is one; the rest is the base's, or the first parent's, that "
        "has such parts.",
    )
    # Every parameter of a method that is no setting of its arithmetic: see signatures.METHODS.
    weight: Coefficient | None = None
    density: Coefficient | None = None
    gamma: Coefficient | None = None
    epsilon: Coefficient | None = None
    lambda_: Coefficient | None = Field(None, alias="lambda")
    t: Coefficient | None = None
    select_topk: Coefficient | None = None
    r: Coefficient | None = None
    alpha: Coefficient | None = None
    scale: Coefficient | None = None
    normalize: bool | None = None
    rescale: bool | None = None
    rescale_by_density: bool | None = None
    normalize_weights: bool | None = None
    filter_wise: bool | None = None
    nuslerp_row_wise: bool | None = None
    nuslerp_flatten: bool | None = None

    @model_validator(mode="after")
    def _known_methods(self) -> Self:
        for method in self.methods:
            if method not in METHODS:
                raise ValueError(f"method: '{method}' is unknown: {nearest(method, METHODS)}")
        if len(set(self.methods)) != len(self.methods) or not self.methods:
            raise ValueError("method: name each method once, and at least one")
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """All of them, in the file's order."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @property
    def parameters(self) -> dict[str, Range | float | bool]:
        """The parameters of methods that are given, by their names in recipes."""
        fields = {field.alias or key: key for key, field in type(self).model_fields.items()}
        values = {name: getattr(self, key) for name, key in fields.items() if name in _PARAMETERS}
        return {name: value for name, value in values.items() if value is not None}


class LayerSpace(_Space):
    """Which layers of which parents stand in the output, in which order."""

    kind: Literal["layers"]
    form: Literal["switches", "segments", "depth_wise", "upscale"] = Field(
        "switches",
        description="switches: each of the parents' layers, in a row, is on or off; segments: an "
        "ordered list of layer ranges; depth_wise: which parent gives each layer; upscale: one "
        "parent's beginning and its end, overlapping.",
    )
    repeats: int = Field(
        1, ge=1, description="switches: how often the row of all parents' layers is repeated."
    )
    start: Literal["first", "all"] = Field(
        "first",
        description="switches: begin with the first parent, or with every layer switched on; of "
        "one parent with more layers than max_layers, all but the deepest before the last.",
    )
    scales: Literal["none", "matrix", "network"] = Field(
        "none",
        description="switches: what the residual stream is multiplied by where a layer follows one "
        "that it was not trained behind: nothing, a value for each pair of layers, or what a small "
        "network says of the pair.",
    )
    scale: Factor = Field(
        Range(low=0.5, high=2.0, start=1.0, scale="log"),
        description="The bounds of such a scale; it starts at 1 unless start says otherwise.",
    )
    segments: int = Field(4, ge=1, description="segments: how many ranges at most.")
    removable: bool = Field(False, description="depth_wise: any layer may also be left out.")
    max_layers: int | None = Field(
        None,
        ge=1,
        description="The deepest stack; default: 1.5 times the deepest parent, or, for upscale, "
        "twice.",
    )
    max_parameters: int | None = Field(
        None, ge=1, description="The largest model, embeddings and head included."
    )

    @model_validator(mode="after")
    def _each_key_is_read(self) -> Self:
        # A job that is written out in full gives defaults too: they say nothing.
        given = {
            key for key, f in type(self).model_fields.items() if getattr(self, key) != f.default
        }
        for key, form in _OF_FORM.items():
            if key in given and self.form != form:
                raise ValueError(f"{key}: has no meaning in form {self.form}: it is of {form}")
        if "scale" in given and self.scales == "none":
            raise ValueError("scale: nothing is scaled: give scales: network or matrix")
        if self.scale.first is not None or self.scale.start == "equal":
            raise ValueError(
                "scale: 'first' and 'start: equal' are of coefficients: leave them out"
            )
        return self


_OF_FORM = {
    **dict.fromkeys(("repeats", "start", "scales", "scale"), "switches"),
    "segments": "segments",
    "removable": "depth_wise",
}


class BothSpace(_Space):
    """Weight merges inside a layer order."""

    kind: Literal["both"]
    weight: WeightSpace
    layers: LayerSpace


class SeriesSpace(_Space):
    """Checkpoints of one fine-tuning run: the base, if there is one, and the parents in order."""

    kind: Literal["series"]
    form: Literal["interpolation", "soup"] = Field(
        "interpolation",
        description="interpolation: which two checkpoints, and where between them; soup: a share "
        "of each.",
    )
    per: Literal["model", "layer", "module"] = "model"
    granularity: int = Field(1, ge=1)
    delta: Bounds | None = Field(
        None,
        description="interpolation: the share of the later checkpoint; beyond [0, 1] extrapolates; "
        "default: [-0.25, 1.25], from 0.5.",
    )

    @model_validator(mode="after")
    def _of_its_form(self) -> Self:
        if self.delta is not None:
            if self.form == "soup":
                raise ValueError("delta: a soup has none: leave it out, or form: interpolation")
            if self.delta.first is not None or self.delta.start == "equal":
                raise ValueError("delta: one for all: give low, high and a number to start at")
        return self


class _MayNamePreset:
    """In a file, a space that names a preset may leave out its kind as well."""

    def __get_pydantic_json_schema__(
        self, core_schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": handler(core_schema)["oneOf"]}


Space = Annotated[
    WeightSpace | LayerSpace | BothSpace | SeriesSpace,
    Field(discriminator="kind"),
    _MayNamePreset(),
]
