"""Licences of merges: what cards state, and what a work made of several models may say."""

import json
import shutil
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.licence import Terms, combined, licence, stated
from evomerge.merge.sources import open_model
from tests.merge.test_adapters import write_adapter

LLAMA, GEMMA, NC = Terms("llama3.1"), Terms("gemma"), Terms("cc-by-nc-4.0")
YI = Terms("other", "yi-license", "LICENSE")


def of(*names: str) -> list[Terms]:
    return [Terms(name) for name in names]


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (of("mit"), Terms("mit")),
        (of("mit", "mit"), Terms("mit")),
        (of("mit", "apache-2.0"), Terms("apache-2.0")),
        (of("apache-2.0", "bsd-3-clause", "mit"), Terms("apache-2.0")),
        (of("cc0-1.0", "mit"), Terms("mit")),
        ([LLAMA, *of("apache-2.0", "mit")], LLAMA),
        ([NC, *of("apache-2.0")], NC),
        ([YI, *of("mit")], YI),
        ([YI, YI], YI),
        ([LLAMA, GEMMA], Terms("other", "gemma-and-llama3.1")),
        ([LLAMA, YI, *of("mit")], Terms("other", "llama3.1-and-yi-license")),
        (of("gpl-2.0", "mit"), Terms("gpl-2.0")),
        (of("gpl-2.0", "apache-2.0"), Terms("other", "gpl-2.0-and-apache-2.0")),
        (of("gpl-3.0", "apache-2.0"), Terms("gpl-3.0")),
        ([LLAMA, *of("unknown")], Terms("unknown")),
        ([], Terms("unknown")),
    ],
)
def test_terms_combine(terms: list[Terms], expected: Terms) -> None:
    assert combined(terms).terms == expected


def test_a_conflict_names_what_conflicts() -> None:
    assert combined([LLAMA, GEMMA, NC, *of("mit")]).reason == (
        "terms that may conflict: cc-by-nc-4.0, gemma, llama3.1"
    )


TERMS = st.sampled_from([*of("mit", "apache-2.0", "gpl-2.0", "unknown"), LLAMA, GEMMA, YI])


@settings(derandomize=True, deadline=None)
@given(st.lists(TERMS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_matters(terms: list[Terms], random: Random) -> None:
    shuffled = [*terms, terms[0]]
    random.shuffle(shuffled)
    assert combined(shuffled) == combined(terms)


@pytest.fixture
def copied(models: dict[str, Path], tmp_path: Path) -> Path:
    """A model folder of its own."""
    return Path(shutil.copytree(models["a"], tmp_path / "copied"))


def write_card(folder: Path, *lines: str) -> None:
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "", "# A model", ""]))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["license: MIT"], of("mit")),
        (["license: other", "license_name: yi-license", "license_link: LICENSE"], [YI]),
        (["license: mit", "license_name: nonsense"], of("mit")),
        (["license: [mit, llama3.1]"], [*of("mit"), LLAMA]),
        (["license: []"], of("unknown")),
        (["language: ja"], of("unknown")),
    ],
)
def test_a_card_states_its_terms(copied: Path, lines: list[str], expected: list[Terms]) -> None:
    write_card(copied, *lines)
    assert stated(Checkpoint.open(copied)) == tuple(expected)


@pytest.mark.parametrize(
    "card",
    [
        None,
        "# license: mit\n",
        "---\nlicense: [\n---\n",
        "---\nlicense: mit\ndate: 2026-02-30\n---\n",
        "---\n- mit\n---\n",
        "---\nlicense: mit\n",
    ],
)
def test_a_card_without_proper_front_matter_states_nothing(copied: Path, card: str | None) -> None:
    if card is not None:
        (copied / "README.md").write_text(card)
    assert licence([Checkpoint.open(copied)]) == "unknown"


def test_a_card_with_windows_line_ends_is_read(copied: Path) -> None:
    (copied / "README.md").write_bytes(b"---\r\nlicense: mit\r\n---\r\n# A model\r\n")
    assert licence([Checkpoint.open(copied)]) == "mit"


def test_an_adapter_has_a_card_of_its_own(copied: Path, tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", copied)
    write_card(copied, "license: apache-2.0")
    model = open_model(f"{copied}+{adapter}")
    assert stated(model) == tuple(of("apache-2.0", "unknown"))
    write_card(adapter, "license: cc-by-nc-4.0")
    assert stated(model) == (Terms("apache-2.0"), NC)
    assert licence([model]) == "cc-by-nc-4.0"


def test_a_pipeline_has_one_card_at_its_root(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    save_file({"conv.weight": torch.ones(2)}, tmp_path / "unet" / "model.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet"]}))
    write_card(tmp_path, "license: openrail++")
    write_card(tmp_path / "unet", "license: mit")
    assert stated(Checkpoint.open(tmp_path)) == (Terms("openrail++"),)
