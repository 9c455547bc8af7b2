"""Looks at validation from outside of a search.

A candidate does not cease to be one when it is merged into a folder: its validation score is a look
of its search, whoever asks for it. Models that no search proposed may be scored at will.
"""

from pathlib import Path

from evomerge.errors import LooksSpent, RecipeError
from evomerge.fitness.task import Task
from evomerge.merge.disk import RECIPE
from evomerge.recipe import Recipe
from evomerge.store import Coordinator, SearchRow, Store, exists

_FINALS = 2  # looks that a search needs at its end: of the best parent, and of one finalist


def reserve(url: str, model: str, task: Task) -> list[str]:
    """Write down a look in each search of the store that proposed this model and has the task's
    validation split; gives their names.

    A candidate that was looked at before is free. Raises LooksSpent where a search has no look
    left, or none but those that it needs at its end; SearchBusy where it is being conducted.
    """
    recipe = _recipe(Path(model))
    if recipe is None or not exists(url):
        return []
    content, identity = task.content("validation"), task.identity("validation")
    charged = []
    with Store(url) as store:
        for search in store.searches():
            splits = store.splits(search.id)
            own = {row.identity for (_, of), row in splits.items() if of == "validation"}
            candidate = _candidate(store, search, recipe) if identity in own else None
            if candidate is not None:
                with Coordinator.take_over(store, search.name) as coordinator:
                    allowed = search.job["guard"]["validation_looks"]
                    _look(coordinator, content, candidate, allowed)
                charged.append(search.name)
    return charged


def _look(coordinator: Coordinator, content: str, candidate: int, allowed: int) -> None:
    search = coordinator.search
    if search.state == "finished":
        coordinator.look(content, candidate, allowed)
        return
    try:
        coordinator.look(content, candidate, allowed - _FINALS)
    except LooksSpent:
        raise LooksSpent(
            f"search '{search.name}' has {allowed} looks at validation and needs {_FINALS} of them "
            f"at its end: none is left for candidate {candidate} before that"
        ) from None


def _recipe(folder: Path) -> Recipe | None:
    """What a folder was merged by; None of one that was not, or that does not say."""
    try:
        text = (folder / RECIPE).read_text(encoding="utf-8")
        return Recipe.from_yaml(text)
    except (OSError, UnicodeDecodeError, RecipeError):
        return None


def _candidate(store: Store, search: SearchRow, recipe: Recipe) -> int | None:
    """Which one a search proposed with this recipe over the same models; of several, one that was
    looked at, if any was."""
    known = {model["uri"]: model["sha256"] for model in store.models(search.id).values()}
    uris = {n: n if n in known else str(Path(n).resolve()) for n in recipe.model_names()}
    if recipe.aim is not None or not set(uris.values()) <= set(known):  # no space proposes `aim`
        return None
    sha = recipe.sha({name: known[uri] for name, uri in uris.items()})
    proposed = [c for c in store.candidates(search.id) if c.label in (None, "mean")]
    alike = [c.id for c in proposed if c.recipe_sha == sha]
    looks = (row for row in store.ledger() if row.kind == "look" and row.search == search.id)
    looked = [row.entry["candidate"] for row in looks if row.entry["candidate"] in alike]
    return next(iter(looked + alike), None)
