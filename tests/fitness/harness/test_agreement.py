"""Scores are those of lm-eval itself, example by example: its own evaluator and its own model on
transformers, beside the live model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.engine.build import build
from evomerge.fitness.harness import HarnessTask
from evomerge.job import Engine as EngineSection
from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from tests import tiny
from tests.fitness.harness.lists import CHOICE, CONTEXT, EXTRACTED, GENERATED, WORD, write

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of lm-eval's own modules

GSM8K = tiny.ROOT.parent / "shared" / "data" / "gsm8k"
Samples = list[dict[str, Any]]


def theirs(
    model: Path, task: str, file: Path, docs: list[int] | None = None, chat: bool = False
) -> Samples:
    """What lm-eval finds for the docs of the test split, by default all, in order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    live = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4)
    found = simple_evaluate(
        model=live,
        tasks=[str(file)],
        task_manager=TaskManager(include_defaults=False),
        samples=None if docs is None else {task: docs},
        log_samples=True,
        bootstrap_iters=0,
        apply_chat_template=chat,
    )
    samples: Samples = found["samples"][task]
    return sorted(samples, key=lambda sample: int(sample["doc_id"]))


def check_same(model: Path, task: HarnessTask, split: Any, samples: Samples, scored: bool) -> None:
    """Prompts, replies and scores of a split are those of lm-eval. scored: some but not all of them
    are right, so that to agree means something."""
    section = EngineSection(device="cpu", dtype="float32", threads=1)
    live = build(section, {str(model): Checkpoint.open(model)}, str(model))
    live.load(Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    items = task.items(split)
    verdicts = task.scorer.judge(live, items, shaped=False)
    live.close()
    metric, chain = task.scorer.metric, task.scorer.filter
    samples = [sample for sample in samples if sample["filter"] == chain]
    assert len(items) == len(samples) > 4
    for item, verdict, sample in zip(items, verdicts, samples, strict=True):
        first = sample["arguments"][item.right if len(sample["arguments"]) > 1 else 0]
        assert item.prompt == first[0] or not isinstance(item.prompt, str)
        if task.scorer.generates:
            assert list(verdict.replies) == sample["resps"][0]
        assert verdict.score == float(sample[metric])
        assert not verdict.overlong
    if scored:
        assert 0 < sum(verdict.score for verdict in verdicts) < len(verdicts)


@pytest.mark.parametrize(
    ("keys", "metrics", "scored"),
    [
        (GENERATED, ["exact_match"], True),
        (EXTRACTED, ["exact_match,strict-match", "exact_match,flexible-extract"], False),
        (EXTRACTED, ["exact_match,flexible-extract"], True),
        ({**GENERATED, "num_fewshot": 1, "fewshot_split": "train"}, ["exact_match"], False),
        (CHOICE, ["acc", "acc_norm", "acc_mutual_info"], True),
        ({**CHOICE, "num_fewshot": 1}, ["acc", "acc_norm"], True),
        ({**CHOICE, "description": "sort: "}, ["acc", "acc_norm"], True),
        (CONTEXT, ["acc"], False),
        (WORD, ["acc"], True),
    ],
)
def test_of_the_zoo_on_tasks_of_every_kind(
    tmp_path: Path, keys: dict[str, Any], metrics: list[str], scored: bool
) -> None:
    file = write(tmp_path, "lists", n=40, **keys)
    model = tiny.ZOO / "ops-early"
    samples = theirs(model, "lists", file)
    for metric in metrics:
        check_same(model, HarnessTask.open(file, metric=metric), "test", samples, scored)


@pytest.mark.parametrize("keys", [GENERATED, CHOICE])
def test_in_a_conversation_with_worked_examples(tmp_path: Path, keys: dict[str, Any]) -> None:
    model = shutil.copytree(tiny.ZOO / "ops-early", tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    turns = "{% for turn in messages %}{{ turn.role[0] + turn.content + ' ' }}{% endfor %}"
    config["chat_template"] = (
        "{{ bos_token }}" + turns + "{% if add_generation_prompt %}= {% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    file = write(tmp_path, "lists", n=40, description="Sort.", num_fewshot=1, **keys)
    samples = theirs(model, "lists", file, chat=True)
    check_same(model, HarnessTask.open(file, chat=True), "test", samples, scored=False)


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"no data at {GSM8K}")
def test_of_lm_evals_own_gsm8k_with_its_filters_and_worked_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    folder = tmp_path / "openai" / "gsm8k"
    files = []
    for split, n in (("train", 60), ("test", 24)):
        lines = (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:n]
        tiny.write_jsonl(folder / f"{split}.jsonl", [json.loads(line) for line in lines])
        files.append({"split": split, "path": f"{split}.jsonl"})
    about = yaml.safe_dump({"configs": [{"config_name": "main", "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{about}---\n")
    monkeypatch.chdir(tmp_path)
    model = tiny.write_model(tmp_path / "model", seed=5, hidden=32)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))

    tasks = [
        HarnessTask.open(Path("lm-eval:gsm8k"), metric=f"exact_match,{chain}")
        for chain in ("strict-match", "flexible-extract")
    ]
    lines = (folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in lines]
    half = {str(record["question"]) for record in tasks[0].records("test")}
    docs = [number for number, question in enumerate(questions) if question in half]
    file = Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml"
    samples = theirs(model, "gsm8k", file, docs)
    for task in tasks:
        check_same(model, task, "test", samples, scored=False)
