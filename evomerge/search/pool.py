"""Parents that are the winners of finished searches in the same store, merged so that another
search can start from them: weights first, then layers (PS, then DFS, in arXiv 2403.13187).

A winner becomes a folder of its own, which is all that later searches, resumes and exports know.
"""

from collections.abc import Mapping
from pathlib import Path

from evomerge.errors import EvomergeError, JobError, ModelError
from evomerge.job import Job, Parent
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.merge.sources import open_model
from evomerge.progress import Steps
from evomerge.recipe import Recipe
from evomerge.store import SearchRow, Store, exists, shown


def resolved(job: Job, url: str, steps: Steps) -> Job:
    """The job with a model folder in the place of each search that it names as a parent or base.

    Winners are merged beside the store's file, into `<store>-winners/<SHA of the recipe>`, once;
    of a store that is no file, into `evomerge-winners` in the working directory.
    Raises JobError where there is no finished search of that name in the store at `url`, ModelError
    where its models are not what they were.
    """
    named = {f"parents.{name}": parent for name, parent in job.parents.items()}
    if job.base is not None:
        named["base"] = job.base
    searches = {where: parent.search for where, parent in named.items() if parent.search}
    if not searches:
        return job
    if not exists(url):
        where, name = next(iter(searches.items()))
        raise JobError(
            f"{where}.search: '{name}': there is no store '{shown(url)}' yet: run that search "
            "first, or name its store with --store"
        )
    with Store(url) as store:
        for where, name in searches.items():
            named[where] = Parent(model=str(_merged(store, where, name, steps)))
    parents = {name: named[f"parents.{name}"] for name in job.parents}
    return job.model_copy(update={"parents": parents, "base": named.get("base")})


def _merged(store: Store, where: str, name: str, steps: Steps) -> Path:
    """The folder of a search's winner."""
    search = store.search(name)
    recipe, sha = _winner(store, search, where)
    database = store.database.path or Path.cwd() / "evomerge.db"
    folder = database.with_name(f"{database.stem}-winners") / sha
    if _is_whole(folder):
        return folder
    models = _models(store, search, recipe)
    plan = make_plan(recipe, models)
    steps.step(f"merging the winner of search '{name}' into {folder}")
    try:
        write_checkpoint(
            plan, models, folder, progress=lambda written: steps.written(written, plan.bytes)
        )
    except EvomergeError:
        if not _is_whole(folder):  # another process was faster
            raise
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a merge is there; it takes its name when it is complete."""
    return folder.is_dir() and any(folder.iterdir())


def _winner(store: Store, search: SearchRow, where: str) -> tuple[Recipe, str]:
    """The winner's recipe and its canonical hash."""
    if search.state != "finished" or search.verdict is None:
        raise JobError(
            f"{where}.search: '{search.name}' is {search.state} and has no winner yet: resume it "
            f"first (evomerge resume {search.name})"
        )
    winner = search.verdict["winner"]
    document = store.recipe(winner)
    (sha,) = [c.recipe_sha for c in store.candidates(search.id) if c.id == winner]
    if document is None or sha is None:
        raise JobError(
            f"{where}.search: the winner of '{search.name}' has no recipe: name another search"
        )
    return Recipe.from_dict(document), sha


def _models(store: Store, search: SearchRow, recipe: Recipe) -> Mapping[str, Checkpoint]:
    """What the winner is merged from, opened and found to be what it was at launch."""
    known = {model["uri"]: model["sha256"] for model in store.models(search.id).values()}
    models = {path: open_model(path) for path in recipe.model_names()}
    for path, model in models.items():
        if known.get(path) != model.sha:
            raise ModelError(
                f"model '{path}' is not what it was when search '{search.name}' was launched: put "
                "the old files back"
            )
    return models
