"""Looks at validation: what the ledger calls the split, and looks from outside of a search.

A candidate does not cease to be one when it is merged into a folder: its validation score is a look
of its search, whoever asks for it. Models that no search proposed may be scored at will.
"""

import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from evomerge.errors import LooksSpent, RecipeError
from evomerge.fitness.task import Task
from evomerge.merge.disk import RECIPE
from evomerge.recipe import Recipe
from evomerge.search.changes import LOOKS
from evomerge.store import Coordinator, SearchRow, Store, exists

_FINALS = 2  # looks that a search needs at its end: of the best parent, and of one finalist


def content(tasks: Iterable[Task]) -> str:
    """The ledger's name for the validation splits of a search."""
    contents = "+".join(task.content("validation") for task in tasks)
    return hashlib.sha256(contents.encode()).hexdigest()


def reserve(url: str, model: str, task: Task) -> list[str]:
    """Write down a look in each search of the store that proposed this model and has the task's
    validation split; gives their names.

    A candidate that was looked at before is free. Raises LooksSpent where a search has no look
    left, or none but those that it needs at its end; SearchBusy where it is being conducted. Then
    no look is spent, of no search.
    """
    recipe = _recipe(Path(model))
    if recipe is None or not exists(url):
        return []
    own, identity = task.content("validation"), task.identity("validation")
    with Store(url) as store, ExitStack() as held:
        charged: list[tuple[Coordinator, int]] = []
        for search in store.searches():
            splits = store.splits(search.id)
            known = {row.identity for (_, of), row in splits.items() if of == "validation"}
            candidate = _candidate(store, search, recipe) if identity in known else None
            if candidate is not None:
                coordinator = held.enter_context(Coordinator.take_over(store, search.name))
                charged.append((coordinator, candidate))
        for coordinator, candidate in charged:
            _refuse_spent(coordinator, candidate)
        for coordinator, candidate in charged:
            coordinator.look(own, candidate, _allowed(coordinator.search))
        return [coordinator.search.name for coordinator, _ in charged]


def _allowed(search: SearchRow) -> int:
    """How many looks may be spent before somebody from outside is refused one."""
    allowed: int = search.job["guard"]["validation_looks"]
    return allowed if search.state == "finished" else allowed - _FINALS


def _refuse_spent(coordinator: Coordinator, candidate: int) -> None:
    search, allowed = coordinator.search, _allowed(coordinator.search)
    rows = (r for r in coordinator.store.ledger() if r.kind == "look" and r.search == search.id)
    looked = {row.entry["candidate"] for row in rows}
    if candidate in looked or len(looked) < allowed:
        return
    if search.state == "finished":
        raise LooksSpent(
            f"all {allowed} looks at validation of search '{search.name}' are spent: none is left "
            f"for candidate {candidate}; to allow more, which makes its claim post hoc: evomerge "
            f"resume {search.name} {LOOKS}={allowed + 1}"
        )
    raise LooksSpent(
        f"search '{search.name}' has {allowed + _FINALS} looks at validation and needs {_FINALS} "
        f"of them at its end: none is left for candidate {candidate} before that"
    )


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
    candidates = store.candidates(search.id, with_genotypes=False)
    alike = [c.id for c in candidates if c.label in (None, "mean") and c.recipe_sha == sha]
    looks = (row for row in store.ledger() if row.kind == "look" and row.search == search.id)
    looked = [row.entry["candidate"] for row in looks if row.entry["candidate"] in alike]
    return next(iter(looked + alike), None)
