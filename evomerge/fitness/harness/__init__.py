"""Tasks of lm-eval: what its harness asks, of which records, and what it makes of the replies.

The harness writes the requests, filters the replies and computes the metric; the live model
answers. Prompts and scores of an item are thus lm-eval's own, save where an item does not fit into
the model's context: that is counted here, where lm-eval cuts its beginning off.

The only owner of lm_eval, which loads once one of its tasks is opened. Knows nothing of seals.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from evomerge.engine import Turn
from evomerge.errors import TaskError
from evomerge.fitness.data import Origin
from evomerge.fitness.example import Example
from evomerge.fitness.harness.library import library
from evomerge.fitness.harness.opening import described, is_task, loaded, remedy
from evomerge.fitness.harness.records import Records
from evomerge.fitness.harness.scorer import HarnessScorer, Item, Request
from evomerge.fitness.task_file import Split
from evomerge.fitness.templates import OwnWords
from evomerge.messages import one_line

__all__ = ["HarnessTask", "is_task", "remedy"]

_SEED = 1234  # of worked examples: lm-eval's own, so that they are the same ones
# Keys that label a task, or say where its records are, which are compared themselves.
_LABELS = {"task", "task_alias", "tag", "group", "metadata", "dataset_path", "dataset_name"} | {
    *("dataset_kwargs", "training_split", "validation_split", "test_split")
}


class HarnessTask:
    """A task of lm-eval, opened.

    name: as in its file. scorer: asks and judges the items that `items` gives. notes: what a reader
    should know of how it was understood. asked: what decides a score besides the items, as JSON.
    """

    def __init__(
        self, task: Any, settings: Mapping[str, Any], chat: bool, metric: str | None
    ) -> None:
        """task: an object of lm-eval's. settings: the plain data of its file."""
        self.name: str = task.task_name
        self.scorer = HarnessScorer.of(task, metric)
        self._task, self._chat = task, chat
        self._records = Records(task)
        self._shots = self._records.restrict_examples()
        decisive = {key: value for key, value in settings.items() if key not in _LABELS}
        self.asked = json.dumps(
            [decisive, task.VERSION, self.scorer.measure, chat], sort_keys=True, default=str
        )
        scored = f"of lm-eval {library().__version__}, scored by {self.scorer.measure}"
        self.notes = tuple(
            f"task '{self.name}': {line}" for line in (scored, self._records.note) if line
        )

    @classmethod
    def open(cls, path: Path, chat: bool = False, metric: str | None = None) -> "HarnessTask":
        """A task file of lm-eval's, or lm-eval:NAME for a task that comes with it.

        chat: ask as a conversation. metric: METRIC or METRIC,FILTER as lm-eval writes them;
        default: the first that is a mean over examples, behind the first filter. Raises TaskError
        for what cannot be read, and for what cannot be scored example by example.
        """
        try:
            what, settings = described(path)
            _check(settings, chat)
            return cls(loaded(what), settings, chat, metric)
        except TaskError as error:
            raise TaskError(f"{path}: {error}") from None

    def records(self, split: Split) -> list[dict[str, Any]]:
        """Of a split, as lm-eval reads and processes them. Raises TaskError."""
        return self._records.of(split)

    def items(self, split: Split) -> tuple[Example, ...]:
        """Of a split. Raises TaskError for a record that the task does not fit."""
        self._task.set_fewshot_seed(_SEED)
        return tuple(self._items(split))

    def own_texts(self, split: Split, items: Sequence[Example]) -> list[str]:
        """See Definition; of a text that a function of the task's makes, all of it."""
        task, text = self._task, self._task.config.doc_to_text
        is_template = isinstance(text, str) and text not in task.features
        if task.prompt is not None or task.multiple_input or not is_template:
            return [item.question for item in items]
        own, found = OwnWords(library().utils.env, text), []
        for item in items:
            whole = str(task.doc_to_text(item.record))
            found.append(own.of(item.record, whole) + item.question.removeprefix(whole))
        return found

    def origin(self, split: Split) -> Origin:
        """See Definition."""
        name, rows = self._records.place(split)
        config = self._task.config
        return Origin(None, config.dataset_path, config.dataset_name, name, rows)

    def groups(self, _: Split) -> None:
        """None: its files have no word for records that belong together."""

    def portable(self) -> None:
        """None: what its functions and templates read is known to lm-eval alone."""

    def own_file(self, _: Split) -> None:
        """None: where its data are is known to lm-eval alone."""

    def _items(self, split: Split) -> Iterator[Example]:
        for number, record in enumerate(self.records(split), 1):
            if self._shots is not None:
                self._shots.hidden = record if split == "train" else None
            try:
                yield self._item(record, number)
            except Exception as error:  # whatever templates and functions of a task raise
                kind = "" if isinstance(error, TaskError) else f"{type(error).__name__}: "
                raise TaskError(
                    f"task '{self.name}': record {number} of {split}: {kind}{one_line(error)}"
                ) from None

    def _item(self, record: dict[str, Any], number: int) -> Item:
        task, config = self._task, self._task.config
        context = task.fewshot_context(
            record,
            num_fewshot=config.num_fewshot or 0,
            apply_chat_template=self._chat,
            fewshot_as_multiturn=self._chat,
            chat_template=_conversation if self._chat else None,
            gen_prefix=task.doc_to_prefix(record),
        )
        made = task.construct_requests(
            doc=record,
            ctx=context,
            metadata=(self.name, number, config.repeats),
            apply_chat_template=self._chat,
        )
        instances = made if isinstance(made, list) else [made]
        question, choices, right, target = _parts(task, record)
        return Item(
            prompt=instances[right if len(instances) > 1 else 0].arguments[0],
            target=target,
            question=question,
            reference=target if self._chat else config.target_delimiter + target,
            choices=choices,
            right=right,
            record=record,
            requests=tuple(map(Request.of, instances)),
        )


def _conversation(messages: Sequence[Mapping[str, str]], **_: Any) -> tuple[Turn, ...]:
    """In place of a chat template: the live model has its own."""
    return tuple(Turn(cast(Any, turn["role"]), turn["content"]) for turn in messages)


def _parts(task: Any, record: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int, str]:
    """Of a record: what it is compared with others by, the choices, which of them is right, and the
    target."""
    text, target = task.doc_to_text(record), task.doc_to_target(record)
    label = target[0] if isinstance(target, list) else target
    if task.config.doc_to_choice is None:
        compared = (text, label) if task.OUTPUT_TYPE == "loglikelihood" else (text,)
        return "\n".join(map(str, compared)), (), 0, str(label)
    choices = tuple(map(str, task.doc_to_choice(record)))
    if task.multiple_input:  # what may come before the target: the text says which one does
        label, compared = text, (*choices, target)
    else:
        compared = (text, *choices)
    right = choices.index(label) if isinstance(label, str) else int(label)
    if not 0 <= right < len(choices):
        raise TaskError(f"its label {label!r} is none of its {len(choices)} choices")
    answer = target if task.multiple_input else choices[right]
    return "\n".join(map(str, compared)), choices, right, str(answer)


def _check(settings: Mapping[str, Any], chat: bool) -> None:
    """Raises TaskError for what no live model can be asked, or what has no score by example."""
    if settings.get("output_type") == "loglikelihood_rolling":
        raise TaskError(
            "output_type: 'loglikelihood_rolling' measures a whole corpus, no examples: write a "
            "task of evomerge's own with 'score: perplexity'"
        )
    if settings.get("doc_to_image") or settings.get("doc_to_audio"):
        raise TaskError("doc_to_image, doc_to_audio: models are given text alone")
    if settings.get("unsafe_code"):
        raise TaskError(
            "unsafe_code: lm-eval runs what a model writes without a sandbox: take a task with "
            "'score: unit_tests'"
        )
    if chat and settings.get("gen_prefix"):
        raise TaskError(
            f"gen_prefix: {settings['gen_prefix']!r}: in a conversation, replies are not begun for "
            "the model: ask without chat"
        )
