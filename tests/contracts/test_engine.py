"""What every engine promises: the live model is the exported one, and its replies are exact."""

import gc
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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

from evomerge.engine import BrokenModel, Engine, Generation, Likelihood, Prompt, Reply, Turn
from evomerge.engine.build import build
from evomerge.errors import EvomergeError, InputError, ModelError, RecipeError
from evomerge.job import Engine as Section
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from tests import tiny
from tests.engine.wide import with_wide_heads
from tests.merge.conftest import altered, without

KINDS = ("transformers", pytest.param("vllm", marks=pytest.mark.vllm))
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
POSITIONS = 512  # of the random models
BROKEN = {
    "endless-norm": ("model.norm.weight", math.inf),
    "endless-matrix": ("model.layers.1.mlp.up_proj.weight", math.inf),
    "nan": ("model.layers.1.mlp.up_proj.weight", math.nan),
}

Opened = dict[str, Checkpoint]
Seen = tuple[list[Reply], list[Likelihood]]
Items = dict[str, list[tuple[str, str]]]  # (prompt, answer)


class Opener:
    """Opens engines of one kind over models, the first one giving config and tokenizer."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._shared: dict[str, Engine] = {}
        self._widened: dict[str, Checkpoint] = {}
        self._folder = TemporaryDirectory()

    def __call__(self, models: Opened, **section: Any) -> Engine:
        """An engine that other tests use too, with whatever they have loaded last."""
        paths = {name: str(model.path) for name, model in models.items()}
        key = repr((paths, section))
        engine = self._shared.pop(key, None)
        if engine is None:
            if len(self._shared) == 3:
                self._shared.pop(next(iter(self._shared))).close()
            engine = self._opened(models, section)
        self._shared[key] = engine  # behind those that were asked for before
        return engine

    @contextmanager
    def fresh(self, models: Opened, **section: Any) -> Iterator[Engine]:
        """One that has just started. It runs on transformers: vLLM takes half a minute to start,
        and has to say the same."""
        settings = {"device": "cpu", **section}
        with closing(build(Section(**settings), models, next(iter(models)))) as engine:
            yield engine

    def _opened(self, models: Opened, section: dict[str, Any]) -> Engine:
        settings = {"kind": self.kind, "device": "cpu", **section}
        if self.kind == "vllm":
            settings = {"threads": 1, "cache_gb": 0.25, **settings}
            models = {name: self._wide(model) for name, model in models.items()}
        return build(Section(**settings), models, next(iter(models)))

    def _wide(self, model: Checkpoint) -> Checkpoint:
        """The same with heads that vLLM runs on a CPU."""
        key = str(model.path)
        if key not in self._widened:
            folder = Path(self._folder.name) / str(len(self._widened))
            self._widened[key] = with_wide_heads(model, folder)
        return self._widened[key]

    def close(self) -> None:
        while self._shared:
            self._shared.popitem()[1].close()
        self._folder.cleanup()


@pytest.fixture(scope="module", params=KINDS)
def opener(request: pytest.FixtureRequest) -> Iterator[Opener]:
    with closing(Opener(request.param)) as opened:
        yield opened


@pytest.fixture
def engine_of(opener: Opener) -> Iterator[Opener]:
    threads = torch.get_num_threads()
    yield opener
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_models(
    models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """The shared random models, and one with tied embeddings, with room for long prompts."""
    folder = tmp_path_factory.mktemp("engine")
    sizes = {"max_position_embeddings": POSITIONS}
    tied = {"tie_word_embeddings": True, **sizes}
    made = {name: altered(path, folder / name, **sizes) for name, path in models.items()}
    made["tied"] = altered(models["b"], folder / "tied", without("lm_head.weight"), **tied)
    return {name: Checkpoint.open(path) for name, path in made.items()}


@pytest.fixture(scope="session")
def half_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Two models in bfloat16, and the merge of them that was exported."""
    folder = tmp_path_factory.mktemp("half")
    half = tiny.write_model(folder / "half", seed=0, dtype=torch.bfloat16)
    near = tiny.write_model(folder / "half-a", seed=1, near=half, dtype=torch.bfloat16)
    models = {path.name: Checkpoint.open(path) for path in (half, near)}
    return models | exported(blend(*models), models, folder / "exported")


@pytest.fixture(scope="session")
def broken_models(
    random_models: Opened, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """A model, and what becomes of it with a tensor that holds no numbers."""
    folder, models = tmp_path_factory.mktemp("broken"), {"a": random_models["a"]}
    for name, (tensor, value) in BROKEN.items():
        filled = altered(
            models["a"].path,
            folder / name,
            lambda t, tensor=tensor, value=value: t | {tensor: torch.full_like(t[tensor], value)},
        )
        models[name] = Checkpoint.open(filled)
    return models


@pytest.fixture(scope="session")
def zoo() -> dict[str, Checkpoint]:
    """The zoo's models."""
    return {name: Checkpoint.open(tiny.ZOO / name) for name in MODELS}


@pytest.fixture(scope="session")
def validation() -> Items:
    """The validation splits of the zoo's tasks, by task."""
    found = {}
    for name in TASKS:
        path = tiny.ROOT / "fitness" / name / "data" / "validation.jsonl"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[name] = [(record["prompt"], record["answer"]) for record in records]
    return found


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


def written(
    engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int = 12, **how: Any
) -> list[Reply]:
    """One reply to each prompt."""
    replies = engine.generate(prompts, Generation(max_new_tokens, **how))
    return [reply for (reply,) in replies]


def seen(engine: Engine) -> Seen:
    """Everything that an engine says of its live model."""
    return written(engine, PROMPTS), engine.likelihoods(PAIRS)


def check_same(engine_of: Opener, found: Seen, expected: Seen) -> None:
    """To the last bit, but for an engine that chooses its batches itself."""
    (replies, likelihoods), (expected_replies, expected_likelihoods) = found, expected
    assert replies == expected_replies
    if engine_of.kind == "transformers":
        assert likelihoods == expected_likelihoods
    for one, other in zip(likelihoods, expected_likelihoods, strict=True):
        assert one.greedy == other.greedy
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)


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
    """Each recipe is loaded three times, so that what an engine keeps of it is seen too."""
    live = engine_of(random_models)
    expected: dict[str, Seen] = {}
    names = [*SWAPS]
    if engine_of.kind == "vllm":  # the deepest first, so that it starts once more at most
        names = ["repeated", "blend", "longer", "tied-and-untied"]
    for name in [*names, *reversed(names), *names]:
        live.load(SWAPS[name])
        found = seen(live)
        if name not in expected:
            models = exported(SWAPS[name], random_models, tmp_path / name)
            with engine_of.fresh(models) as engine:
                engine.load(whole("exported"))
                expected[name] = seen(engine)
        check_same(engine_of, found, expected[name])
    assert len({repr(found) for found in expected.values()}) == len(names)  # they differ


def ahead(engine_of: Opener) -> dict[str, Any]:
    """The keys of a section that ask for merging ahead, where this kind of engine does it."""
    return {"merge_ahead": True} if engine_of.kind == "transformers" else {}


def test_what_is_prepared_changes_nothing_before_its_load_and_no_bit_after_it(
    engine_of: Opener, random_models: Opened
) -> None:
    """Whether it is merged ahead or not, and over layers of any number, tied heads and others."""
    names = ["blend", "longer", "repeated", "tied-and-untied", "blend"]
    plain, live = engine_of(random_models), engine_of(random_models, **ahead(engine_of))
    expected = []
    for name in names:
        plain.load(SWAPS[name])
        expected.append(seen(plain))
    live.load(SWAPS[names[0]])
    for upcoming, wanted in zip([*names[1:], None], expected, strict=True):
        if upcoming is not None:
            assert live.prepare(SWAPS[upcoming]) is live.merges_ahead
        check_same(engine_of, seen(live), wanted)
        if upcoming is not None:
            live.load(SWAPS[upcoming])
    assert live.merges_ahead is bool(ahead(engine_of))
    assert not plain.merges_ahead
    assert not plain.prepare(SWAPS["blend"])


def test_what_is_prepared_and_never_loaded_is_forgotten(
    engine_of: Opener, random_models: Opened
) -> None:
    engine = engine_of(random_models, **ahead(engine_of))
    engine.load(SWAPS["blend"])
    expected = seen(engine)
    engine.prepare(SWAPS["task-arithmetic"])
    engine.prepare(SWAPS["a-parent"])
    engine.load(SWAPS["blend"])
    check_same(engine_of, seen(engine), expected)
    if engine.merges_ahead:
        with engine_of.fresh({"a": random_models["a"]}, **ahead(engine_of)) as begun:
            begun.prepare(whole("a"))


def test_what_is_wrong_with_a_prepared_recipe_is_raised_by_its_load(
    engine_of: Opener, random_models: Opened
) -> None:
    engine = engine_of(random_models, **ahead(engine_of))
    engine.load(SWAPS["blend"])
    expected = seen(engine)
    engine.prepare(stack(("a", 2, 4)))
    check_same(engine_of, seen(engine), expected)
    with pytest.raises(RecipeError, match="outside 'a'"):
        engine.load(stack(("a", 2, 4)))
    engine.prepare(SWAPS["blend"])
    engine.load(SWAPS["blend"])
    check_same(engine_of, seen(engine), expected)


LONG = [
    " ".join(["数列 六 と 五 、 九 と 五 、 昇順 ="] * 22 + [word]) for word in "一二三四五六七八"
]


@pytest.mark.parametrize(
    "made",
    [blend("a", "b"), stack(("a", 0, 2), ("b", 1, 3), ("a", 1, 3)), stack(("b", 0, 1))],
    ids=["blend", "order", "shorter"],
)
def test_no_cache_of_long_prompts_outlives_a_swap(
    engine_of: Opener, random_models: Opened, tmp_path: Path, made: Recipe
) -> None:
    """Prompts of more than 200 words with a common beginning, which engines remember."""
    live = engine_of(random_models)
    said = []
    for loaded in (whole("a"), made, whole("b"), made):
        live.load(loaded)
        said.append(written(live, LONG))
    assert said[0] != said[1] == said[3] != said[2]
    with engine_of.fresh(exported(made, random_models, tmp_path / "out")) as fresh:
        fresh.load(whole("exported"))
        assert said[1] == written(fresh, LONG)
    assert len(set(LONG[0].split())) < 200 < len(LONG[0].split())


def test_positions_are_counted_without_the_padding(engine_of: Opener, tmp_path: Path) -> None:
    """GPT-2 adds its positions to the embeddings: there a shift is not forgiven."""
    vocabulary = json.loads((tiny.ZOO / "base" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    sizes = {
        "vocab_size": vocabulary,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 2,
        "n_positions": 64,  # less than the longest prompt and its reply
    }
    model = AutoModelForCausalLM.from_config(GPT2Config(eos_token_id=2, bos_token_id=1, **sizes))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.ZOO / "base" / file, tmp_path / "gpt2" / file)
    models = {"gpt2": Checkpoint.open(tmp_path / "gpt2")}
    made = stack(("gpt2", 0, 2), ("gpt2", 1, 2))
    live = engine_of(models)
    live.load(made)
    exported(made, models, tmp_path / "out")
    found = [item.log_likelihood for item in live.likelihoods(PAIRS)]
    assert found == pytest.approx(plain(tmp_path / "out", PAIRS), abs=1e-3)
    alone = [written(live, [prompt])[0] for prompt in PROMPTS]
    assert written(live, PROMPTS) == alone


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
    engine_of: Opener, half_models: Opened
) -> None:
    live = engine_of(half_models, dtype="auto")
    live.load(whole("exported"))
    expected = seen(live)
    live.load(whole("half"))
    assert seen(live) != expected
    live.load(blend("half", "half-a"))
    assert seen(live) == expected


def test_the_dtype_of_the_section_decides_what_is_computed_in(
    engine_of: Opener, half_models: Opened
) -> None:
    found = {}
    for dtype in ("auto", "float32"):
        engine = engine_of(half_models, dtype=dtype)
        engine.load(whole("half-a"))
        found[dtype] = [item.log_likelihood for item in engine.likelihoods(PAIRS)]
    expected = plain(half_models["half-a"].path, PAIRS)
    assert found["auto"] == pytest.approx(expected, rel=0.05)
    assert found["float32"] != found["auto"]
    if engine_of.kind == "transformers":  # vLLM is told the word for either
        with engine_of.fresh(half_models, dtype="bfloat16") as engine:
            engine.load(whole("half-a"))
            assert [item.log_likelihood for item in engine.likelihoods(PAIRS)] == found["auto"]


def several_kinds(kind: str, folder: Path, seed: int, layers: int) -> Checkpoint:
    """A random model with full and sliding attention, whose window is shorter than a prompt."""
    sizes: dict[str, Any] = {
        "vocab_size": json.loads((tiny.ZOO / "base" / "config.json").read_text())["vocab_size"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "gemma3"])
def test_layers_of_several_kinds_keep_theirs_wherever_they_stand(
    engine_of: Opener, tmp_path: Path, kind: str
) -> None:
    if (engine_of.kind, kind) == ("vllm", "qwen2"):
        pytest.skip("vLLM runs Qwen2 with one kind of attention only")
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
        with engine_of.fresh(exported(made, models, tmp_path / str(number))) as fresh:
            fresh.load(whole("exported"))
            check_same(engine_of, seen(live), seen(fresh))
        likelihoods = [item.log_likelihood for item in live.likelihoods(PAIRS)]
        assert likelihoods == pytest.approx(plain(tmp_path / str(number), PAIRS), abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_size_does_not_change_replies(
    engine_of: Opener, random_models: Opened, batch_size: int
) -> None:
    found = []
    for engine in (engine_of(random_models), engine_of(random_models, batch_size=batch_size)):
        engine.load(SWAPS["other-blend"])
        found.append(seen(engine))
    (expected_replies, expected), (replies, likelihoods) = found
    assert replies == expected_replies
    assert [item.greedy for item in likelihoods] == [item.greedy for item in expected]
    assert [item.log_likelihood for item in likelihoods] == pytest.approx(
        [item.log_likelihood for item in expected], abs=1e-4
    )


def test_results_come_in_the_order_of_the_inputs(engine_of: Opener, random_models: Opened) -> None:
    engine = engine_of(random_models, batch_size=3)
    engine.load(SWAPS["blend"])
    replies, likelihoods = seen(engine)
    assert len({reply.text for reply in replies}) > 1
    assert written(engine, PROMPTS[::-1]) == replies[::-1]
    again = [item.log_likelihood for item in engine.likelihoods(PAIRS[::-1])]
    expected = [item.log_likelihood for item in likelihoods]
    assert again[::-1] == pytest.approx(expected, abs=1e-4)


SAMPLED = {"temperature": 1.0, "samples": 3, "seed": 5}


def sampled(engine: Engine, prompts: Sequence[Prompt], **how: Any) -> list[tuple[Reply, ...]]:
    return engine.generate(prompts, Generation(8, **{**SAMPLED, **how}))


def test_what_is_drawn_depends_on_seed_prompt_and_number_of_the_sample_alone(
    engine_of: Opener, random_models: Opened
) -> None:
    engine, one_by_one = engine_of(random_models), engine_of(random_models, batch_size=1)
    for live in (engine, one_by_one):
        live.load(whole("a"))
    found = sampled(engine, PROMPTS)
    assert sampled(engine, PROMPTS) == found
    assert sampled(engine, PROMPTS[::-1]) == found[::-1]
    assert sampled(one_by_one, PROMPTS) == found
    assert sampled(engine, [PROMPTS[2]]) == [found[2]]
    assert [of[:2] for of in found] == sampled(engine, PROMPTS, samples=2)
    assert all(len(set(of)) == 3 for of in found)
    assert not set(found) & set(sampled(engine, PROMPTS, seed=6))


def test_without_temperature_all_samples_are_the_likeliest_reply(
    engine_of: Opener, random_models: Opened
) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    greedy = engine.generate(PROMPTS, Generation(8))
    assert sampled(engine, PROMPTS, temperature=0.0) == [of * 3 for of in greedy]
    assert sampled(engine, PROMPTS, top_p=1e-6) == [of * 3 for of in greedy]


def test_tokens_are_drawn_as_often_as_the_model_says(
    engine_of: Opener, random_models: Opened
) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    words = AutoTokenizer.from_pretrained(random_models["a"].path, local_files_only=True)
    names = [word for word in words.get_vocab() if word not in words.all_special_tokens]
    judged = engine.likelihoods([("数列", word) for word in names], ended=False)
    shares = {w: math.exp(of.log_likelihood) for w, of in zip(names, judged, strict=True)}
    count = 1000
    how = Generation(1, samples=count, temperature=1.0)
    drawn = Counter(reply.text for reply in engine.generate(["数列"], how)[0])
    often = {word: count * share for word, share in shares.items() if count * share >= 10}
    rest = count - sum(often.values())
    others = count - sum(drawn[word] for word in often)
    squares = [(drawn[word] - wanted) ** 2 / wanted for word, wanted in often.items()]
    freedom = len(often)
    assert freedom > 5
    assert sum(squares) + (others - rest) ** 2 / rest < freedom + 4 * math.sqrt(2 * freedom)
    nucleus = Generation(1, samples=200, temperature=1.0, top_p=0.3)
    likeliest = sorted(shares, key=lambda word: -shares[word])
    reached = itertools.accumulate(shares[word] for word in likeliest)
    size = next(i for i, share in enumerate(reached, 1) if share >= 0.3)
    drawn = Counter(reply.text for reply in engine.generate(["数列"], nucleus)[0])
    assert drawn.keys() == set(likeliest[:size])


def test_nothing_asked_is_nothing_answered(engine_of: Opener, random_models: Opened) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    assert engine.generate([], Generation(4)) == []
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
    whole_replies = written(engine, PROMPTS)
    texts = [reply.text for reply in whole_replies]
    longest = max(texts, key=lambda text: len(set(text.split())))
    _, first, second, *_ = dict.fromkeys(longest.split())
    assert 0 < longest.find(first) < longest.find(second)
    found = written(engine, PROMPTS, stop=(second, first))
    for reply, before in zip(found, whole_replies, strict=True):
        ends = [at for at in (before.text.find(first), before.text.find(second)) if at >= 0]
        assert reply.text == before.text[: min(ends, default=None)]
        assert reply.truncated == (before.truncated and not ends)
        words = reply.text.split()  # one token each, and the stop text is one more
        assert reply.tokens == (len(words) + 1 if ends else before.tokens)


def test_a_reply_that_the_limit_cut_off_is_truncated(
    engine_of: Opener, zoo: Opened, validation: Items
) -> None:
    engine = engine_of(zoo)
    engine.load(whole("ops"))
    items = validation["en_list_ops"][:100]
    judged = zip(items, engine.likelihoods(items), strict=True)
    known = [(item, found) for item, found in judged if found.greedy]
    assert known
    prompts = [prompt for (prompt, _), _ in known]
    tokens = [len(found.token_log_likelihoods) for _, found in known]
    replies = written(engine, prompts, max(tokens))
    assert [reply.truncated for reply in replies] == [False] * len(known)
    assert [reply.text for reply in replies] == [answer for (_, answer), _ in known]
    assert [reply.tokens for reply in replies] == [count - 1 for count in tokens]  # but the end
    cut = written(engine, prompts, 1)
    assert [reply.truncated for reply in cut] == [True] * len(known)
    assert [reply.tokens for reply in cut] == [1] * len(known)


BLENDS = {
    f"embeddings-{weight}": task_arithmetic(
        "base",
        ops=1.0,
        ja=[{"filter": "embed_tokens", "value": weight}, {"value": 0.0}],
    )
    for weight in (0.2, 0.3, 0.4, 0.5)
}


def disagreements(engine: Engine, items: list[tuple[str, str]]) -> tuple[list[str], int]:
    """The prompts where likelihoods and generation differ in who is right, and how many are."""
    judged = engine.likelihoods(items)
    replies = written(engine, [prompt for prompt, _ in items], 8)
    exact = [
        reply.text == answer and not reply.truncated
        for reply, (_, answer) in zip(replies, items, strict=True)
    ]
    rows = zip(items, judged, exact, strict=True)
    return [item[0] for item, found, right in rows if found.greedy != right], sum(exact)


@pytest.mark.parametrize(
    "every",
    [pytest.param(60, id="sample"), pytest.param(1, id="all", marks=pytest.mark.slow)],
)
def test_greedy_is_what_greedy_generation_writes(
    engine_of: Opener,
    zoo: Opened,
    validation: Items,
    every: int,
) -> None:
    engine = engine_of(zoo)
    right, total = 0, 0
    for name, made in ({model: whole(model) for model in MODELS} | BLENDS).items():
        engine.load(made)
        for task, items in validation.items():
            differ, exact = disagreements(engine, items[::every])
            assert differ == [], (name, task)
            right, total = right + exact, total + len(items[::every])
    assert 0 < right < total


def test_zoo_likelihoods_are_those_of_plain_transformers(
    engine_of: Opener,
    zoo: Opened,
    validation: Items,
    tmp_path: Path,
) -> None:
    engine, made = engine_of(zoo), BLENDS["embeddings-0.3"]
    engine.load(made)
    exported(made, zoo, tmp_path / "out")
    pairs = [item for items in validation.values() for item in items[:20]]
    found = [item.log_likelihood for item in engine.likelihoods(pairs)]
    assert found == pytest.approx(plain(tmp_path / "out", pairs), abs=1e-4)


@pytest.mark.parametrize("name", ["endless-norm", "endless-matrix"])
def test_a_model_that_computes_no_number_is_broken_and_the_next_is_not(
    engine_of: Opener, broken_models: Opened, name: str
) -> None:
    engine = engine_of(broken_models)
    engine.load(whole("a"))
    before = engine.likelihoods(PAIRS)
    engine.load(whole(name))
    with pytest.raises(BrokenModel, match="not finite"):
        engine.likelihoods(PAIRS)
    with pytest.raises(BrokenModel, match="not finite"):
        written(engine, PROMPTS)
    engine.load(whole("a"))
    assert engine.likelihoods(PAIRS) == before


def test_a_parent_that_holds_nan_is_named_and_leaves_the_engine_usable(
    engine_of: Opener, broken_models: Opened
) -> None:
    engine = engine_of(broken_models)
    engine.load(whole("a"))
    before = engine.likelihoods(PAIRS)
    with pytest.raises(ModelError, match=f"'{BROKEN['nan'][0]}' of 'nan' holds NaN"):
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
    if engine_of.kind == "vllm":
        pytest.skip("vLLM pads nothing")
    folder = altered(random_models["a"].path, tmp_path / "unpadded")
    forget(folder, "pad_token")
    found = []
    for models in ({"a": random_models["a"]}, {"a": Checkpoint.open(folder)}):
        engine = engine_of(models)
        engine.load(whole("a"))
        found.append(seen(engine))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer.json", None, "no usable tokenizer"),
        ("config.json", '{"model_type": "nonesuch"}', "transformers cannot"),
        ("config.json", '{"model_type": "vit"}', "transformers cannot|correct the config"),
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
    if engine_of.kind == "vllm":
        pytest.skip("vLLM computes in processes of its own")
    torch.set_num_threads(3 - threads)
    with engine_of.fresh(random_models, threads=threads):
        assert torch.get_num_threads() == threads


def test_threads_are_left_alone_unless_given(engine_of: Opener, random_models: Opened) -> None:
    if engine_of.kind == "vllm":
        pytest.skip("vLLM computes in processes of its own")
    torch.set_num_threads(2)
    with engine_of.fresh(random_models, threads="auto"):
        assert torch.get_num_threads() == 2


def test_what_exceeds_the_context_is_said_and_never_cut_silently(
    engine_of: Opener, random_models: Opened
) -> None:
    free, engine = engine_of(random_models), engine_of(random_models, context=20)
    prompts = [" ".join(["六"] * words) for words in (3, 18, 19, 14, 40)]  # and the beginning
    for live in (free, engine):
        live.load(whole("a"))
    unbound = written(free, prompts[:4])
    assert all(reply.tokens == 12 for reply in unbound)
    found = written(engine, prompts)
    assert found[0] == unbound[0]
    assert found[2] == found[4] == Reply("", False, 0, overlong=True)
    assert [(reply.tokens, reply.truncated) for reply in found[1::2]] == [(1, True), (5, True)]
    assert all(unbound[at].text.startswith(found[at].text) for at in (1, 3))
    pairs = [(prompt, "一 二 三 四") for prompt in prompts]
    judged = engine.likelihoods(pairs)
    assert [of.overlong for of in judged] == [False, True, True, False, True]
    assert judged[1] == Likelihood((), False, overlong=True)
    assert judged[3].log_likelihood == pytest.approx(
        free.likelihoods(pairs[3:4])[0].log_likelihood, abs=1e-4
    )


def test_a_context_that_the_model_does_not_have_is_refused(
    engine_of: Opener, random_models: Opened
) -> None:
    words = rf"engine\.context: {POSITIONS + 1} .*{POSITIONS} positions.*give {POSITIONS}"
    with pytest.raises(InputError, match=words):
        engine_of({"a": random_models["a"]}, context=POSITIONS + 1)


def with_settings(source: Checkpoint, folder: Path, file: str, **settings: Any) -> Checkpoint:
    """A copy of a model with other settings in one of its files."""
    altered(source.path, folder)
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | settings))
    return Checkpoint.open(folder)


CONVERSATION = (Turn("system", "昇順"), Turn("user", "数列 三 と 一"))
TEMPLATE = (
    "{% if messages[0]['role'] == 'user' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }} 、 {% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


@pytest.fixture(scope="session")
def chatting(
    random_models: Opened, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Checkpoint]:
    """A model whose template wants conversations to begin with the system."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    settings = {"chat_template": TEMPLATE}
    return {"chat": with_settings(random_models["a"], folder, "tokenizer_config.json", **settings)}


def test_a_conversation_is_written_out_by_the_chat_template(
    engine_of: Opener, chatting: Opened
) -> None:
    engine = engine_of(chatting)
    engine.load(whole("chat"))
    plain_text = "昇順 、 数列 三 と 一 、 ="
    expected = written(engine, [plain_text])
    assert written(engine, [CONVERSATION]) == expected
    assert written(engine, [f"<s>{plain_text}"]) == expected  # begins once, whoever wrote it
    found, told = engine.likelihoods([(CONVERSATION, "一 三"), (plain_text, "一 三")])
    assert found.log_likelihood == pytest.approx(told.log_likelihood, abs=1e-4)
    assert (
        sampled(engine, [CONVERSATION, CONVERSATION[:1]])[0] == sampled(engine, [CONVERSATION])[0]
    )


def test_a_conversation_that_the_template_refuses_is_refused(
    engine_of: Opener, chatting: Opened
) -> None:
    check_refused(engine_of(chatting), "'chat': its chat template fails.*no system role")


def test_a_conversation_without_a_template_is_refused(
    engine_of: Opener, random_models: Opened
) -> None:
    check_refused(engine_of(random_models), "'base' has no chat template: ask without --chat")


def check_refused(engine: Engine, words: str) -> None:
    """A conversation that the user begins is refused in these words."""
    conversation = CONVERSATION[1:]
    with pytest.raises(ModelError, match=words):
        written(engine, [conversation])
    with pytest.raises(ModelError, match=words):
        engine.likelihoods([(conversation, "一")])


def test_an_answer_without_its_end_is_a_beginning(engine_of: Opener, random_models: Opened) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    pairs = [("数列", "4 7 7 9"), ("descend of eight =", "4"), ("=", "")]
    whole_answers, begun = engine.likelihoods(pairs), engine.likelihoods(pairs, ended=False)
    assert [len(of.token_log_likelihoods) for of in begun] == [4, 1, 0]
    for one, other in zip(whole_answers, begun, strict=True):
        expected = one.token_log_likelihoods[:-1]
        assert other.token_log_likelihoods == pytest.approx(expected, abs=1e-4)
    assert begun[2] == Likelihood((), True)
    first = written(engine, ["数列"], 1)[0].text
    greedy, other = engine.likelihoods([("数列", first), ("数列", first * 2)], ended=False)
    assert greedy.greedy
    assert len(other.token_log_likelihoods) > 0


def test_any_of_a_models_ends_ends_a_reply(
    engine_of: Opener, random_models: Opened, tmp_path: Path
) -> None:
    engine = engine_of(random_models)
    engine.load(whole("a"))
    before = written(engine, PROMPTS)
    words = next(text for text in (of.text.split() for of in before) if len(set(text)) > 2)
    end = words[2] if words[2] not in words[:2] else words[1]
    tokenizer = AutoTokenizer.from_pretrained(random_models["a"].path, local_files_only=True)
    ends = [2, tokenizer.convert_tokens_to_ids(end)]
    several = with_settings(
        random_models["a"], tmp_path / "several", "generation_config.json", eos_token_id=ends
    )
    engine = engine_of({"several": several})
    engine.load(whole("several"))
    found = written(engine, PROMPTS)
    shortened = 0
    for reply, full in zip(found, before, strict=True):
        spoken = full.text.split()
        if end in spoken:
            assert reply.text.split() == spoken[: spoken.index(end)]
            assert not reply.truncated
            shortened += 1
        else:
            assert reply == full
    assert shortened
    pairs = [(prompt, reply.text) for prompt, reply in zip(PROMPTS, found, strict=True)]
    complete = [not reply.truncated for reply in found]
    assert [of.greedy for of in engine.likelihoods(pairs)] == complete


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_swaps_leave_memory_flat(engine_of: Opener, tmp_path: Path) -> None:
    """On models of some 6 MB, so that one kept copy of each swap would show."""
    if engine_of.kind == "vllm":
        pytest.skip("vLLM merges in processes of its own: see benchmarks/soak.py")
    models: Opened = {}
    for seed, name in enumerate(("base", "a", "b")):
        folder = tiny.write_model(tmp_path / name, seed=seed, layers=20, hidden=160)
        models[name] = Checkpoint.open(folder)
    size = sum(header.bytes for header in models["a"].headers.values())
    engine = engine_of(models)

    def swap(step: int) -> None:
        engine.load(task_arithmetic("base", a=0.1 + step / 40, b=0.5))
        engine.likelihoods(PAIRS[:4])
        engine.load(stack(("a", 0, 2 + step), ("b", step, 18 + step % 2)))
        written(engine, PROMPTS[:2], 2)

    for step in range(3):
        swap(step)
    before = resident_bytes()
    for step in range(3, 9):  # two swaps each, none of them a return
        swap(step)
    grown = resident_bytes() - before
    assert size > 5_000_000
    assert grown < 8_000_000
