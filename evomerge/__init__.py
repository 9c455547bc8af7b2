"""evomerge searches for the best way to merge language models.

This module loads nothing heavy: each part of the package is imported where it is used.
"""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evomerge.export.tables import Tables

__version__ = "0.1.0"


def load(store: "str | os.PathLike[str]", search: str) -> "Tables":
    """A search as tables, while it runs or after; nothing is locked, nothing unsealed.

    store: a URL, or the path of an SQLite file. Gives an object whose attributes candidates,
    genotypes, scores, evaluations, generations, devices and recipes each map columns to arrays or
    lists of one length, so that
    `pandas.DataFrame(evomerge.load("evomerge.db", "my-search").candidates)` is a data frame. Raises
    StoreError.
    """
    from evomerge.export import tables

    return tables.load(store, search)
