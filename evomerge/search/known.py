"""What earlier searches of the same store found out about the same models.

Parents and other baselines are scored on all of train in every search; where a search with the
same engine, libraries, tokenizer and task content has done so, its per-example scores are taken
over.
"""

from collections.abc import Mapping

import numpy as np

from evomerge.fitness.results import Scored, Scores
from evomerge.search.setting import Setting
from evomerge.store import Coordinator, SearchRow, Store


def known(setting: Setting, coordinator: Coordinator, recipe_sha: str) -> tuple[int, Scored] | None:
    """A candidate of another search with this recipe, and its scores on all of train; None where
    there is none that would come out the same here."""
    store, own = coordinator.store, coordinator.search
    searches = {row.id: row for row in store.searches()}
    for search, candidate in store.scored_on_train(recipe_sha):
        if search == own.id or not _alike(store, searches[search], own):
            continue
        splits = store.splits(search)
        contents = {task: splits.get((task, "train")) for task in setting.tasks}
        if all(
            row is not None and row.content == setting.tasks[task].content("train")
            for task, row in contents.items()
        ):
            scores = next(
                found.scores
                for found in store.evaluations(search, ("full",))
                if found.candidate == candidate
            )
            if scores is not None and _on(setting, scores):
                return candidate, Scored({task: scores[task] for task in setting.tasks}, 0.0, 0.0)
    return None


def _on(setting: Setting, scores: Mapping[str, Scores]) -> bool:
    """Whether they are of the same items: beside other tasks others may be left out."""
    return all(
        np.array_equal(np.sort(scores[task].examples), items)
        for task, items in setting.train.items()
    )


def _alike(store: Store, other: SearchRow, own: SearchRow) -> bool:
    """Whether both score in the same way, by the same libraries, with one config and tokenizer."""
    first = _first(store, own)
    return (
        first is not None
        and _first(store, other) == first
        and other.versions == own.versions
        and other.job["engine"] == own.job["engine"]
        and (other.job["shaping"] > 0) == (own.job["shaping"] > 0)
    )


def _first(store: Store, search: SearchRow) -> str | None:
    """The content of the model that gives config and tokenizer, whatever model is scored."""
    shas = (m["sha256"] for m in store.models(search.id).values() if m["first"])
    return next(shas, None)
