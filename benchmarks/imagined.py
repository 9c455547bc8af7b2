"""Searches whose truth is known: everything is real but the models' answers.

Which answers are right is drawn for each merge and example, with a probability that depends on how
good the merge is and how hard the example: so how good each merge is on new examples is known, and
whatever a search claims can be held against it. The engine alone is imagined. Jobs, spaces,
optimizers, scoring, store, finals, merged files and the one reading of test are evomerge's own.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.landscape import Landscape
from evomerge.engine import Generation, Likelihood, Prompt, Reply
from evomerge.export.export import export
from evomerge.fitness import evaluate
from evomerge.fitness.results import Scores
from evomerge.fitness.task_file import SPLITS
from evomerge.job import Job
from evomerge.merge.disk import RECIPE
from evomerge.progress import Steps
from evomerge.recipe import Recipe
from evomerge.search import Silent, launch
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from evomerge.store import Store
from tests import tiny

PARENTS = ("ops", "ja")
TASK = "imagined"
_LAYERS = 10  # two parents with a weight for each layer, the embeddings, norm and head: 24
_LOW, _HIGH = -0.5, 1.5  # of a weight
_SPREAD = 1.5  # standard deviation of the examples' difficulty, in logits
_LEVEL = 0.0  # quality of every merge where there is nothing to find, in logits
_RIGHT, _WRONG = Likelihood((-0.1,), True), Likelihood((-3.0,), False)


@dataclass(frozen=True)
class World:
    """How good merges are, and which examples there are.

    landscape: None where all are equally good, parents too. sizes: items by split.
    """

    seed: int
    landscape: Landscape | None
    sizes: dict[str, int]

    @cached_property
    def difficulties(self) -> NDArray[np.float64]:
        """Of each item, those of train first, then validation, then test, in logits."""
        random = generator(self.seed, "difficulties")
        return random.normal(0.0, _SPREAD, size=sum(self.sizes.values()))

    def quality(self, recipe: Recipe) -> float:
        """Of the merge that a recipe makes, in logits; parents and baselines are alike."""
        if self.landscape is None:
            return _LEVEL
        point = _point(recipe)
        away = (np.full(len(self.landscape.optimum), 0.5) if point is None else point) - (
            self.landscape.optimum
        )
        return float(self.landscape.highest - away @ self.landscape.curvature @ away)

    def truth(self, recipe: Recipe) -> float:
        """The share of all possible examples that its merge solves."""
        points, weights = np.polynomial.hermite_e.hermegauss(61)
        chances = 0.5 + 0.5 * np.tanh((self.quality(recipe) - _SPREAD * points) / 2)
        return float(chances @ weights / weights.sum())

    def answers(self, recipe: Recipe) -> NDArray[np.bool_]:
        """Whether it solves each of the items; the same whenever it is asked, and wherever the
        folders of the models are."""
        text = json.dumps([self.seed, recipe.to_dict()], sort_keys=True)
        for model in recipe.model_names():
            text = text.replace(json.dumps(model), json.dumps(Path(model).name))
        digest = hashlib.sha256(text.encode()).digest()
        random = np.random.default_rng(int.from_bytes(digest[:8], "big"))
        chances = 0.5 + 0.5 * np.tanh((self.quality(recipe) - self.difficulties) / 2)
        found: NDArray[np.bool_] = random.random(len(chances)) < chances
        return found


def _point(recipe: Recipe) -> NDArray[np.float64] | None:
    """Of the unit cube, of a recipe that a search proposed; None of others."""
    document = recipe.to_dict()
    weights = [entry.get("parameters", {}).get("weight") for entry in document["models"]]
    if not all(isinstance(weight, list) for weight in weights):
        return None
    values = [entry["value"] for weight in weights for entry in weight]
    return (np.array(values) - _LOW) / (_HIGH - _LOW)


class ImaginedEngine:
    """See Engine. Knows an item by its number, which is its prompt's last word."""

    merges_ahead = False

    def __init__(self, world: World) -> None:
        self._world = world
        self._answers: list[bool] = []

    def load(self, recipe: Recipe) -> None:
        """A folder that was merged by evomerge is the recipe that it was merged by."""
        document = recipe.to_dict()
        if document["merge_method"] == "passthrough":
            path = Path(document["models"][0]["model"]) / RECIPE
            if path.exists():
                recipe = Recipe.from_file(path)
        self._answers = self._world.answers(recipe).tolist()

    def prepare(self, recipe: Recipe) -> bool:
        """See Engine."""
        return False

    def generate(self, prompts: Sequence[Prompt], how: Generation) -> list[tuple[Reply, ...]]:
        """See Engine; never called."""
        raise NotImplementedError("the imagined task is teacher-forced: nothing is written")

    def likelihoods(
        self, pairs: Sequence[tuple[Prompt, str]], ended: bool = True
    ) -> list[Likelihood]:
        """Of the right answer."""
        answers = self._answers
        return [_RIGHT if answers[int(str(p).rsplit(" ", 1)[1])] else _WRONG for p, _ in pairs]

    def close(self) -> None:
        """See Engine."""


@dataclass(frozen=True)
class ImaginedSetting(Setting):
    """An opened job whose models answer as the world says."""

    world: World = field(default_factory=lambda: World(0, None, {}))

    def engine(self) -> ImaginedEngine:
        """See Setting."""
        return ImaginedEngine(self.world)


def imagined(folder: Path, world: World, **changes: Any) -> ImaginedSetting:
    """A job in this world, opened; keys of `changes` replace whole sections. Models and task are
    written to `folder` where they are not there."""
    for seed, name in enumerate(("base", *PARENTS)):
        if not (folder / name).exists():
            tiny.write_model(folder / name, seed, layers=_LAYERS, hidden=8)
    _write_task(folder / "task", world.sizes)
    job: dict[str, Any] = {
        "name": f"imagined-{world.seed}",
        "seed": world.seed,
        "parents": {name: {"model": str(folder / name)} for name in PARENTS},
        "base": {"model": str(folder / "base")},
        "space": {"preset": "per_layer_task_arithmetic"},
        "tasks": [{"task": str(folder / "task")}],
        "shaping": 0.0,
        "optimizer": {"name": "cma-es"},
        "engine": {"device": "cpu", "threads": 1},
    }
    path = folder / "job.yaml"
    path.write_text(json.dumps(job | changes))  # JSON is YAML
    return replace(ImaginedSetting.open(Job.from_file(path)), world=world)


def _write_task(folder: Path, sizes: dict[str, int]) -> None:
    if (folder / "task.yaml").exists():
        return
    number = 0
    for split in SPLITS:
        records = [{"q": f"{split} {number + i}"} for i in range(sizes[split])]
        tiny.write_jsonl(folder / f"{split}.jsonl", records)
        number += sizes[split]
    text = f"""name: {TASK}
data: {{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}
prompt: "{{{{ q }}}}"
target: "yes"
generate: {{max_new_tokens: 1}}
score: exact_match
teacher_forced: true
"""
    (folder / "task.yaml").write_text(text, encoding="utf-8")


def searched(setting: ImaginedSetting, url: str) -> None:
    """Conduct a search to its end."""
    launch(setting, url, Silent(), lambda: False)


def exported(setting: ImaginedSetting, url: str, out: Path) -> dict[str, Any]:
    """Merge the winner of a finished search and unseal test; gives the report."""
    steps = Steps(lambda text: None, lambda written, total: None)

    def build(*_: object) -> ImaginedEngine:
        return ImaginedEngine(setting.world)

    with Store(url) as store, patch.object(evaluate, "build", build):
        return export(store, setting.job.name, out, None, steps)


def train_scores(store: Store, search: int) -> dict[int, Scores]:
    """Of each candidate on the driving examples, its stages joined, by id."""
    parts: dict[int, list[Scores]] = {}
    for e in store.evaluations(search, ("train",)):
        if e.scores is not None:
            parts.setdefault(e.candidate, []).append(e.scores[TASK])
    return {id: Scores.joined(found) for id, found in parts.items()}
