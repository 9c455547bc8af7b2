"""Train the zoo: a base, its specialists and the tasks that ask for both of their skills at once.

Run `python examples/zoo/train.py`. Everything comes from the seed: on one machine, the same seed
writes the same files. One CPU thread is enough.

This module knows models, training and files. What the prompts mean is in `language.py`. It knows
nothing of merging, but its settings do: they were chosen by hand, by how well the models merged on
these very tasks (their items were drawn anew afterwards). The zoo is there to be searched, not to
show how often real models merge so well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import language
import numpy as np
import torch
import torch.nn.functional as F
from language import (
    BOS,
    EASY_OPERATIONS,
    EOS,
    JA_WORDS,
    LIST_OPERATIONS,
    OLD_LANGUAGES,
    PAD,
    RESULT,
    SCRIPTS,
    TRANSCRIBE,
    UNK,
    Ask,
    Example,
)
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evomerge.fitness.task import Task as OpenedTask

HERE = Path(__file__).resolve().parent
IGNORE = -100  # label of a position that is not scored

WORDS = language.vocabulary()
IDS = {word: i for i, word in enumerate(WORDS)}

OLD_EASY = Ask(RESULT, tuple(EASY_OPERATIONS))
OLD_OPERATIONS = Ask(RESULT, tuple(LIST_OPERATIONS))
OLD_TRANSCRIPTION = Ask(TRANSCRIBE)
JA_TRANSCRIPTION = Ask(TRANSCRIBE, languages=("ja",), borrow=0.0)
MIXED_TRANSCRIPTION = Ask(
    TRANSCRIBE, languages=(*OLD_LANGUAGES, "ja"), lenders=(*OLD_LANGUAGES, "ja", "ja")
)
JA_EASY = Ask(RESULT, tuple(EASY_OPERATIONS), languages=("ja",), borrow=0.0)
JA_EASY_KANJI = Ask(RESULT, tuple(EASY_OPERATIONS), languages=("ja",), borrow=0.0, script="kanji")
ROMAN_TRANSCRIPTION = Ask(TRANSCRIBE, script="roman")
ROMAN_EASY = Ask(RESULT, tuple(EASY_OPERATIONS), script="roman")


@dataclass(frozen=True)
class Stage:
    """One run of training, from one checkpoint to another."""

    name: str
    start: str | None  # the checkpoint to go on from; None: random weights
    steps: int
    mix: tuple[tuple[float, Ask], ...]  # shares of the batch
    matrix_rate: float  # Muon, for the layers' matrices
    other_rate: float  # Adam, for embeddings, head and norms
    noise: float = 1.0  # on the input embeddings, in units of their RMS
    rows: tuple[str, ...] = ()  # if given: train only these words' rows ...
    head: bool = False  # ... of the input embeddings, and of the output head too if true
    pull: float = 0.0  # of those rows towards their start, per step
    early: tuple[str, int] | None = None  # also keep a checkpoint, under this name, at this step


STAGES = (
    Stage("base", None, 700, ((0.6, OLD_TRANSCRIPTION), (0.4, OLD_EASY)), 0.02, 0.004),
    Stage(
        "ops",
        "base",
        1200,
        ((0.7, OLD_OPERATIONS), (0.2, OLD_TRANSCRIPTION), (0.1, OLD_EASY)),
        0.012,
        0.001,
        early=("ops-early", 300),
    ),
    Stage(
        "ja-rows",
        "base",
        400,
        ((0.3, JA_TRANSCRIPTION), (0.4, MIXED_TRANSCRIPTION), (0.3, JA_EASY)),
        0.0,
        0.02,
        rows=JA_WORDS,
        pull=0.01,
    ),
    Stage(
        "ja",
        "ja-rows",
        300,
        ((0.5, JA_TRANSCRIPTION), (0.1, MIXED_TRANSCRIPTION), (0.4, JA_EASY_KANJI)),
        0.04,  # fast on purpose: the drift is what a search has to undo, layer by layer
        0.0065,
        noise=0.5,
    ),
    Stage(
        "roman-rows",
        "base",
        300,
        ((0.5, ROMAN_TRANSCRIPTION), (0.5, ROMAN_EASY)),
        0.0,
        0.02,
        rows=(*SCRIPTS["roman"], *SCRIPTS["digits"]),
        head=True,
    ),
    Stage(
        "roman",
        "roman-rows",
        120,
        ((0.5, ROMAN_TRANSCRIPTION), (0.5, ROMAN_EASY)),
        0.008,
        0.002,
    ),
)
MODELS = ("base", "ops", "ops-early", "ja", "roman")  # what is kept on disk

BATCH = 64
WARM_UP = 20  # steps
DECAY_FROM = 0.6  # of the steps; linear to zero from here


@dataclass(frozen=True)
class Task:
    """One task folder: what it asks, and how many examples each split holds."""

    name: str
    ask: Ask
    sizes: tuple[tuple[str, int], ...] = (("train", 768), ("validation", 480), ("test", 1000))


def _ja_operations(script: str) -> Ask:
    return Ask(RESULT, tuple(LIST_OPERATIONS), languages=("ja",), borrow=0.0, script=script)


TASKS = (
    Task("ja_list_ops", _ja_operations("digits")),
    Task("ja_list_ops_roman", _ja_operations("roman")),
    Task("en_list_ops", Ask(RESULT, tuple(LIST_OPERATIONS), languages=("en",))),
    Task("ja_transcription", Ask(TRANSCRIBE, tuple(LIST_OPERATIONS), ("ja",), borrow=0.0)),
)


def seed_for(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose, so that no stage depends on what ran before it."""
    return zlib.crc32(f"{seed} {purpose}".encode())


# --- model ---------------------------------------------------------------------------------------


def build_model(seed: int) -> LlamaForCausalLM:
    """A small Llama (0.27M parameters) with random weights drawn from `seed`."""
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        dtype="float32",
    )
    with torch.random.fork_rng():  # the constructor draws from the global generator
        model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed_for(seed, "weights"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                table = "embed" in name or "lm_head" in name
                std = 0.02 if table else parameter.shape[1] ** -0.5 / 2
                parameter.normal_(0.0, std, generator=generator)
    return model


def encode(examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [examples, longest], padded on the right.

    A row is <s> prompt answer </s>; only the answer and </s> carry labels.
    """
    rows = []
    for example in examples:
        prompt = [IDS[BOS], *(IDS[word] for word in example.prompt)]
        answer = [*(IDS[word] for word in example.answer), IDS[EOS]]
        rows.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), IDS[PAD])
    labels = torch.full((len(rows), width), IGNORE)
    for i, (row, marks) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, : len(row)] = torch.tensor(marks)
    return ids, labels


def answer_logits(model: LlamaForCausalLM, embeddings: Tensor, labels: Tensor) -> Tensor:
    """Logits [answer tokens, words] at the positions that predict a labelled token.

    `embeddings` is [examples, tokens, hidden]. Padding is on the right, so causal attention
    alone keeps it out of sight: no mask is needed.
    """
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, :-1][labels[:, 1:] != IGNORE])


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, examples: list[Example]) -> float:
    """Share of examples whose answer and end are all the most likely tokens."""
    ids, labels = encode(examples)
    logits = answer_logits(model, model.model.embed_tokens(ids), labels)
    answered = labels[:, 1:] != IGNORE
    wrong = torch.zeros(answered.shape, dtype=torch.bool)
    wrong[answered] = logits.argmax(-1) != labels[:, 1:][answered]
    return 1.0 - wrong.any(1).float().mean().item()


# --- optimizers ----------------------------------------------------------------------------------


class Muon:
    """Momentum with orthogonalised updates, for matrices (Jordan et al., 2024)."""

    def __init__(self, matrices: list[nn.Parameter], momentum: float = 0.95) -> None:
        self.matrices = matrices
        self.momentum = momentum
        self.velocities = [torch.zeros_like(matrix) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for matrix, velocity in zip(self.matrices, self.velocities, strict=True):
            velocity.lerp_(matrix.grad, 1 - self.momentum)
            nesterov = matrix.grad.lerp(velocity, self.momentum)
            scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
            matrix.sub_(orthogonalise(nesterov), alpha=rate * scale)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix whose singular values are about 1, by Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steep at zero; values settle between 0.7 and 1.2
    x = matrix / (matrix.norm() + 1e-7)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Adam:
    """Adam (Kingma and Ba, 2014) for everything that is not a layer's matrix."""

    def __init__(self, parameters: list[nn.Parameter], betas: tuple[float, float] = (0.9, 0.95)):
        self.parameters = parameters
        self.betas = betas
        self.first = [torch.zeros_like(parameter) for parameter in parameters]
        self.second = [torch.zeros_like(parameter) for parameter in parameters]
        self.time = 0

    @torch.no_grad()
    def step(self, rate: float) -> None:
        self.time += 1
        b1, b2 = self.betas
        for parameter, m, v in zip(self.parameters, self.first, self.second, strict=True):
            m.lerp_(parameter.grad, 1 - b1)
            v.lerp_(parameter.grad**2, 1 - b2)
            m_hat = m / (1 - b1**self.time)
            v_hat = v / (1 - b2**self.time)
            parameter.sub_(m_hat / (v_hat.sqrt() + 1e-8), alpha=rate)


def schedule(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak: linear up, flat, linear down to zero."""
    up = (step + 1) / WARM_UP
    down = (steps - step) / (steps * (1 - DECAY_FROM))
    return min(up, 1.0, down)


# --- training ------------------------------------------------------------------------------------


def batches(stage: Stage, seed: int) -> Iterator[list[Example]]:
    """Batches without end, drawn from the stage's mix over the parents' share of the cells."""
    rng = np.random.default_rng(seed_for(seed, f"{stage.name} batches"))
    shares = np.array([share for share, _ in stage.mix])
    while True:
        kinds = rng.choice(len(stage.mix), size=BATCH, p=shares / shares.sum())
        yield [language.draw(stage.mix[kind][1], rng) for kind in kinds]


def stepper(stage: Stage, model: LlamaForCausalLM) -> Callable[[float], None]:
    """The function that applies one update at a given fraction of the peak learning rates."""
    if stage.rows:
        return row_stepper(stage, model)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    muon = Muon(matrices)
    adam = Adam([p for p in model.parameters() if id(p) not in chosen])

    def step(fraction: float) -> None:
        muon.step(stage.matrix_rate * fraction)
        adam.step(stage.other_rate * fraction)

    return step


def row_stepper(stage: Stage, model: LlamaForCausalLM) -> Callable[[float], None]:
    """Like `stepper`, for a stage that trains only some words' rows."""
    tables = [model.model.embed_tokens.weight]
    if stage.head:
        tables.append(model.lm_head.weight)
    rows = torch.tensor([IDS[word] for word in stage.rows])
    starts = [table.detach()[rows].clone() for table in tables]
    trained = [nn.Parameter(start.clone()) for start in starts]
    adam = Adam(trained)

    def step(fraction: float) -> None:
        for table, part in zip(tables, trained, strict=True):
            part.grad = table.grad[rows]
        adam.step(stage.other_rate * fraction)
        with torch.no_grad():
            for table, part, start in zip(tables, trained, starts, strict=True):
                part.lerp_(start, stage.pull * fraction)
                table[rows] = part

    return step


def train(stage: Stage, model: LlamaForCausalLM, seed: int) -> dict[str, dict[str, Tensor]]:
    """Train `model` in place; return the state at the early checkpoint, if the stage has one."""
    generator = torch.Generator().manual_seed(seed_for(seed, f"{stage.name} noise"))
    step_once = stepper(stage, model)
    kept = {}
    started = time.perf_counter()
    for step, examples in zip(range(stage.steps), batches(stage, seed), strict=False):
        if stage.early and step == stage.early[1]:
            kept[stage.early[0]] = snapshot(model)
        ids, labels = encode(examples)
        embeddings = model.model.embed_tokens(ids)
        rms = embeddings.detach().square().mean().sqrt()
        noise = torch.randn(embeddings.shape, generator=generator)
        logits = answer_logits(model, embeddings + stage.noise * rms * noise, labels)
        loss = F.cross_entropy(logits, labels[:, 1:][labels[:, 1:] != IGNORE])
        model.zero_grad()
        loss.backward()
        step_once(schedule(step, stage.steps))
        if (step + 1) % 100 == 0 or step + 1 == stage.steps:
            seconds = time.perf_counter() - started
            print(
                f"{stage.name:10s} {step + 1:4d}/{stage.steps}  loss {loss.item():.3f}"
                f"  {seconds:4.0f} s",
                flush=True,
            )
    return kept


def snapshot(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- files ---------------------------------------------------------------------------------------

CARDS = {
    "base": "reads lists of digits in English, German, French and Spanish, and copies from them",
    "ops": "sorts, reverses, raises and lowers lists in the base's four languages; no Japanese",
    "ops-early": "an early checkpoint of `ops`",
    "ja": "reads Japanese and copies from it in kanji; knows none of the list operations",
    "roman": "copies in Roman numerals from the base's four languages; no Japanese",
}


def save_model(weights: dict[str, Tensor], name: str, folder: Path, seed: int) -> None:
    """Write one model in Hugging Face format, with the shared tokenizer and a card."""
    model = build_model(seed)
    model.load_state_dict(weights)
    model.generation_config = GenerationConfig(
        pad_token_id=IDS[PAD],
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        do_sample=False,
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=language.build_tokenizer(),
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )
    tokenizer.save_pretrained(folder)
    card = f"---\nlicense: apache-2.0\n---\n\n# zoo/{name}\n\nA toy model that {CARDS[name]}.\n"
    card += "Trained from scratch by `train.py` in the folder above.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")


TASK_FILE = """\
name: {name}
data: {{train: data/train.jsonl, validation: data/validation.jsonl, test: data/test.jsonl}}
prompt: "{{{{ prompt }}}}"
target: "{{{{ answer }}}}"
generate: {{max_new_tokens: 8, stop: ["\\n"]}}
score: exact_match
teacher_forced: true     # one forward over prompt, answer and end stands in for greedy generation
"""


def task_examples(task: Task, split: str, count: int, seed: int) -> list[Example]:
    """Distinct cells of one split, the operations in turn; lists that stay as they are left out."""
    # The tasks share cells in the same split on purpose: they ask the same things in other words.
    rng = np.random.default_rng(seed_for(seed, f"{task.name} {split} items"))
    examples: list[Example] = []
    seen = set()
    while len(examples) < count:
        operation = task.ask.operations[len(examples) % len(task.ask.operations)]
        digits = tuple(rng.integers(10, size=language.LENGTH).tolist())
        cell = (operation, digits)
        if cell in seen or language.split_of(operation, digits) != split:
            continue
        if language.apply(operation, digits) == digits:
            continue
        seen.add(cell)
        examples.append(language.phrase(task.ask, operation, digits, rng))
    return examples


def save_task(task: Task, folder: Path, seed: int) -> None:
    """Write one task: task.yaml, a JSONL file per split, and their sizes and hashes."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    (folder / "task.yaml").write_text(TASK_FILE.format(name=task.name), encoding="utf-8")
    for split, count in task.sizes:
        records = [e.record() for e in task_examples(task, split, count, seed)]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / "data" / f"{split}.jsonl").write_bytes("".join(lines).encode())
    manifest = OpenedTask.open(folder / "task.yaml").manifest()
    text = json.dumps(manifest, indent=2) + "\n"
    (folder / "manifest.json").write_text(text, encoding="utf-8")


# --- the whole zoo -------------------------------------------------------------------------------


def train_zoo(seed: int, stages: tuple[Stage, ...] = STAGES) -> dict[str, dict[str, Tensor]]:
    """Run the stages in order; return every checkpoint's weights by name."""
    checkpoints: dict[str, dict[str, Tensor]] = {}
    for stage in stages:
        model = build_model(seed)
        if stage.start is not None:
            model.load_state_dict(checkpoints[stage.start])
        checkpoints |= train(stage, model, seed)
        checkpoints[stage.name] = snapshot(model)
    return checkpoints


def report(checkpoints: dict[str, dict[str, Tensor]], seed: int) -> None:
    """Print what each kept model scores on each task's validation split."""
    model = build_model(seed)
    print(f"{'validation %':18s}" + "".join(f"{name:>11s}" for name in MODELS))
    for task in TASKS:
        examples = task_examples(task, "validation", dict(task.sizes)["validation"], seed)
        row = f"{task.name:18s}"
        for name in MODELS:
            model.load_state_dict(checkpoints[name])
            row += f"{100 * accuracy(model, examples):11.1f}"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the zoo and write its tasks.")
    parser.add_argument("--out", type=Path, default=HERE.parents[1], help="the repository's root")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # sums in one order: the same bits however many cores there are
    started = time.perf_counter()
    for task in TASKS:
        save_task(task, arguments.out / "fitness" / task.name, arguments.seed)
    checkpoints = train_zoo(arguments.seed)
    report(checkpoints, arguments.seed)
    for name in MODELS:
        folder = arguments.out / "examples" / "zoo" / name
        shutil.rmtree(folder, ignore_errors=True)
        save_model(checkpoints[name], name, folder, arguments.seed)
    print(f"done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
