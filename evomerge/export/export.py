"""Writing an export folder: the checkpoint, its recipe, its card, its report and its page."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, OutputExists, StoreError
from evomerge.export.card import model_card
from evomerge.export.report import report_on
from evomerge.merge.disk import RECIPE, write_checkpoint
from evomerge.merge.place import check_free
from evomerge.merge.planner import make_plan
from evomerge.progress import Steps
from evomerge.recipe import Recipe
from evomerge.report import page
from evomerge.search.setting import Setting
from evomerge.store import CandidateRow, Coordinator, Store

REPORT = "evomerge_report.json"
PAGE = "report.html"


def export(
    store: Store, name: str, out: Path, candidate: int | None, steps: Steps
) -> dict[str, Any]:
    """Write the winner, or the candidate with this id, to `out`; gives its report.

    The page in the folder quotes no questions of train and no replies to them: a folder is made to
    be handed on.
    A candidate that was exported before gets its stored report again, byte for byte, and the test
    split stays closed. Raises StoreError without such a candidate or before the search has
    finished, SearchBusy, TaskError where the records of test are not at hand, and what check_free
    raises; all of it before the seal is opened.
    """
    check_free(out)
    chosen = _chosen(store, name, candidate)
    with Coordinator.take_over(store, name) as coordinator:
        setting = Setting.reopen(coordinator)
        if store.report(chosen.id) is None:
            for task in setting.tasks.values():
                task.require_test()
        recipe = _recipe(store, chosen)
        plan = make_plan(recipe, setting.models)
        report = ""

        def finish(folder: Path) -> None:
            nonlocal report
            stored = store.report(chosen.id)
            if stored is not None:
                steps.step("exported before: the stored report stands, test stays closed")
            else:
                found = report_on(setting, coordinator, chosen, folder, steps)
                coordinator.save_report(chosen.id, json.dumps(found, indent=2, ensure_ascii=False))
                stored = store.report(chosen.id)
            report = stored or ""
            (folder / REPORT).write_text(report, encoding="utf-8")
            card = model_card(json.loads(report), plan, setting.models)
            (folder / "README.md").write_text(card, encoding="utf-8")
            text = page.report(store, name, chosen.id, with_answers=False)
            (folder / PAGE).write_text(text, encoding="utf-8")

        steps.step(f"merging {len(plan.tensors)} tensors into {out}")
        write_checkpoint(
            plan,
            setting.models,
            out,
            progress=lambda written: steps.written(written, plan.bytes),
            finish=finish,
        )
        coordinator.log("export", f"candidate {chosen.id} to {out.absolute()}")
    document: dict[str, Any] = json.loads(report)
    return document


def export_recipe(store: Store, name: str, out: Path, candidate: int | None) -> Path:
    """Write only the recipe, see write_recipe; nothing is merged and nothing unsealed. Raises
    StoreError without such a candidate."""
    return write_recipe(out, lambda: _recipe(store, _chosen(store, name, candidate)).to_yaml())


def write_recipe(out: Path, read: Callable[[], str]) -> Path:
    """Write a recipe into the folder `out`, or into `out` itself where that ends as a YAML file
    does and is no folder; gives the file. read: gives the recipe, once it is known that there is a
    place for it.

    Raises OutputExists, InputError where `out` cannot be made, and what `read` raises.
    """
    is_file = out.suffix in (".yaml", ".yml") and not out.is_dir()
    path = out if is_file else out / RECIPE
    if not is_file:
        check_free(out, renamed=False)
    elif os.path.lexists(out):
        raise OutputExists(f"output '{out}' is there already: name another, or remove it")
    text = read()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"output '{out}' cannot be written: {reason}") from None
    return path


def _chosen(store: Store, name: str, candidate: int | None) -> CandidateRow:
    row = store.search(name)
    if candidate is None:
        if row.verdict is None:
            remedy = (
                f"wait for it, or have it choose one now with: evomerge stop {name}"
                if row.state == "running"
                else f"resume it (evomerge resume {name}), or name a candidate with --candidate"
            )
            raise StoreError(f"search '{name}' is {row.state} and has no winner yet: {remedy}")
        candidate = row.verdict["winner"]
    for found in store.candidates(row.id, ids=[candidate], with_genotypes=False):
        if found.state == "scored":
            return found
        raise StoreError(
            f"candidate {candidate} is {found.state} ({found.reason or 'not scored yet'}): "
            f"take another, see evomerge top {name}"
        )
    raise StoreError(f"search '{name}' has no candidate {candidate}: see evomerge top {name}")


def _recipe(store: Store, candidate: CandidateRow) -> Recipe:
    document = store.recipe(candidate.id)
    if document is None:
        raise StoreError(f"candidate {candidate.id} is infeasible and has no recipe: take another")
    return Recipe.from_dict(document)
