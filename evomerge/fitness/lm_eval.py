"""Task files of lm-eval, as evomerge's own: what a task asks, of which files, and what counts.

Reads tasks whose replies are generated and compared with a reference answer, over JSON Lines on
disk. Whatever else a file asks for is refused, never left out.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evomerge.errors import TaskError, nearest
from evomerge.messages import explain

_REFUSED = {
    "include": "files that include others are not read: write the keys of both into this one",
    "process_docs": "no Python is run: process the records beforehand",
    "process_results": "no Python is run: exact_match is what counts",
    "doc_to_choice": "choices are not scored: ask for a reply with generate_until",
    "gen_prefix": "replies are not begun for the model: end doc_to_text with it",
    "use_prompt": "no library of prompts is read: write doc_to_text",
    "custom_dataset": "no Python is run: write the records to a file",
    "doc_to_image": "models are given text alone",
    "doc_to_audio": "models are given text alone",
}
_ON_DISK = (
    "only JSON Lines on disk are read: write the records to .jsonl files, then dataset_path: json "
    "and dataset_kwargs: {data_files: {train: FILE, test: FILE}}"
)
_FIELD = re.compile(r"[A-Za-z_]\w*")
# What a chain of filters may do to a reply without changing whether it matches.
_HARMLESS = {"take_first", "remove_whitespace"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Data(_Part):
    data_files: str | dict[str, str | list[str]]


class _Generation(_Part):
    until: str | list[str] = ["\n\n"]
    max_gen_toks: int = 256
    do_sample: bool = False
    temperature: float = 0.0


class _Metric(BaseModel):
    """Its other keys are options of the metric, or say how it is printed."""

    model_config = ConfigDict(frozen=True, extra="allow")

    metric: str
    aggregation: str = "mean"
    higher_is_better: bool = True


class _File(_Part):
    """The keys of a task file that are understood, or mean nothing where nothing is to be shown."""

    task: str
    dataset_path: str
    dataset_name: str | None = None
    dataset_kwargs: _Data | None = None
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    output_type: str = "generate_until"
    num_fewshot: int | None = None
    description: str = ""
    doc_to_text: str
    doc_to_target: str
    target_delimiter: str = " "
    generation_kwargs: _Generation = _Generation()
    metric_list: list[_Metric] = [_Metric(metric="exact_match")]
    filter_list: list[dict[str, Any]] = []
    repeats: Literal[1] = 1
    fewshot_split: Any = Field(None, description="Of no use without examples in the prompt.")
    fewshot_config: Any = None
    fewshot_delimiter: Any = None
    should_decontaminate: Any = Field(None, description="Splits are compared by prompts anyway.")
    doc_to_decontamination_query: Any = None
    metadata: Any = Field(None, description="Names and labels.")
    tag: Any = None
    group: Any = None
    task_alias: Any = None


def is_task(data: Any) -> bool:
    """Whether the plain data of a task file is lm-eval's rather than evomerge's own."""
    return isinstance(data, Mapping) and "task" in data and "name" not in data


def remedy(error: Exception) -> str | None:
    """Of a file that is not plain YAML because Python functions stand in it, as lm-eval allows."""
    python = "!function" in str(error)
    return "no Python is run: write Jinja in place of !function" if python else None


def understood(data: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The plain data of evomerge's own task file, and what a reader should know of it.

    Raises TaskError for what evomerge cannot score as lm-eval would.
    """
    try:
        file = _File.model_validate(data)
        _check(file)
        sources, note = _data(file)
    except ValidationError as error:
        raise TaskError(f"{path}: {explain(error, _File, _REFUSED)}") from None
    except ValueError as error:
        raise TaskError(f"{path}: {error}") from None
    generation = file.generation_kwargs
    until = [generation.until] if isinstance(generation.until, str) else generation.until
    task = {
        "name": file.task,
        "data": sources,
        "prompt": file.description + _template(file.doc_to_text),
        # What separates it from the prompt belongs to what a model would have to say.
        "target": file.target_delimiter + _template(file.doc_to_target),
        "generate": {"max_new_tokens": generation.max_gen_toks, "stop": until},
        "score": "exact_match",
    }
    scoring = "scored by exact_match, which is blind to how white space and widths are written"
    notes = (f"{path} is lm-eval's: {scoring}", *([note] if note else []))
    return task, tuple(f"task '{file.task}': {text}" for text in notes)


def _template(text: str) -> str:
    """A field's name stands for the field."""
    return f"{{{{ {text} }}}}" if _FIELD.fullmatch(text) else text


def _check(file: _File) -> None:
    if file.output_type != "generate_until":
        raise ValueError(
            f"output_type: '{file.output_type}' cannot be scored: only generate_until can, with "
            "exact_match"
        )
    if file.num_fewshot:
        raise ValueError(
            f"num_fewshot: {file.num_fewshot}: prompts hold no worked examples: write 0, or write "
            "them into 'description'"
        )
    if file.generation_kwargs.do_sample or file.generation_kwargs.temperature > 0:
        raise ValueError("generation_kwargs: replies are never sampled: write do_sample: false")
    metrics = [found for found in file.metric_list if found.metric == "exact_match"]
    if not metrics:
        raise ValueError(
            f"metric_list: {', '.join(found.metric for found in file.metric_list)}: cannot be "
            "scored: only exact_match can"
        )
    for option, value in (metrics[0].model_extra or {}).items():
        if value:
            raise ValueError(f"metric_list: {option}: exact_match has no such option: leave it out")
    for chain in file.filter_list:
        for step in chain.get("filter", ()):
            if step.get("function") not in _HARMLESS:
                raise ValueError(
                    f"filter_list: '{step.get('function')}': replies are compared whole: stop them "
                    "where the answer ends with generation_kwargs.until"
                )


def _data(file: _File) -> tuple[dict[str, Any], str | None]:
    """The `data` of the task, and what to say where splits are missing."""
    train, *held = (
        _path(file, role) for role in ("training_split", "validation_split", "test_split")
    )
    others = list(dict.fromkeys(name for name in held if name not in (None, train)))
    if train and len(others) == 2:
        return {"train": train, "validation": others[0], "test": others[1]}, None
    if train and others:
        return (
            {"train": train, "source": others[0], "split": "hash"},
            f"'{others[0]}' is halved into validation and test by the hash of each record",
        )
    # Without a training split; a test set that can be spared is left alone.
    if not (train or others):
        raise ValueError("no split is named: give training_split, validation_split or test_split")
    source = train or others[0]
    lacking = "nothing but a training split" if train else "no training split"
    return (
        {"source": source, "split": "hash"},
        f"warning: it has {lacking}: '{source}' is divided by the hash of each record into train "
        "(60%), validation (20%) and test (20%), so no score is one of the whole benchmark",
    )


def _path(file: _File, role: str) -> str | None:
    """The file of a split, relative to the task file."""
    split: str | None = getattr(file, role)
    if split is None:
        return None
    if file.dataset_path != "json" or file.dataset_name or file.dataset_kwargs is None:
        raise ValueError(f"dataset_path: '{file.dataset_path}': {_ON_DISK}")
    files = file.dataset_kwargs.data_files
    by_split = {"train": files} if isinstance(files, str) else files
    if split not in by_split:
        raise ValueError(f"{role}: '{split}' is none of data_files: {nearest(split, by_split)}")
    found = by_split[split]
    names = [found] if isinstance(found, str) else found
    if len(names) != 1:
        raise ValueError(f"data_files.{split}: {len(names)} files: join them to one")
    return names[0]
