"""The shipped recipes: each says where it is from, merges, and loads in transformers."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.merge.checkpoint import Checkpoint
from evomerge.recipe import Recipe
from evomerge.space.residual import Slot, fold_of, stack
from tests.running import evomerge_
from tests.tiny import ROOT, ZOO

RECIPES = {path.stem: path for path in sorted((ROOT / "examples" / "recipes").glob("*.yaml"))}
DEPTHS = {
    "solar": 8,
    "frankenmerge": 8,
    "repeated_layers": 8,
    "block_expansion": 8,
    "residual_scales": 6,
}
TOKENS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every recipe merged from the repository's root, as its paths want it."""
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name, path in RECIPES.items():
            end = evomerge_("merge", path, folder / name)
            assert end.code == 0, end.err
    return {name: folder / name for name in RECIPES}


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_it_is_from(name: str) -> None:
    comment = re.match(r"(# .*\n)+", RECIPES[name].read_text())
    assert comment
    assert re.search(r"arXiv \d{4}\.\d{5}|huggingface\.co/", comment[0])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_merges_and_loads(outputs: dict[str, Path], name: str) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        outputs[name], output_loading_info=True, local_files_only=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert len(model.model.layers) == model.config.num_hidden_layers == DEPTHS.get(name, 6)
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    AutoTokenizer.from_pretrained(outputs[name], local_files_only=True)


def test_no_two_recipes_make_the_same_model(outputs: dict[str, Path]) -> None:
    found = [logits(folder) for folder in outputs.values()]
    alike = [(a, b) for i, a in enumerate(found) for b in found[:i] if torch.equal(a, b)]
    assert not alike


def test_block_expansion_computes_what_its_parent_computes(outputs: dict[str, Path]) -> None:
    assert torch.equal(logits(outputs["block_expansion"]), logits(ZOO / "ops"))


def test_the_chat_vector_is_added(outputs: dict[str, Path]) -> None:
    found, ja, ops, base = (
        load_file(folder / "model.safetensors")
        for folder in (outputs["chat_vector"], *(ZOO / name for name in ("ja", "ops", "base")))
    )
    for name, tensor in found.items():
        wanted = ja[name].double() + ops[name].double() - base[name].double()
        torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=1e-6)


def test_residual_scales_are_what_the_space_folds() -> None:
    ops = Checkpoint.open(ZOO / "ops")
    slots = [
        *(Slot("examples/zoo/ja", layer) for layer in range(3)),
        *(Slot("examples/zoo/ops", 3, 0.8), Slot("examples/zoo/ops", 4)),
        Slot("examples/zoo/ops", 5, -1.25),
    ]
    found = stack(slots, fold_of(ops.config, ops.layout), "float32")
    assert Recipe.from_file(RECIPES["residual_scales"]) == found
