"""Models that also see, on text alone: their language part is merged, scored and shipped."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)

from evomerge.coordinates import start_of
from evomerge.engine import Engine, Generation, Likelihood, Reply
from evomerge.engine.build import build
from evomerge.errors import ModelError
from evomerge.job import Engine as Section
from evomerge.job import Job
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.disk import write_checkpoint
from evomerge.merge.planner import make_plan
from evomerge.recipe import Recipe
from evomerge.search.setting import Setting
from tests import tiny
from tests.running import evomerge_, query, url

VOCABULARY = json.loads((tiny.ZOO / "base" / "config.json").read_text())["vocab_size"]
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
# As deep as the text: counting layers does not tell which of them is the language model.
TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**TEXT),
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        image_token_index=5,
    ),
    # Its layers are of two kinds, and its head is tied.
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(
            **TEXT, sliding_window=4, layer_types=["sliding_attention", "full_attention"]
        ),
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        mm_tokens_per_image=4,
    ),
    # Its files name the layers as a plain language model does, and it counts positions in three
    # directions.
    "qwen2_vl": lambda: transformers.Qwen2VLConfig(
        text_config={
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "patch_size": 4,
        },
    ),
    "paligemma": lambda: transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        projection_dim=16,
    ),
    "kosmos-2": lambda: transformers.Kosmos2Config(
        text_config={
            "vocab_size": VOCABULARY,
            "embed_dim": 16,
            "layers": 2,
            "ffn_dim": 24,
            "attention_heads": 2,
        },
        vision_config=TOWER,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    ),
}
AUTO = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}

PROMPTS = ["数列 三 と 一", "now ascend of 7 and one and 4 =", "=", "一 二 三 四 五 六 七 八 九"]
PAIRS = [(prompt, answer) for prompt in PROMPTS for answer in ("4 7 7 9", "")]


def write(kind: str, folder: Path, seed: int) -> Path:
    """A random model; those of one kind are fine-tunes of the one with seed 0."""
    with torch.random.fork_rng():
        model = AUTO.get(kind, AutoModelForImageTextToText).from_config(CONFIGS[kind]())
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=shared)
        parameter.data += 0.1 * seed * torch.randn(parameter.shape, generator=own)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.ZOO / "base" / file, folder / file)
    return folder


Opener = Callable[..., Engine]


@pytest.fixture
def engine_of() -> Iterator[Opener]:
    """Opens engines over models, the first one giving config and tokenizer unless another is
    named."""
    with ExitStack() as stack:

        def opened(models: dict[str, Checkpoint], first: str | None = None) -> Engine:
            section = Section(device="cpu")
            engine = build(section, models, first or next(iter(models)))
            return stack.enter_context(closing(engine))

        yield opened


def job(folder: Path, base: Path, **parents: Path) -> Path:
    """A search of the language part."""
    return tiny.write_job(
        folder,
        parents={name: {"model": str(path)} for name, path in parents.items()},
        base={"model": str(base)},
        space={"preset": "vlm_language"},
        budget={"candidates": 4},
        guard={"validation_looks": 2},
    )


def seen(engine: Engine) -> tuple[list[Reply], list[Likelihood]]:
    replies = engine.generate(PROMPTS, Generation(8))
    return [reply for (reply,) in replies], engine.likelihoods(PAIRS)


def plain(folder: Path) -> tuple[list[str], list[float]]:
    """Greedy texts and log-likelihoods by transformers alone, one after the other."""
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    end = tokenizer.eos_token_id
    texts, found = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts.append(tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    for prompt, answer in PAIRS:
        before = tokenizer(prompt)["input_ids"]
        after = [*tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
        chosen = logits.log_softmax(dim=-1)[len(before) - 1 : -1]
        found.append(sum(float(row[token]) for row, token in zip(chosen, after, strict=True)))
    return texts, found


def check_live_is_exported(
    setting: Setting, recipes: dict[str, Recipe], engine_of: Opener, folder: Path
) -> None:
    """The contract of engines: what is scored is what ships."""
    live = engine_of(setting.models, setting.named.first)
    said = set()
    for name in [*recipes, *recipes]:
        live.load(recipes[name])
        replies, likelihoods = seen(live)
        said.add(repr((replies, likelihoods)))
        out = folder / name
        if out.exists():
            continue
        write_checkpoint(make_plan(recipes[name], setting.models), setting.models, out)
        fresh = engine_of({"exported": Checkpoint.open(out)})
        whole = {"merge_method": "passthrough", "models": [{"model": "exported"}]}
        fresh.load(Recipe.from_dict(whole))
        assert seen(fresh) == (replies, likelihoods)
        texts, expected = plain(out)
        assert [reply.text for reply in replies] == texts
        assert [x.log_likelihood for x in likelihoods] == pytest.approx(expected, abs=1e-4)
    assert len(said) == len(recipes)  # the recipes can be told apart, and leave nothing behind


def start(setting: Setting) -> Recipe:
    recipe = setting.space.decode(start_of(setting.space.coordinates))
    assert isinstance(recipe, Recipe)
    return recipe


def stack(*layers: tuple[Path, int]) -> Recipe:
    """Layers of the text decoders, one after the other."""
    slices = [{"sources": [{"model": str(m), "layer_range": [i, i + 1]}]} for m, i in layers]
    modules = {"text_decoder": {"slices": slices}}
    return Recipe.from_dict({"merge_method": "passthrough", "modules": modules})


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["gemma3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("llava", "qwen2_vl"))],
)
def test_the_live_language_part_is_the_exported_one(
    kind: str, engine_of: Opener, tmp_path: Path
) -> None:
    base, see, look = (write(kind, tmp_path / n, i) for i, n in enumerate(("base", "see", "look")))
    setting = Setting.open(Job.from_file(job(tmp_path, base, see=see, look=look)))
    recipes = {
        "start": start(setting),
        "look": setting.baselines()["look"],
        "deeper": stack((look, 1), (see, 0), (see, 1)),
        "shallower": stack((see, 1)),
    }
    check_live_is_exported(setting, recipes, engine_of, tmp_path / "out")


@pytest.mark.slow
def test_layers_of_a_language_model_go_into_one_that_sees(
    engine_of: Opener, tmp_path: Path
) -> None:
    base, words = (write("llama", tmp_path / n, i) for i, n in enumerate(("base", "words")))
    see = write("llava", tmp_path / "see", 1)
    setting = Setting.open(Job.from_file(job(tmp_path, base, words=words, see=see)))
    recipes = {"start": start(setting), **setting.baselines()}
    assert recipes.keys() >= {"start", "words", "see", "base", "uniform average"}
    check_live_is_exported(setting, recipes, engine_of, tmp_path / "out")


@pytest.mark.slow
def test_the_language_part_is_searched_and_the_winner_ships(tmp_path: Path) -> None:
    base, words = (write("llama", tmp_path / n, i) for i, n in enumerate(("base", "words")))
    see = write("llava", tmp_path / "see", 1)
    store = tmp_path / "store.db"
    path = job(tmp_path, base, words=words, see=see)
    end = evomerge_("run", path, "--store", url(store), "--json")
    assert end.code == 0, end.err
    shown = json.loads(end.out)
    assert shown["state"] == "finished"
    assert query(store, "SELECT reason FROM evaluation WHERE state = 'failed'") == []
    end = evomerge_("export", "tiny", "-o", tmp_path / "out", "--store", url(store), "--json")
    assert end.code == 0, end.err
    exported, own = Checkpoint.open(tmp_path / "out"), Checkpoint.open(see)
    assert exported.headers.keys() == own.headers.keys()
    tower = own.parts["vision_tower"].places
    assert all(torch.equal(exported.tensor(name), own.tensor(name)) for name in tower)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("paligemma", "tokens see those that follow them"),
        ("kosmos-2", "does not run on text alone: .*pixel_values"),
        ("t5", r"of its parts \(.*\) none is a language model"),
    ],
)
def test_a_model_that_is_no_language_model_without_an_image_is_refused(
    kind: str, words: str, engine_of: Opener, tmp_path: Path
) -> None:
    model = Checkpoint.open(write(kind, tmp_path / "odd", 0))
    with pytest.raises(ModelError, match=words) as raised:
        engine_of({"odd": model})
    assert "\n" not in str(raised.value)


def test_a_model_that_sees_cannot_be_put_into_one_that_does_not(
    engine_of: Opener, tmp_path: Path
) -> None:
    folders = {"words": write("llama", tmp_path / "words", 0)}
    folders["see"] = write("llava", tmp_path / "see", 1)
    models = {name: Checkpoint.open(folder) for name, folder in folders.items()}
    with pytest.raises(ModelError, match=r"'see' has parts \(.*\) that 'words' lacks") as raised:
        engine_of(models)
    assert "\n" not in str(raised.value)
