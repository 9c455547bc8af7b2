"""A model by itself on a split: what `evomerge eval` and the one reading of test do."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evomerge.engine import Engine
from evomerge.engine.build import build
from evomerge.errors import SealedError, TaskError, nearest
from evomerge.fitness.example import Example, Verdict
from evomerge.fitness.results import Scores, troubles
from evomerge.fitness.score import packed
from evomerge.fitness.task import Task, Unsealed
from evomerge.fitness.task_file import SPLITS, Split
from evomerge.job import Engine as EngineSection
from evomerge.merge.sources import open_model
from evomerge.recipe import Recipe

_PIECE = 256  # examples that are asked at once, so that progress can be told

Progress = Callable[[int, int], None]  # told how many examples are done, and of how many


@dataclass(frozen=True)
class Evaluated:
    """What `evomerge eval` found: `items` with their `verdicts`, in the split's order, and what
    they come to."""

    model: str
    task: Task
    split: Split
    items: tuple[Example, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def scores(self) -> Scores:
        """The verdicts as arrays."""
        return packed(np.arange(len(self.verdicts), dtype=np.uint32), self.verdicts)

    def document(self) -> dict[str, Any]:
        """The result, as plain data. tokens: of a reply, on average; None where none is written.
        overlong, failed: examples that did not fit into the context, or have a reply that could
        not be graded."""
        scores = self.scores
        return {
            "model": self.model,
            "task": self.task.name,
            "split": self.split,
            "n": len(scores),
            "score": scores.mean,
            "standard_error": scores.standard_error,
            "truncated": float(scores.truncated.mean()),
            "tokens": float(scores.tokens.mean()) if self.task.scorer.generates else None,
            "overlong": int(scores.overlong.sum()),
            "failed": len(scores.failures),
            "troubles": troubles({self.task.name: scores}),
        }

    def samples(self) -> Iterator[dict[str, Any]]:
        """A record for each example, numbered from 1: what was asked, what came back and what it
        was worth."""
        for number, (item, verdict) in enumerate(zip(self.items, self.verdicts, strict=True), 1):
            turns = (
                item.prompt if isinstance(item.prompt, str) else [asdict(t) for t in item.prompt]
            )
            yield {
                "number": number,
                "prompt": turns,
                "target": item.target,
                **({"choices": list(item.choices)} if item.choices else {}),
                **asdict(verdict),
            }


def evaluate_model(
    model: str,
    task: Task,
    split: str,
    engine: EngineSection,
    limit: int | None = None,
    progress: Progress = lambda done, examples: None,
    about_to_ask: Callable[[], None] = lambda: None,
) -> Evaluated:
    """Score a model, by folder or hub id, on a split or the first `limit` examples of it.

    about_to_ask: called once everything is open, before the first example is asked. Raises
    SealedError for the test split, ModelError and TaskError for what cannot be read.
    """
    if split not in SPLITS:
        raise TaskError(f"--split: '{split}' is no split: {nearest(split, SPLITS)}")
    if split == "test":
        raise SealedError("--split: test is sealed: only `evomerge export` reads it")
    items = task.examples(split)[:limit]
    verdicts: list[Verdict] = []
    with _alone(model, engine) as live:
        about_to_ask()
        for piece in _pieces(items):
            progress(len(verdicts), len(items))
            verdicts += task.scorer.judge(live, piece, shaped=False)
    return Evaluated(model, task, split, items, tuple(verdicts))


def score_alone(
    model: str,
    tasks: Iterable[Task],
    split: Split,
    engine: EngineSection,
    leaves: Mapping[str, Unsealed] | None = None,
    progress: Progress = lambda done, examples: None,
) -> dict[str, Scores]:
    """Load a model, unmerged, and score all of a split; by task name, without shaping.

    leaves: leave to read the test split, by task name. Raises SealedError for test without it,
    ModelError and TaskError for what cannot be read.
    """
    leaves = leaves or {}
    items = {task: task.examples(split, leaves.get(task.name)) for task in tasks}
    total = sum(map(len, items.values()))
    verdicts: dict[str, list[Verdict]] = {task.name: [] for task in items}
    with _alone(model, engine) as live:
        for task, all_ in items.items():
            for piece in _pieces(all_):
                progress(sum(map(len, verdicts.values())), total)
                verdicts[task.name] += task.scorer.judge(live, piece, shaped=False)
    progress(total, total)
    return {
        name: packed(np.arange(len(found), dtype=np.uint32), found)
        for name, found in verdicts.items()
    }


def _pieces(items: Sequence[Example]) -> Iterator[Sequence[Example]]:
    for start in range(0, len(items), _PIECE):
        yield items[start : start + _PIECE]


@contextmanager
def _alone(model: str, engine: EngineSection) -> Iterator[Engine]:
    """A live model that is this one, as it is."""
    live = build(engine, {model: open_model(model)}, model)
    try:
        live.load(Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": model}]}))
        yield live
    finally:
        live.close()
