"""The parts of models, such as the text decoder of one that also sees, and where models fit
together in them. Knows nothing of coefficients."""

from collections.abc import Mapping, Sequence

from evomerge.errors import JobError, nearest
from evomerge.layout import Layout, split
from evomerge.space import Models


def parts_of(models: Models, path: str) -> dict[str, Layout]:
    """A model's parts by name; of most models one, 'default'."""
    return split(models.layouts[path].places)


def layouts_in(models: Models, part: str | None) -> dict[str, Layout]:
    """Each model's layout by path: of a part, or of the whole for None. A model of one part only,
    such as a language model beside those that see, is that part. Raises JobError where a model has
    others and not this one."""
    if part is None:
        return dict(models.layouts)
    found: dict[str, Layout] = {}
    for path in models.layouts:
        parts = parts_of(models, path)
        if part not in parts and len(parts) > 1:
            raise JobError(f"space.part: '{path}' has no part '{part}': {nearest(part, parts)}")
        found[path] = parts.get(part) or next(iter(parts.values()))
    return found


def meeting(models: Models, paths: Sequence[str]) -> str | None:
    """Where models can be merged tensor by tensor: '' as a whole; the name of a part, where some
    are like that part alone of the others; None nowhere. Told by depth and sizes."""
    parts = {path: parts_of(models, path) for path in paths}
    largest = max(parts.values(), key=len)
    if all(own.keys() == largest.keys() for own in parts.values()):
        fit = (_fit(models, {path: own[part] for path, own in parts.items()}) for part in largest)
        return "" if all(fit) else None
    for part in largest:
        alike = {
            path: own[part] if part in own else next(iter(own.values()))
            for path, own in parts.items()
            if part in own or len(own) == 1
        }
        if len(alike) == len(parts) and _fit(models, alike):
            return part
    return None


def _fit(models: Models, layouts: Mapping[str, Layout]) -> bool:
    """Whether the layouts, by model path, are equally deep, and their tensors equally large."""
    (first, ours), *others = layouts.items()
    for path, theirs in others:
        common = ours.index.keys() & theirs.index.keys()
        sizes = models.sizes[first], models.sizes[path]
        if ours.layers != theirs.layers or not common:
            return False
        if any(sizes[0][ours.index[at]] != sizes[1][theirs.index[at]] for at in common):
            return False
    return True
