"""Writing an export folder, and the one reading of the test split that goes into its report."""

import json
from pathlib import Path
from typing import Any

import numpy as np

import evomerge
from evomerge.errors import InputError, StoreError
from evomerge.export.card import model_card
from evomerge.fitness.evaluate import score_alone
from evomerge.fitness.results import Scores, weighted_mean
from evomerge.fitness.task import Unsealed
from evomerge.guard import estimates
from evomerge.merge.disk import RECIPE, check_free, write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.progress import Steps
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting, versions
from evomerge.seeds import generator
from evomerge.store import CandidateRow, Coordinator, Store

REPORT = "evomerge_report.json"


def export(
    store: Store, name: str, out: Path, candidate: int | None, steps: Steps
) -> dict[str, Any]:
    """Write the winner, or the candidate with this id, to `out`; gives its report.

    A candidate that was exported before gets its stored report again, byte for byte, and the test
    split stays closed. Raises StoreError without such a candidate or before the search has
    finished, SearchBusy, and what check_free raises; all of it before the seal is opened.
    """
    check_free(out)
    chosen = _chosen(store, name, candidate)
    with Coordinator.take_over(store, name) as coordinator:
        setting = Setting.reopen(coordinator)
        recipe = _recipe(store, chosen)
        plan = make_plan(recipe, setting.models)
        report = ""

        def finish(folder: Path) -> None:
            nonlocal report
            stored = store.report(chosen.id)
            if stored is None:
                found = _Reading(setting, coordinator, chosen, recipe, steps).report(folder)
                coordinator.save_report(chosen.id, json.dumps(found, indent=2, ensure_ascii=False))
                stored = store.report(chosen.id)
            report = stored or ""
            (folder / REPORT).write_text(report, encoding="utf-8")
            card = model_card(json.loads(report), plan, setting.models)
            (folder / "README.md").write_text(card, encoding="utf-8")

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
    """Write only the recipe into the folder `out`; nothing is merged and nothing unsealed.

    Raises StoreError without such a candidate, OutputExists, InputError where `out` cannot be made.
    """
    check_free(out, renamed=False)
    recipe = _recipe(store, _chosen(store, name, candidate))
    path = out / RECIPE
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"output '{out}' cannot be written: {reason}") from None
    return path


def _chosen(store: Store, name: str, candidate: int | None) -> CandidateRow:
    row = store.search(name)
    if candidate is None:
        if row.verdict is None:
            raise StoreError(
                f"search '{name}' is {row.state} and has no winner yet: resume it "
                f"(evomerge resume {name}), or name a candidate with --candidate"
            )
        candidate = row.verdict["winner"]
    for found in store.candidates(row.id):
        if found.id == candidate and found.state == "scored":
            return found
        if found.id == candidate:
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


class _Reading:
    """The one reading of the test split for a candidate."""

    def __init__(
        self,
        setting: Setting,
        coordinator: Coordinator,
        candidate: CandidateRow,
        recipe: Recipe,
        steps: Steps,
    ) -> None:
        self._setting = setting
        self._coordinator = coordinator
        self._candidate = candidate
        self._recipe = recipe
        self._steps = steps
        self._verdict = coordinator.search.verdict or {}
        self._best_parent = self._parent()

    def _parent(self) -> CandidateRow:
        """The best source model: fixed by the verdict, or else by all of train."""
        store, row = self._coordinator.store, self._coordinator.search
        sources = {*self._setting.named.parents, "base"}
        rows = [c for c in store.candidates(row.id) if c.generation == 0 and c.label in sources]
        if not rows or any(c.fitness is None for c in rows):
            raise StoreError(f"search '{row.name}' has not scored its parents yet: resume it first")
        if self._verdict:
            return next(c for c in rows if c.id == self._verdict["best_parent"])
        means = store.means(row.id, "full")

        def plain(candidate: CandidateRow) -> float:
            weights = self._setting.weights
            total = sum(weights.values())
            return sum(w * means[candidate.id][t].mean for t, w in weights.items()) / total

        return max(rows, key=lambda c: (plain(c), c.fitness))

    def report(self, folder: Path) -> dict[str, Any]:
        """Unseal, score the exported files and the best parent, and put the report together."""
        setting, sha = self._setting, self._candidate.recipe_sha or ""
        seals, leaves = {}, {}
        for task in setting.tasks.values():
            leave, opened_at, before = self._coordinator.unseal(task.identity("test"), sha)
            leaves[task.name] = leave
            seals[task.name] = {
                "test_content": leave.content,
                "opened_at": opened_at,
                "opened_before": before,
            }
        self._steps.step("scoring the exported model on the sealed test split")
        ours = self._scored(folder, leaves)
        parent_name = str(self._best_parent.label)
        self._steps.step(f"scoring the best parent ({parent_name}) on the same examples")
        parent_path = setting.named.parents.get(parent_name, setting.named.base or "")
        theirs = self._scored(Path(parent_path), leaves)
        random = generator(setting.job.seed, "claim", self._candidate.id)
        gain = estimates.paired_gain(ours, theirs, setting.weights, random)
        return self._document(ours, theirs, gain, seals)

    def _scored(self, folder: Path, leaves: dict[str, Unsealed]) -> dict[str, Scores]:
        """Test scores of a model folder, by task."""
        setting = self._setting
        return score_alone(str(folder), setting.tasks.values(), "test", setting.job.engine, leaves)

    def _estimates_of_another(self) -> dict[str, Any]:
        """Estimates of a candidate that did not win. What choosing it would lead to on new
        examples (bbc_cv) is not known: the search did not choose it."""
        store, row = self._coordinator.store, self._coordinator.search
        weights, own = self._setting.weights, self._candidate.id
        found: dict[str, list[dict[str, Scores]]] = {"train": [], "full": [], "validation": []}
        for e in store.evaluations(row.id, tuple(found)):
            if e.candidate == own and e.scores:
                found[e.purpose].append(e.scores)
        parts = found["train"] or found["full"]  # baselines are scored on all of train alone
        train = {task: Scores.joined([part[task] for part in parts]) for task in parts[0]}
        means = [
            weighted_mean({task: found.mean for task, found in tasks.items()}, weights)
            for candidate, tasks in store.means(row.id, "train").items()
            if candidate != own
        ]
        raw = estimates.score_estimate(train, weights)
        n = sum(len(scores) for scores in train.values())
        shrunk = estimates.shrunk(np.array([*means, raw.value]), n, best=len(means))
        looked = [estimates.score_estimate(part, weights) for part in found["validation"]]
        return {
            "raw_train": raw.as_dict(),
            "shrunk": shrunk.as_dict(),
            "bbc_cv": None,
            "validation": looked[0].as_dict() if looked else None,
        }

    def _document(
        self,
        ours: dict[str, Scores],
        theirs: dict[str, Scores],
        gain: estimates.Gain,
        seals: dict[str, Any],
    ) -> dict[str, Any]:
        setting, row = self._setting, self._coordinator.search
        store, weights = self._coordinator.store, self._setting.weights
        is_winner = self._candidate.id == self._verdict.get("winner")
        candidates = store.candidates(row.id)
        full = store.means(row.id, "full")
        looks = sum(r.kind == "look" and r.search == row.id for r in store.ledger())
        models = store.models(row.id)
        return {
            "search": row.name,
            "candidate": self._candidate.id,
            "label": self._candidate.label,
            "recipe_sha": self._candidate.recipe_sha,
            "winner": is_winner,
            "best_parent": self._best_parent.label,
            "promoted": bool(self._verdict.get("promoted")) if is_winner else False,
            "claim": {
                "gain": gain.estimate.value,
                "interval": list(gain.estimate.interval),
                "level": estimates.LEVEL,
                "p_value": gain.p_value,
                "n": gain.n,
            },
            "estimates": {
                **(self._verdict["estimates"] if is_winner else self._estimates_of_another()),
                "test": estimates.score_estimate(ours, weights).as_dict(),
            },
            "best_parent_test": estimates.score_estimate(theirs, weights).as_dict(),
            "test_scores": {
                task: {
                    "exported": ours[task].mean,
                    "best_parent": theirs[task].mean,
                    "n": len(ours[task]),
                    "truncated": float(ours[task].truncated.mean()),
                    "best_parent_truncated": float(theirs[task].truncated.mean()),
                }
                for task in ours
            },
            "candidates_tried": sum(c.label is None for c in candidates),
            "looks": {"used": looks, "allowed": setting.job.guard.validation_looks},
            "seal": seals,
            "baselines": {
                str(c.label): {t: {"score": row.mean, "n": row.n} for t, row in full[c.id].items()}
                for c in candidates
                if c.generation == 0 and c.id in full
            },
            "parents": [
                {"name": name, "uri": m["uri"], "revision": m["revision"], "sha256": m["sha256"]}
                for name, m in models.items()
            ],
            "stop_reason": row.stop_reason,
            "seed": row.seed,
            "versions": {"launch": row.versions, "export": versions()},
            "evomerge": evomerge.__version__,
        }
