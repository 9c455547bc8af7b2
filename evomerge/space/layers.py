"""Layer space: which layers of which parents stand in the output, in which order.

A slot's layer keeps its parent's tensors, but for scales that are folded into them. Embeddings,
final norm and head are the first parent's, whichever layers stand beside them (arXiv 2403.13187,
section 3.2): they fit its tokenizer. Depth up-scaling alone takes them from the parent it takes
the layers from. Knows the limits of a stack; how an order is written down is known by `orders`,
how it is made into a recipe by `residual`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evomerge.coordinates import Coordinate, Genotype, start_of
from evomerge.errors import JobError, ModelError
from evomerge.job import LayerSpace
from evomerge.recipe import Recipe
from evomerge.space import Infeasible, Models, Space
from evomerge.space.orders import (
    SIGMA,
    DepthWise,
    Order,
    Parent,
    Segments,
    Switches,
    Upscale,
    first_switches,
    row_of,
)
from evomerge.space.residual import Ends, Fold, Slot, fold_of, stack
from evomerge.space.scales import Matrix, Network, Scales, Unscaled


@dataclass(frozen=True)
class Limits:
    """How large a stack may be.

    layers, parameters: at most; without the latter nothing is counted. inside: parameters of the
    layers of each model, by path; outside: those before and after its layers.
    """

    layers: int
    parameters: int | None
    inside: Mapping[str, Sequence[int]]
    outside: Mapping[str, int]

    def exceeded(self, slots: Sequence[Slot], ends: str) -> str:
        """Which of the two a stack exceeds, in words, or ''. ends: the model of the rest."""
        if len(slots) > self.layers:
            return f"{len(slots)} layers are more than max_layers {self.layers}"
        if self.parameters is None:
            return ""
        count = self.outside[ends] + sum(self.inside[slot.model][slot.layer] for slot in slots)
        if count > self.parameters:
            return f"{count:,} parameters are more than max_parameters {self.parameters:,}"
        return ""

    def layers_of(self, path: str) -> int:
        """How many layers like those of this model a stack may have."""
        if self.parameters is None:
            return self.layers
        most = (self.parameters - self.outside[path]) // max(1, *self.inside[path])
        return max(min(self.layers, most), 0)


@dataclass(frozen=True)
class Layers:
    """Orders of layers within limits. ends: None where every stack is of one model. fold: None
    where nothing is scaled."""

    order: Order
    limits: Limits
    fold: Fold | None
    ends: Ends | None
    dtype: str
    coordinates: tuple[Coordinate, ...]
    sigma: float = SIGMA

    def decode(self, genotype: Genotype) -> Recipe | Infeasible:
        """Infeasible without any layer, and beyond `max_layers` or `max_parameters`."""
        if len(genotype) != len(self.coordinates):
            raise ValueError(
                f"a genotype of {len(genotype)} values, in a space of {len(self.coordinates)}"
            )
        slots = self.order.slots(genotype)
        if slots:
            exceeded = self.limits.exceeded(slots, self.ends.model if self.ends else slots[0].model)
            if exceeded:
                return Infeasible(exceeded)
        return stack(slots, self.fold, self.dtype, self.ends)


def layer_space(section: LayerSpace, models: Models) -> Space:
    """The space of a section. Raises JobError where the parents' layers are unknown, scales cannot
    be folded into them, or the search could not begin within its limits."""
    parents = _parents(models)
    limits = _limits(section, models, parents)
    order, fold, ends = _order(section, parents, limits), _fold(section, models), None
    if section.form != "upscale":
        ends = Ends(parents[0].path, models.layouts)
    space = Layers(order, limits, fold, ends, models.dtype, order.coordinates)
    begin = space.decode(start_of(space.coordinates))
    if isinstance(begin, Infeasible):
        raise JobError(f"space: the search cannot begin: {begin.reason}: raise that limit")
    return space


def _parents(models: Models) -> tuple[Parent, ...]:
    found = []
    for name, path in models.parents.items():
        layout = models.layouts[path]
        if not layout.layers:
            reason = layout.unclear or "it has none"
            raise JobError(
                f"parents.{name}: its layers cannot be told: {reason}: take kind: weight"
            )
        found.append(Parent(name, path, layout.layers))
    return tuple(found)


def _limits(section: LayerSpace, models: Models, parents: Sequence[Parent]) -> Limits:
    deepest = max(parent.depth for parent in parents)
    inside, outside = {}, {}
    if section.max_parameters is not None:
        for parent in parents:
            places, counts = models.layouts[parent.path].places, [0] * parent.depth
            rest = 0
            for name, size in models.sizes[parent.path].items():
                layer = places[name].layer
                if layer is None:
                    rest += size
                else:
                    counts[layer] += size
            inside[parent.path], outside[parent.path] = counts, rest
    # Any upscaled model has at most two copies of its layers.
    default = 2 * deepest if section.form == "upscale" else deepest + deepest // 2
    layers = section.max_layers or default
    return Limits(layers, section.max_parameters, inside, outside)


def _order(section: LayerSpace, parents: tuple[Parent, ...], limits: Limits) -> Order:
    limit = limits.layers_of(parents[0].path)
    if section.form == "segments":
        return Segments(parents, section.segments)
    if section.form == "depth_wise":
        return DepthWise.over(parents, section.removable)
    if section.form == "upscale":
        return Upscale(parents, limit)
    row = row_of(parents)
    slots = section.repeats * len(row)
    on: Sequence[int] = range(parents[0].depth)
    if section.start == "all":
        on = range(slots)
        if slots == parents[0].depth > limit:
            # Of a deep model the last layers but one matter least (arXiv 2403.17887).
            on = [*range(limit - 1), slots - 1]
    return Switches(
        row,
        {parent.name: parent.path for parent in parents},
        first_switches(slots, on, limit),
        _scales(section, row),
    )


def _scales(section: LayerSpace, row: Sequence[tuple[str, int]]) -> Scales:
    if section.scales == "matrix":
        return Matrix.over(row, section.repeats, section.scale)
    if section.scales == "network":
        return Network.over(row, section.repeats, section.scale)
    return Unscaled()


def _fold(section: LayerSpace, models: Models) -> Fold | None:
    """How scales are folded into the layers of all parents alike; None where there are none."""
    if section.scales == "none":
        return None
    folds: dict[Fold, str] = {}
    for name, path in models.parents.items():
        config = models.configs[path]
        try:
            fold = fold_of(config.get("text_config") or config, models.layouts[path])
        except ModelError as error:
            raise JobError(f"parents.{name}: {error}: give scales: none") from None
        folds.setdefault(fold, name)
    if len(folds) > 1:
        one, other = list(folds.values())[:2]
        raise JobError(
            f"space.scales: '{one}' and '{other}' are built differently, and scales are folded "
            "into both alike: give scales: none"
        )
    (fold,) = folds
    if fold.unsigned and section.scale.low < 0:
        raise JobError(
            f"space.scale: {section.scale.low:g} is negative, and the sign cannot be folded into "
            f"these models: {fold.unsigned}: give low > 0"
        )
    return fold
