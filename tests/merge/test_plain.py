"""Plain checkpoints: diffusers' pipelines and components, and bare files of tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint

UNET, TEXT = "diffusion_pytorch_model", "model"


def write(file: Path, *names: str, value: float = 1.0) -> Path:
    """A safetensors file with a tensor of each name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2, 3), value) for name in names}, file)
    return file


def write_json(file: Path, data: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data))


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of a sharded UNet and a text encoder, with copies in half precision."""
    folder = tmp_path / "pipeline"
    parts = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": True,
        "sizes": None,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    write_json(folder / "model_index.json", parts)
    write_json(folder / "scheduler/scheduler_config.json", {})
    write_json(folder / "tokenizer/vocab.json", {})
    write_json(folder / "logs/run.json", {})
    write_json(folder / "text_encoder/config.json", {"architectures": ["CLIPTextModel"]})
    write(folder / f"text_encoder/{TEXT}.safetensors", "layers.0.w", "layers.1.w", value=2)
    write(folder / f"text_encoder/{TEXT}.fp16.safetensors", "layers.0.w", "layers.1.w", value=3)
    write_json(folder / "unet/config.json", {"_class_name": "UNet2DConditionModel"})
    files = {"down_blocks.0.w": f"{UNET}-00001-of-00002.safetensors"}
    files["up_blocks.0.w"] = f"{UNET}-00002-of-00002.safetensors"
    for name, file in files.items():
        write(folder / "unet" / file, name)
    write(folder / f"unet/{UNET}.fp16.safetensors", *files, value=3)
    write_json(folder / f"unet/{UNET}.safetensors.index.json", {"weight_map": files})
    write_json(folder / f"unet/{UNET}.safetensors.index.fp16.json", {"weight_map": {}})
    write(folder / "whole.safetensors", "model.diffusion_model.w")
    return folder


def test_a_pipeline_is_its_components(pipeline: Path) -> None:
    model = Checkpoint.open(pipeline)
    assert model.plain
    assert {name: header.file for name, header in model.headers.items()} == {
        "text_encoder/layers.0.w": f"text_encoder/{TEXT}.safetensors",
        "text_encoder/layers.1.w": f"text_encoder/{TEXT}.safetensors",
        "unet/down_blocks.0.w": f"unet/{UNET}-00001-of-00002.safetensors",
        "unet/up_blocks.0.w": f"unet/{UNET}-00002-of-00002.safetensors",
    }
    assert torch.equal(model.tensor("text_encoder/layers.0.w"), torch.full((2, 3), 2.0))
    assert torch.equal(model.values("unet/up_blocks.0.w")(1, 3), torch.ones(2))


def test_a_plain_checkpoint_has_no_layers(pipeline: Path) -> None:
    model = Checkpoint.open(pipeline)
    layout = model.layout
    assert model.parts == {"default": layout}
    assert layout.layers == 0
    assert {place.layer for place in layout.places.values()} == {None}
    assert all(place.template == name for name, place in layout.places.items())


def test_the_companions_of_a_pipeline_are_its_other_files(pipeline: Path) -> None:
    assert Checkpoint.open(pipeline).companions == (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
    )


def test_the_content_hash_covers_weights_and_companions(pipeline: Path) -> None:
    before = Checkpoint.open(pipeline)
    assert set(before.files) == {*before.companions, *(h.file for h in before.headers.values())}
    (pipeline / "logs/run.json").write_text("other")
    write(pipeline / f"unet/{UNET}.fp16.safetensors", "x")
    assert Checkpoint.open(pipeline).sha == before.sha
    (pipeline / "scheduler/scheduler_config.json").write_text("[]")
    assert Checkpoint.open(pipeline).sha != before.sha


def test_a_component_opens_on_its_own(pipeline: Path) -> None:
    model = Checkpoint.open(pipeline / "unet")
    assert model.plain
    assert set(model.headers) == {"down_blocks.0.w", "up_blocks.0.w"}
    assert model.companions == ("config.json",)
    assert model.config == {"_class_name": "UNet2DConditionModel"}


def test_component_folders_need_no_index(pipeline: Path) -> None:
    (pipeline / "model_index.json").unlink()
    (pipeline / "whole.safetensors").unlink()
    model = Checkpoint.open(pipeline)
    assert {name.split("/")[0] for name in model.headers} == {"text_encoder", "unet"}
    assert model.companions == ("text_encoder/config.json", "unet/config.json")


def test_bare_files_are_a_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "one.v1.safetensors", "a.0.w", "b")
    write(tmp_path / "two.safetensors", "c.0.w")
    model = Checkpoint.open(tmp_path)
    assert model.plain
    assert set(model.headers) == {"a.0.w", "b", "c.0.w"}
    assert (model.config, model.companions) == ({}, ())


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model", "model.fp16"], {"model"}),
        (["model.fp16"], {"model.fp16"}),
        (
            ["x-00001-of-00002", "x-00002-of-00002", "x.fp16-00001-of-00001", "x.bf16"],
            {"x-00001-of-00002", "x-00002-of-00002"},
        ),
        (["x-00001-of-00001", "x-00001-of-00001.fp16"], {"x-00001-of-00001"}),
        (["flux.dev", "flux.schnell"], {"flux.dev", "flux.schnell"}),
    ],
)
def test_copies_in_another_precision_are_left_out(
    tmp_path: Path, files: list[str], chosen: set[str]
) -> None:
    for file in files:
        write(tmp_path / f"{file}.safetensors", f"only in {file}")
    assert set(Checkpoint.open(tmp_path).headers) == {f"only in {file}" for file in chosen}


def remove(folder: Path, name: str) -> None:
    for file in (folder / name).iterdir():
        file.unlink()
    (folder / name).rmdir()


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (["unet"], r"folder 'unet' of its model_index\.json is missing"),
        ([f"unet/{UNET}-00002-of-00002.safetensors"], r"unet': shard '.*' of its index is missing"),
        (
            [f"text_encoder/{TEXT}.safetensors", f"text_encoder/{TEXT}.fp16.safetensors"],
            "text_encoder': no safetensors file",
        ),
    ],
)
def test_an_incomplete_pipeline_is_refused(pipeline: Path, gone: list[str], words: str) -> None:
    for name in gone:
        if (pipeline / name).is_dir():
            remove(pipeline, name)
        else:
            (pipeline / name).unlink()
    with pytest.raises(ModelError, match=words):
        Checkpoint.open(pipeline)


@pytest.mark.parametrize("kind", [["diffusers", "UNet2DConditionModel"], [None, None]])
@pytest.mark.parametrize("name", ["../secrets", "unet/../../secrets", "_/../../secrets"])
def test_the_index_of_a_pipeline_leads_to_no_other_folder(
    pipeline: Path, name: str, kind: list[str | None]
) -> None:
    write(pipeline.parent / "secrets" / "model.safetensors", "w")
    index = json.loads((pipeline / "model_index.json").read_text())
    write_json(pipeline / "model_index.json", {**index, name: kind})
    with pytest.raises(ModelError, match="which is not in its folder"):
        Checkpoint.open(pipeline)


def test_a_pipeline_without_weights_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]})
    write_json(tmp_path / "scheduler/scheduler_config.json", {})
    with pytest.raises(ModelError, match="lists no component with weights"):
        Checkpoint.open(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json is missing, and so is any safetensors"):
        Checkpoint.open(tmp_path)
