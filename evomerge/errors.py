"""Every exception that evomerge raises on purpose.

A message is one line: the thing, the value, the remedy. `exit_code` is what the command line
returns. Knows nothing of the rest of the package.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class EvomergeError(Exception):
    """Something that evomerge set out to do failed."""

    exit_code = 1


class InputError(EvomergeError):
    """What the user gave is wrong; nothing was done."""

    exit_code = 2


class JobError(InputError):
    """A job file, or an override of one of its keys, is wrong."""


class RecipeError(InputError):
    """A merge recipe is wrong, whatever the models are."""


class ModelError(InputError):
    """A model cannot be read, or models do not fit together."""


class OutOfMemory(ModelError):
    """A device has too little memory for a model, or for a prompt beside it."""


class TaskError(InputError):
    """A task file or its data is wrong."""


class SealedError(InputError):
    """A test split was asked for by something that may not read it."""


class StoreError(InputError):
    """A store cannot be opened, or does not hold what was asked for."""


class NotFound(StoreError):
    """A store holds no search, candidate or submission of this name."""


class StoreUnavailable(EvomergeError):
    """A store is out of reach for the moment; what was sent last may or may not be written."""


class SearchBusy(StoreError):
    """Another process conducts this search."""


class NameTaken(StoreError):
    """There is a search of this name in the store, or in its queue."""


class Withdrawn(EvomergeError):
    """A submission was paused or cancelled before its search had begun."""


class KeyReused(StoreError):
    """An idempotency key came with another request before."""


class OutputExists(InputError):
    """An output folder holds something already."""


class ClusterLost(EvomergeError):
    """The cluster on which a search has its workers is gone; what was recorded is kept."""


class StaleCoordinator(EvomergeError):
    """Another process has taken this search over; nothing more may be written from here."""


class SearchFailed(EvomergeError):
    """A search cannot go on."""


class LooksSpent(SearchFailed):
    """A search has no look at validation left."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for an unknown word: the nearest known one, or all of them."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
