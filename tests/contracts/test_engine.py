"""What every engine promises: the live model is the exported one, and its replies are exact."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    Qwen2Config,
)

from evomerge.engine import BrokenModel, Engine, Likelihood, Reply, build
from evomerge.errors import EvomergeError, InputError, ModelError, RecipeError
from evomerge.fitness.score import exact_match
from evomerge.fitness.task import Example, Task
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from tests import tiny
from tests.merge.conftest import altered, without

KINDS = ("transformers",)
MODELS = ("base", "ops", "ops-early", "ja", "roman")
TASKS = ("en_list_ops", "ja_list_ops", "ja_list_ops_roman", "ja_transcription")

# Short and long prompts mixed, in no order.
PROMPTS = [
    "数列 三 と 一",
    "now ascend of 7 and one and 4 and 2 =",
    "数列",
    " ".join(["数列 六 と 五 、 九 と 五 、 昇順 ="] * 5),
    "descend of eight =",
    "一 二 三 四 五 六 七 八 九",
    "=",
]
PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ("4 7 7 9", "9", "")]

Opened = dict[str, Checkpoint]
Opener = Callable[..., Engine]


@pytest.fixture(params=KINDS)
def engine_of(request: pytest.FixtureRequest) -> Iterator[Opener]:
    """Opens engines of one kind over models, the first one giving config and tokenizer."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:

        def opened(models: Opened, **section: Any) -> Engine:
            settings = {"kind": request.param, "device": "cpu", **section}
            engine = build(Section(**settings), models, next(iter(models)))
            return stack.enter_context(closing(engine))

        yield opened
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_models(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """The shared random models, one with tied embeddings and two in bfloat16."""
    folder = tmp_path_factory.mktemp("engine")
    tied = altered(
        models["b"], folder / "tied", without("lm_head.weight"), tie_word_embeddings=True
    )
    half = tiny.write_model(folder / "half", seed=0, dtype=torch.bfloat16)
    half_a = tiny.write_model(folder / "half-a", seed=1, near=half, dtype=torch.bfloat16)
    return {
        name: Checkpoint.open(path)
        for name, path in {**models, "tied": tied, "half": half, "half-a": half_a}.items()
    }


@pytest.fixture(scope="session")
def zoo() -> dict[str, Checkpoint]:
    """The zoo's models."""
    return {name: Checkpoint.open(tiny.ZOO / name) for name in MODELS}


@pytest.fixture(scope="session")
def validation() -> dict[str, tuple[Task, tuple[Example, ...]]]:
    """The zoo's tasks with their validation splits."""
    tasks = {name: Task.open(tiny.ROOT / "fitness" / name / "task.yaml") for name in TASKS}
    return {name: (task, task.examples("validation")) for name, task in tasks.items()}


def recipe(method: str, **rest: Any) -> Recipe:
    return Recipe.from_dict({"merge_method": method, **rest})


def whole(model: str) -> Recipe:
    """A model as it is."""
    return recipe("passthrough", models=[{"model": model}])


def stack(*ranges: tuple[str, int, int]) -> Recipe:
    """Layers of one model after the other."""
    slices = [{"sources": [{"model": m, "layer_range": [i, j]}]} for m, i, j in ranges]
    return recipe("passthrough", slices=slices)


def blend(*models: str) -> Recipe:
    weights = (0.4, 0.6)
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(models, weights, strict=True)
    ]
    return recipe("linear", models=entries)


def task_arithmetic(base: str, **weights: Any) -> Recipe:
    entries = [{"model": m, "parameters": {"weight": w}} for m, w in weights.items()]
    return recipe("task_arithmetic", base_model=base, models=entries)


def exported(made: Recipe, models: Opened, out: Path) -> Opened:
    write_checkpoint(make_plan(made, models), models, out)
    return {"exported": Checkpoint.open(out)}


def seen(engine: Engine) -> tuple[list[Reply], list[Likelihood]]:
    """Everything that an engine says of its live model."""
    return engine.generate(PROMPTS, 12, ()), engine.likelihoods(PAIRS)


def plain(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    """Log-likelihoods by transformers alone, one pair after the other."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = []
    for prompt, answer in pairs:
        before = tokenizer(prompt)["input_ids"]
        target = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [*before, *target, tokenizer.eos_token_id]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([ids])).logits[0].double()
        chosen = logits.log_softmax(dim=-1)
        found.append(sum(float(chosen[i - 1, ids[i]]) for i in range(len(before), len(ids))))
    return found


SWAPS: dict[str, Recipe] = {
    "blend": blend("a", "b"),
    "task-arithmetic": task_arithmetic("base", a=[0.2, 0.9], b=0.5),
    "shorter": stack(("a", 0, 1), ("b", 2, 3)),
    "longer": stack(("a", 0, 3), ("b", 1, 3)),
    "other-blend": blend("b", "a"),
    "repeated": stack(("b", 1, 2), ("b", 1, 2), ("deep", 2, 5), ("b", 1, 2)),
    "tied": whole("tied"),
    "tied-and-untied": blend("tied", "b"),
    "tied-last": stack(("a", 0, 2), ("tied", 1, 3)),
    "a-parent": whole("a"),
}


def test_after_every_swap_the_live_model_is_the_exported_one(
    engine_of: Opener, random_models: Opened, tmp_path: Path
) -> None:
    live = engine_of(random_models)
    said = set()
    for name in [*SWAPS, *reversed(SWAPS)]:
        live.load(SWAPS[name])
        found = seen(live)
        out = tmp_path / name
        fresh = exported(SWAPS[name], random_models, out) if not out.exists() else None
        if fresh is not None:
            engine = engine_of(fresh)
            engine.load(whole("exported"))
            (out / "seen").write_text(repr(seen(engine)))
        assert repr(found) == (out / "seen").read_text(), name
        said.add(repr(found))
    assert len(said) == len(SWAPS)  # the recipes can be told apart


@pytest.mark.parametrize("name", SWAPS)
def test_likelihoods_are_those_of_plain_transformers(
    engine_of: Opener, random_models: Opened, tmp_path: Path, name: str
) -> None:
    live = engine_of(random_models)
    live.load(SWAPS[name])
    exported(SWAPS[name], random_models, tmp_path / "out")
    expected = plain(tmp_path / "out", PAIRS)
    found = [item.log_likelihood for item in live.likelihoods(PAIRS)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_bfloat16_model_computes_as_the_exported_one(
    engine_of: Opener, random_models: Opened, tmp_path: Path
) -> None:
    models = {name: random_models[name] for name in ("half", "half-a")}
    made = blend("half", "half-a")
    live, fresh = engine_of(models), engine_of(exported(made, models, tmp_path / "out"))
    live.load(made)
    fresh.load(whole("exported"))
    assert seen(live) == seen(fresh)


def test_the_dtype_of_the_section_decides_what_is_computed_in(
    engine_of: Opener, random_models: Opened
) -> None:
    models = {name: random_models[name] for name in ("half", "half-a")}
    found = {}
    for dtype in ("auto", "bfloat16", "float32"):
        engine = engine_of(models, dtype=dtype)
        engine.load(whole("half-a"))
        found[dtype] = [item.log_likelihood for item in engine.likelihoods(PAIRS)]
    assert found["auto"] == found["bfloat16"]
    expected = plain(models["half-a"].path, PAIRS)
    assert found["bfloat16"] == pytest.approx(expected, rel=0.05)
    assert found["float32"] != found["bfloat16"]


def several_kinds(kind: str, folder: Path, seed: int, layers: int) -> Checkpoint:
    """A random model with full and sliding attention, whose window is shorter than a prompt."""
    sizes: dict[str, Any] = {
        "vocab_size": json.loads((tiny.ZOO / "base" / "config.json").read_text())["vocab_size"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 4,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "layer_types": [f"{'full' if i % 2 else 'sliding'}_attention" for i in range(layers)],
    }
    if kind == "qwen2":
        config: Any = Qwen2Config(use_sliding_window=True, tie_word_embeddings=False, **sizes)
    else:
        config = Gemma3TextConfig(tie_word_embeddings=True, query_pre_attn_scalar=8, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.ZOO / "base" / file, folder / file)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_layers_of_several_kinds_keep_theirs_wherever_they_stand(
    engine_of: Opener, tmp_path: Path, kind: str
) -> None:
    models = {
        "a": several_kinds(kind, tmp_path / "a", seed=1, layers=3),
        "b": several_kinds(kind, tmp_path / "b", seed=2, layers=4),
    }
    live = engine_of(models)
    orders = [
        whole("a"),
        stack(("a", 1, 3), ("b", 1, 4)),
        stack(("b", 1, 2), ("a", 1, 2), ("b", 3, 4), ("b", 3, 4)),
        stack(("a", 2, 3)),
        whole("b"),
        whole("a"),
    ]
    for number, made in enumerate(orders):
        live.load(made)
        fresh = engine_of(exported(made, models, tmp_path / str(number)))
        fresh.load(whole("exported"))
        assert seen(live) == seen(fresh)
        likelihoods = [item.log_likelihood for item in live.likelihoods(PAIRS)]
        assert likelihoods == pytest.approx(plain(tmp_path / str(number), PAIRS), abs=1e-3)


def test_positions_are_counted_without_the_padding(engine_of: Opener, tmp_path: Path) -> None:
    """GPT-2 adds its positions to the embeddings: there a shift is not forgiven."""
    vocabulary = json.loads((tiny.ZOO / "base" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 96}
    model = AutoModelForCausalLM.from_config(GPT2Config(eos_token_id=2, bos_token_id=1, **sizes))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.ZOO / "base" / file, tmp_path / "gpt2" / file)
    models = {"gpt2": Checkpoint.open(tmp_path / "gpt2")}
    made = stack(("gpt2", 0, 3), ("gpt2", 1, 2))
    live = engine_of(models)
    live.load(made)
    exported(made, models, tmp_path / "out")
    found = [item.log_likelihood for item in live.likelihoods(PAIRS)]
    assert found == pytest.approx(plain(tmp_path / "out", PAIRS), abs=1e-3)
    alone = [live.generate([prompt], 12, ())[0] for prompt in PROMPTS]
    assert live.generate(PROMPTS, 12, ()) == alone


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_change_replies(
    engine_of: Opener, random_models: Opened, batch_size: int
) -> None:
    found = []
    for size in (batch_size, 256):
        engine = engine_of(random_models, batch_size=size)
        engine.load(SWAPS["longer"])
        found.append(seen(engine))
    (replies, likelihoods), (expected_replies, expected) = found
    assert replies == expected_replies
    assert [item.greedy for item in likelihoods] == [item.greedy for item in expected]
    assert [item.log_likelihood for item in likelihoods] == pytest.approx(
        [item.log_likelihood for item in expected], abs=1e-4
    )


def test_results_come_in_the_order_of_the_inputs(engine_of: Opener, random_models: Opened) -> None:
    engine = engine_of(random_models, batch_size=2)
    engine.load(SWAPS["blend"])
    replies, likelihoods = seen(engine)
    assert len({reply.text for reply in replies}) > 1
    assert engine.generate(PROMPTS[::-1], 12, ()) == replies[::-1]
    again = [item.log_likelihood for item in engine.likelihoods(PAIRS[::-1])]
    expected = [item.log_likelihood for item in likelihoods]
    assert again[::-1] == pytest.approx(expected, abs=1e-4)


def test_nothing_asked_is_nothing_answered(engine_of: Opener, random_models: Opened) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    assert engine.generate([], 4, ()) == []
    assert engine.likelihoods([]) == []


def test_an_answer_counts_its_tokens_and_the_end(engine_of: Opener, random_models: Opened) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    found = engine.likelihoods([("数列", answer) for answer in ("", "4", "4 7", "4 7 7 9")])
    assert [len(item.token_log_likelihoods) for item in found] == [1, 2, 3, 5]
    assert all(item.log_likelihood < 0 for item in found)


def test_a_reply_is_cut_before_the_first_stop_text(
    engine_of: Opener, random_models: Opened
) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    whole_replies = engine.generate(PROMPTS, 12, ())
    texts = [reply.text for reply in whole_replies]
    longest = max(texts, key=lambda text: len(set(text.split())))
    _, first, second, *_ = dict.fromkeys(longest.split())
    assert 0 < longest.find(first) < longest.find(second)
    found = engine.generate(PROMPTS, 12, (second, first))
    for reply, before in zip(found, whole_replies, strict=True):
        ends = [at for at in (before.text.find(first), before.text.find(second)) if at >= 0]
        assert reply.text == before.text[: min(ends, default=None)]
        assert reply.truncated == (before.truncated and not ends)
        words = reply.text.split()  # one token each, and the stop text is one more
        assert reply.tokens == (len(words) + 1 if ends else before.tokens)


def test_a_reply_that_the_limit_cut_off_is_truncated(
    engine_of: Opener, zoo: Opened, validation: dict[str, tuple[Task, tuple[Example, ...]]]
) -> None:
    engine = engine_of({"ops": zoo["ops"]})
    engine.load(whole("ops"))
    items = validation["en_list_ops"][1][:100]
    known = [
        item
        for item, found in zip(
            items, engine.likelihoods([(i.prompt, i.target) for i in items]), strict=True
        )
        if found.greedy
    ]
    assert known
    prompts = [item.prompt for item in known]
    tokens = engine.likelihoods([(item.prompt, item.target) for item in known])
    longest = max(len(item.token_log_likelihoods) for item in tokens)
    assert [r.truncated for r in engine.generate(prompts, longest, ())] == [False] * len(known)
    assert [r.text for r in engine.generate(prompts, longest, ())] == [i.target for i in known]
    assert [r.truncated for r in engine.generate(prompts, 1, ())] == [True] * len(known)
    spoken = [len(item.token_log_likelihoods) - 1 for item in tokens]  # without the end
    assert [r.tokens for r in engine.generate(prompts, longest, ())] == spoken
    assert [r.tokens for r in engine.generate(prompts, 1, ())] == [1] * len(known)


BLENDS = {
    f"embeddings-{weight}": task_arithmetic(
        "base",
        ops=1.0,
        ja=[{"filter": "embed_tokens", "value": weight}, {"value": 0.0}],
    )
    for weight in (0.2, 0.3, 0.4, 0.5)
}


def disagreements(engine: Engine, task: Task, items: tuple[Example, ...]) -> tuple[list[str], int]:
    """The prompts where likelihoods and generation differ in who is right, and how many are."""
    settings = task.settings.generate
    judged = engine.likelihoods([(item.prompt, item.target) for item in items])
    replies = engine.generate(
        [item.prompt for item in items], settings.max_new_tokens, settings.stop
    )
    exact = [
        bool(exact_match(reply.text, item.target)) and not reply.truncated
        for reply, item in zip(replies, items, strict=True)
    ]
    rows = zip(items, judged, exact, strict=True)
    return [item.prompt for item, found, right in rows if found.greedy != right], sum(exact)


@pytest.mark.parametrize(
    "every",
    [pytest.param(12, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)],
)
def test_greedy_is_what_greedy_generation_writes(
    engine_of: Opener,
    zoo: Opened,
    validation: dict[str, tuple[Task, tuple[Example, ...]]],
    every: int,
) -> None:
    engine = engine_of(zoo)
    right, total = 0, 0
    for name, made in ({model: whole(model) for model in MODELS} | BLENDS).items():
        engine.load(made)
        for task, items in validation.values():
            differ, exact = disagreements(engine, task, items[::every])
            assert differ == [], (name, task.name)
            right, total = right + exact, total + len(items[::every])
    assert 0 < right < total


def test_zoo_likelihoods_are_those_of_plain_transformers(
    engine_of: Opener,
    zoo: Opened,
    validation: dict[str, tuple[Task, tuple[Example, ...]]],
    tmp_path: Path,
) -> None:
    engine, made = engine_of(zoo), BLENDS["embeddings-0.3"]
    engine.load(made)
    exported(made, zoo, tmp_path / "out")
    pairs = [(i.prompt, i.target) for _, items in validation.values() for i in items[:20]]
    found = [item.log_likelihood for item in engine.likelihoods(pairs)]
    assert found == pytest.approx(plain(tmp_path / "out", pairs), abs=1e-4)


@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_model_that_computes_no_number_is_broken_and_the_next_is_not(
    engine_of: Opener, random_models: Opened, tmp_path: Path, tensor: str
) -> None:
    folder = altered(
        random_models["a"].path,
        tmp_path / "endless",
        lambda t: t | {tensor: torch.full_like(t[tensor], torch.inf)},
    )
    engine = engine_of({"a": random_models["a"], "endless": Checkpoint.open(folder)})
    engine.load(whole("a"))
    before = engine.likelihoods(PAIRS)
    engine.load(whole("endless"))
    with pytest.raises(BrokenModel, match="not finite"):
        engine.likelihoods(PAIRS)
    engine.load(whole("a"))
    assert engine.likelihoods(PAIRS) == before


def test_a_parent_that_holds_nan_is_named_and_leaves_the_engine_usable(
    engine_of: Opener, random_models: Opened, tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = altered(
        random_models["a"].path, tmp_path / "nan", lambda t: t | {name: t[name] * torch.nan}
    )
    engine = engine_of({"a": random_models["a"], "nan": Checkpoint.open(folder)})
    engine.load(whole("a"))
    before = engine.likelihoods(PAIRS)
    with pytest.raises(ModelError, match=f"'{name}' of 'nan' holds NaN"):
        engine.load(whole("nan"))
    engine.load(whole("a"))
    assert engine.likelihoods(PAIRS) == before


def test_a_recipe_that_does_not_fit_leaves_the_engine_usable(
    engine_of: Opener, random_models: Opened
) -> None:
    engine = engine_of(random_models)
    engine.load(SWAPS["longer"])
    before = seen(engine)
    with pytest.raises(RecipeError, match="outside 'a'"):
        engine.load(stack(("a", 2, 4)))
    engine.load(SWAPS["longer"])
    assert seen(engine) == before


def forget(folder: Path, token: str) -> None:
    """Take a special token out of a model's tokenizer."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings[token]
    path.write_text(json.dumps(settings))


def test_a_tokenizer_without_an_end_is_refused(
    engine_of: Opener, random_models: Opened, tmp_path: Path
) -> None:
    folder = altered(random_models["a"].path, tmp_path / "endless")
    forget(folder, "eos_token")
    with pytest.raises(ModelError, match=r"'endless'.*no end-of-sequence token"):
        engine_of({"endless": Checkpoint.open(folder)})


def test_a_tokenizer_without_padding_pads_with_the_end(
    engine_of: Opener, random_models: Opened, tmp_path: Path
) -> None:
    folder = altered(random_models["a"].path, tmp_path / "unpadded")
    forget(folder, "pad_token")
    found = []
    for models in ({"a": random_models["a"]}, {"a": Checkpoint.open(folder)}):
        engine = engine_of(models)
        engine.load(whole("a"))
        found.append(seen(engine))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer.json", None, "no usable tokenizer"),
        ("config.json", '{"model_type": "nonesuch"}', "transformers cannot"),
        ("config.json", '{"model_type": "vit"}', "transformers cannot"),
    ],
)
def test_a_model_that_cannot_be_run_is_refused_in_one_line(
    engine_of: Opener,
    random_models: Opened,
    tmp_path: Path,
    file: str,
    text: str | None,
    words: str,
) -> None:
    folder = altered(random_models["a"].path, tmp_path / "odd")
    (folder / file).unlink()
    if text is not None:
        (folder / file).write_text(text)
    with pytest.raises(ModelError, match=words) as raised:
        engine_of({"odd": Checkpoint.open(folder)})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", "mps"])
def test_a_device_that_is_not_there_is_refused(
    engine_of: Opener, random_models: Opened, device: str
) -> None:
    with pytest.raises(InputError, match=rf"engine\.device: '{device}'.*give") as raised:
        engine_of(random_models, device=device)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, EvomergeError)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_section_says_how_many_threads(
    engine_of: Opener, random_models: Opened, threads: int
) -> None:
    torch.set_num_threads(3 - threads)
    engine_of(random_models, threads=threads)
    assert torch.get_num_threads() == threads


def test_threads_are_left_alone_unless_given(engine_of: Opener, random_models: Opened) -> None:
    torch.set_num_threads(2)
    engine_of(random_models, threads="auto")
    assert torch.get_num_threads() == 2


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_swaps_leave_memory_flat(engine_of: Opener, tmp_path: Path) -> None:
    """On models of some 6 MB, so that one kept copy of each swap would show."""
    models: Opened = {}
    for seed, name in enumerate(("base", "a", "b")):
        folder = tiny.write_model(tmp_path / name, seed=seed, layers=20, hidden=160)
        models[name] = Checkpoint.open(folder)
    size = sum(header.bytes for header in models["a"].headers.values())
    engine = engine_of(models)

    def swap(step: int) -> None:
        engine.load(task_arithmetic("base", a=0.1 + step / 40, b=0.5))
        engine.likelihoods(PAIRS[:4])
        engine.load(stack(("a", 0, 12 + step % 2), ("b", 4, 20)))
        engine.generate(PROMPTS[:2], 2, ())

    for step in range(3):
        swap(step)
    before = resident_bytes()
    for step in range(10):  # two swaps each
        swap(step)
    grown = resident_bytes() - before
    assert size > 5_000_000
    assert grown < 8_000_000
