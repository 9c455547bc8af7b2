"""Records of a task of lm-eval: which of them are train, validation and test, and which may be
shown as worked examples."""

from collections.abc import Callable, Mapping
from typing import Any

from evomerge.errors import TaskError
from evomerge.fitness.task_file import SPLITS, Split, canonical, part_of
from evomerge.messages import one_line

_KEYS: dict[Split, str] = {
    "train": "training_split",
    "validation": "validation_split",
    "test": "test_split",
}


class Records:
    """The splits that a task of lm-eval has, made into train, validation and test.

    note: what to say where splits are missing.
    """

    def __init__(self, task: Any) -> None:
        self._task = task
        given = (task.has_training_docs(), task.has_validation_docs(), task.has_test_docs())
        roles = [role for role, has in zip(SPLITS, given, strict=True) if has]
        # Of roles that name the same split, the first stands for them all.
        self._roles: dict[str, Split] = {}
        for role in roles:
            self._roles.setdefault(getattr(task.config, _KEYS[role]) or role, role)
        self._origins, self.note = self._plan()
        self._read: dict[Split, list[dict[str, Any]]] = {}

    def of(self, split: Split) -> list[dict[str, Any]]:
        """Of a split, as lm-eval reads and processes them. Raises TaskError."""
        origin = self._origins[split]
        if origin not in self._read:
            self._read[origin] = self._docs(origin)
        parts = self._sharing(origin)
        if len(parts) == 1:
            return self._read[origin]
        own = [record for record in self._read[origin] if part_of(record, parts) == split]
        if not own:
            raise TaskError(
                f"task '{self._task.task_name}': of its {len(self._read[origin])} records none "
                f"falls into {split}: give more of them"
            )
        return own

    def place(self, split: Split) -> tuple[str, tuple[int, ...] | None]:
        """What lm-eval calls the split that the records of ours are of, and their places there."""
        self.of(split)
        origin = self._origins[split]
        parts = self._sharing(origin)
        name = getattr(self._task.config, _KEYS[origin]) or origin
        if self._task.config.process_docs is not None:
            return name, None
        records = enumerate(self._read[origin])
        shared = len(parts) > 1
        return name, tuple(
            row for row, record in records if not shared or part_of(record, parts) == split
        )

    def _sharing(self, origin: Split) -> list[Split]:
        """Our splits that are made of one of lm-eval's."""
        return [part for part in SPLITS if self._origins[part] == origin]

    def restrict_examples(self) -> "Shots | None":
        """Let worked examples come from train alone; None where they are none of its records.

        Raises TaskError where lm-eval takes them from what is scored.
        """
        task = self._task
        written = task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None
        if not task.config.num_fewshot or written:
            return None
        name = task.fewshot_cfg.split or next(iter(self._roles))
        role = self._roles.get(name)
        if role is None:  # a split that serves nothing else
            return None
        if role != self._origins["train"]:
            raise TaskError(
                f"fewshot_split: '{name}' is what {role} is made of: worked examples come from "
                "train alone: name a training_split and take them from there, or write "
                "num_fewshot: 0"
            )
        if self._origins["validation"] == role:
            task.sampler.replace_df(self.of("train"))
        shots = task.sampler = Shots(task.sampler)
        return shots

    def _plan(self) -> tuple[dict[Split, Split], str | None]:
        """From which of lm-eval's splits each of ours is taken, and the note."""
        names = {role: name for name, role in self._roles.items()}
        others = [role for role in SPLITS[1:] if role in names]
        if "train" in names and len(others) == 2:
            return {role: role for role in SPLITS}, None
        if "train" in names and others:
            return (
                {"train": "train", "validation": others[0], "test": others[0]},
                f"'{names[others[0]]}' is halved into validation and test by the hash of each "
                "record",
            )
        # Without a training split; a test set that can be spared is left alone.
        source = next(iter(names))
        lacking = "nothing but a training split" if source == "train" else "no training split"
        return (
            dict.fromkeys(SPLITS, source),
            f"warning: it has {lacking}: '{names[source]}' is divided by the hash of each record "
            "into train (60%), validation (20%) and test (20%), so no score is one of the whole "
            "benchmark",
        )

    def _docs(self, role: Split) -> list[dict[str, Any]]:
        task = self._task
        read: dict[Split, Callable[[], Any]] = {
            "train": task.training_docs,
            "validation": task.validation_docs,
            "test": task.test_docs,
        }
        try:
            records = list(read[role]())
            for record in records:
                canonical(record)
        except Exception as error:  # of datasets, or of the task's own functions
            raise TaskError(
                f"task '{task.task_name}': its records cannot be read: {type(error).__name__}: "
                f"{one_line(error)}"
            ) from None
        if not records:
            raise TaskError(f"task '{task.task_name}': its split for {role} is empty")
        return records


class Shots:
    """lm-eval's choice of worked examples, save an item that is not to be shown to itself."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.hidden: Mapping[str, Any] | None = None

    def sample(self, n: int, eval_doc: Any = None) -> Any:
        """As lm-eval's samplers do."""
        return self._sampler.sample(n, eval_doc=self.hidden or eval_doc)

    def set_rnd(self, seed: int | None) -> None:
        """As lm-eval's samplers do."""
        self._sampler.set_rnd(seed)
