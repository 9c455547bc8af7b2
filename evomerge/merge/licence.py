"""The licence of a merge, worked out from what the cards of its models state. No legal advice.

Knows the identifiers that the hub uses for licences and which of them are permissive; what the
texts of licences ask for is for people to read.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evomerge.merge.checkpoint import Checkpoint

UNKNOWN = "unknown"
OTHER = "other"

# Licences that let a derived work carry another one, from the fewest conditions to the most.
_PERMISSIVE = (
    *("cc0-1.0", "unlicense", "0bsd", "mit-0", "zlib", "isc", "mit"),
    *("bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "apache-2.0"),
)
# Terms of their own that one of the permissive ones contradicts.
_CONTRADICTED = {"gpl-2.0": "apache-2.0"}  # its patent clauses are further restrictions


@dataclass(frozen=True)
class Terms:
    """What one card states: an identifier of the hub, 'unknown' without one; name and link where
    the identifier is 'other'."""

    licence: str
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """What tells them from other terms."""
        return self.name or self.link or self.licence


@dataclass(frozen=True)
class Result:
    """The terms of a merge, and why they are these."""

    terms: Terms
    reason: str


def licence(models: Iterable[Checkpoint]) -> str:
    """The identifier for a merge; see combined."""
    return terms_of(models).licence


def terms_of(models: Iterable[Checkpoint]) -> Terms:
    """The terms for the card of a merge; see combined."""
    return combined(terms for model in models for terms in stated(model)).terms


def stated(model: Checkpoint) -> tuple[Terms, ...]:
    """What the model's card states, and after it the card of its adapter if it has one."""
    folders = [model.path]
    folders += {path.parent for name, path in model.sources.items() if name.startswith("+")}
    return tuple(terms for folder in folders for terms in _of_card(folder / "README.md"))


def combined(stated: Iterable[Terms]) -> Result:
    """What a work made of all of these may say of itself.

    Permissive licences give the one with the most conditions; terms of their own hold for the
    whole where all others are permissive; several such terms are 'other', as nobody but a lawyer
    can tell whether they can be met together; without a statement it is 'unknown'.
    """
    found = set(stated)
    if not found or any(terms.licence == UNKNOWN for terms in found):
        return Result(Terms(UNKNOWN), "a model states no licence")
    own = sorted((t for t in found if t.licence not in _PERMISSIVE), key=lambda t: t.label)
    permissive = sorted(
        (t.licence for t in found if t.licence in _PERMISSIVE), key=_PERMISSIVE.index
    )
    if not own:
        reason = "all models state it" if len(permissive) == 1 else "the strictest permissive one"
        return Result(Terms(permissive[-1]), reason)
    names = [terms.label for terms in own]
    if len(own) == 1:
        against = _CONTRADICTED.get(own[0].licence)
        if against not in permissive:
            reason = "its terms hold for the whole" if permissive else "all models state it"
            return Result(own[0], reason)
        names.append(against)
    name = "-and-".join(names)
    return Result(Terms(OTHER, name), f"terms that may conflict: {', '.join(names)}")


def _of_card(card: Path) -> list[Terms]:
    """The `license` of a card's front matter; a list states that each of them holds."""
    front = _front_matter(card)
    value = front.get("license")
    listed = value if isinstance(value, list) else [value]
    name, link = (_text(front.get(key)) for key in ("license_name", "license_link"))
    found = []
    for entry in listed or [None]:
        identifier = _text(entry)
        if identifier is None:
            found.append(Terms(UNKNOWN))
        elif identifier.lower() == OTHER:
            found.append(Terms(OTHER, name, link))
        else:
            found.append(Terms(identifier.lower()))
    return found


def _text(value: Any) -> str | None:
    return str(value) if value else None


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The keys that a card begins with; none where they cannot be read."""
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
    parts = text.removeprefix("\ufeff").split("---\n")
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        front = yaml.safe_load(parts[1])
    except (yaml.YAMLError, ValueError):  # a date that is none is the latter
        return {}
    return front if isinstance(front, dict) else {}
