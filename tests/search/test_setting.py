"""What a job names, opened: models that fit, tasks that do not overlap, threads that stay."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from evomerge.coordinates import start_of
from evomerge.errors import InputError, JobError
from evomerge.job import Job
from evomerge.search.setting import Setting
from tests import tiny
from tests.merge.test_adapters import Q, write_adapter
from tests.merge.test_fit import seeing
from tests.running import evomerge_, url


def opened(path: Path) -> Setting:
    """The setting of a job file."""
    return Setting.open(Job.from_file(path))


@pytest.fixture
def parents(models: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """The `parents` and `base` of a job, copies that may be changed."""
    for name in ("a", "b", "base"):
        shutil.copytree(models[name], tmp_path / name)
    return {
        "parents": {name: {"model": str(tmp_path / name)} for name in ("a", "b")},
        "base": {"model": str(tmp_path / "base")},
    }


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("key", "value"), [("rms_norm_eps", 0.1), ("hidden_act", "gelu"), ("brand_new_key", 1)]
)
def test_a_parent_with_another_config_is_refused(
    parents: dict[str, Any], tmp_path: Path, key: str, value: Any
) -> None:
    edit(tmp_path / "b" / "config.json", **{key: value})
    with pytest.raises(InputError, match=f"'{key}' of config.json"):
        opened(tiny.write_job(tmp_path, **parents))


def test_a_parent_saved_by_another_version_or_at_another_place_is_welcome(
    parents: dict[str, Any], tmp_path: Path
) -> None:
    edit(tmp_path / "b" / "config.json", transformers_version="4.0", _name_or_path="elsewhere")
    opened(tiny.write_job(tmp_path, **parents))


def test_a_parent_that_numbers_its_tokens_otherwise_is_refused(
    parents: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "a" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    first, second, *_ = (word for word, number in words.items() if number > 10)
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="number their tokens differently"):
        opened(tiny.write_job(tmp_path, **parents))


def test_a_parent_may_be_an_adapter_on_a_base(parents: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", tmp_path / "base")
    parents["parents"]["a"] = {"model": "base+adapter"}
    setting = opened(tiny.write_job(tmp_path, **parents))
    path = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"
    assert setting.named.parents["a"] == path
    name = f"{Q}.weight"
    adapted, base = setting.models[path].tensor(name), setting.models[str(tmp_path / "base")]
    assert not torch.equal(adapted, base.tensor(name))
    assert setting.models[path].sha != base.sha


def test_a_parent_may_be_in_the_hubs_cache(
    parents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "models--org--name"
    shutil.copytree(tmp_path / "a", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    parents["parents"]["a"] = {"model": "org/name"}
    setting = opened(tiny.write_job(tmp_path, **parents))
    assert setting.named.parents["a"] == "org/name"
    assert setting.models["org/name"].revision == commit
    with Path(tmp_path / "job.yaml").open() as file:
        assert yaml.safe_load(file)["parents"]["a"] == setting.document()["parents"]["a"]


def test_one_folder_under_two_names_is_refused(parents: dict[str, Any], tmp_path: Path) -> None:
    parents["parents"]["b"] = parents["parents"]["a"]
    with pytest.raises(InputError, match="'a' already"):
        opened(tiny.write_job(tmp_path, **parents))


def test_what_spaces_are_told_of_each_model(parents: dict[str, Any], tmp_path: Path) -> None:
    named = opened(tiny.write_job(tmp_path, **parents)).named
    assert named.configs.keys() == named.sizes.keys() == named.layouts.keys()
    for name in ("a", "b", "base"):
        path = str(tmp_path / name)
        assert named.configs[path] == json.loads((tmp_path / name / "config.json").read_text())
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert named.sizes[path] == {key: tensor.numel() for key, tensor in tensors.items()}


def test_parents_of_different_depth_may_give_their_layers(
    parents: dict[str, Any], models: dict[str, Path], tmp_path: Path
) -> None:
    several = {**parents["parents"], "deep": {"model": str(models["deep"])}}
    job = tiny.write_job(tmp_path, parents=several, base=None, space={"kind": "layers"})
    assert "deep" in opened(job).baselines()


def test_a_model_that_also_sees_may_take_language_models_into_its_decoder(
    parents: dict[str, Any], tmp_path: Path
) -> None:
    base = seeing(tmp_path / "base", tmp_path / "seeing")
    space = {
        "kind": "weight",
        "method": "task_arithmetic",
        "per": "layer",
        "part": "text_decoder",
        "weight": [0, 1],
    }
    parents["base"] = {"model": str(base)}
    setting = opened(tiny.write_job(tmp_path, **parents, space=space))
    assert setting.named.first == str(base)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"search": "other"}, r"parents\.a\.search: 'other': its winner is no model yet"),
        ({"series": "run-*"}, r"parents\.a\.series: 'run-\*' is several models"),
    ],
)
def test_a_parent_that_is_no_model_yet_is_refused(
    parents: dict[str, Any], tmp_path: Path, keys: dict[str, Any], words: str
) -> None:
    data = yaml.safe_load(tiny.write_job(tmp_path, **parents).read_text())
    data["parents"]["a"] = keys
    with pytest.raises(JobError, match=words):
        Setting.open(Job.from_dict(data, "data"))


SPACES: dict[str, Any] = {
    "preset": {"preset": "mine.yaml", "weight": [0, 1]},
    "both": {
        "preset": "both_weights_and_order",
        "weight": {"preset": "mine.yaml"},
        "layers": {"repeats": 1},
    },
    "series": {"preset": "checkpoint_soup"},
    "interpolation": {"preset": "checkpoint_interpolation"},
}


@pytest.mark.parametrize("name", SPACES)
def test_a_stored_job_says_all_that_its_presets_said(
    parents: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    preset = {"kind": "weight", "method": "ties", "per": "model", "weight": [0, 2]}
    preset |= {"density": 0.5, "lambda": {"low": 0.1, "high": 1, "scale": "log"}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(preset))
    setting = opened(tiny.write_job(tmp_path, **parents, space=SPACES[name]))
    (tmp_path / "mine.yaml").unlink()
    monkeypatch.chdir(tmp_path / "a")  # presets are looked up from here
    document = json.loads(json.dumps(setting.document()))
    again = Setting.open(Job.from_dict(document, "stored"))
    assert again.document() == document
    assert again.space.coordinates == setting.space.coordinates
    genotype = start_of(again.space.coordinates)
    assert again.space.decode(genotype) == setting.space.decode(genotype)


def test_a_tensor_that_no_model_has_is_refused_before_anything_is_written(
    parents: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a", "b", "base"):
        path = tmp_path / name / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, path)
    job = tiny.write_job(tmp_path, **parents)
    end = evomerge_("run", job, "--store", url(tmp_path / "store.db"))
    assert end.code != 0
    assert "model.layers.0.mlp.up_proj.weight" in end.err


def test_a_config_of_another_depth_than_the_files_is_refused(
    parents: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a", "b", "base"):
        edit(tmp_path / name / "config.json", num_hidden_layers=2)
    end = evomerge_("run", tiny.write_job(tmp_path, **parents), "--store", url(tmp_path / "s.db"))
    assert end.code == 2
    assert "config.json" in end.err
    assert not (tmp_path / "s.db").exists()


def test_train_of_one_task_may_not_be_test_of_another(tmp_path: Path) -> None:
    tiny.write_task(tmp_path / "one")
    tiny.write_task(tmp_path / "two")
    shutil.copyfile(tmp_path / "one/data/test.jsonl", tmp_path / "two/data/train.jsonl")
    for split in ("validation", "test"):
        lines = (tmp_path / f"two/data/{split}.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        changed = [{**record, "prompt": f"{record['prompt']} ="} for record in records]
        tiny.write_jsonl(tmp_path / f"two/data/{split}.jsonl", changed)
    task = tmp_path / "two" / "task.yaml"
    task.write_text(yaml.safe_dump(yaml.safe_load(task.read_text()) | {"name": "two"}))
    with pytest.raises(InputError, match="of task 'ja_list_ops'"):
        opened(tiny.write_job(tmp_path, tasks=[{"task": "one"}, {"task": "two"}]))


def test_launch_computes_with_the_threads_that_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = torch.get_num_threads()
    try:
        setting = opened(tiny.write_job(tmp_path, engine={"device": "cpu"}))
        setting.engine().close()
        assert setting.document()["engine"]["threads"] == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_opening_an_engine_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    opened(tiny.write_job(tmp_path)).engine().close()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", "renamed", "not what it was at launch"),
        (
            "prompt",
            "{{ prompt }} now:",
            "train has the records that it had at launch, but is asked",
        ),
    ],
)
def test_a_task_that_changed_stops_a_resume_in_one_line(
    searched: Path, tmp_path: Path, key: str, value: str, message: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(searched.parent, folder)
    job = folder / "job.yaml"
    store = url(folder / "other.db")
    assert evomerge_("run", job, "name=other", "budget.candidates=1", "--store", store).code == 0
    task = folder / "task" / "task.yaml"
    task.write_text(yaml.safe_dump(yaml.safe_load(task.read_text()) | {key: value}))
    end = evomerge_("export", "other", "-o", folder / "out", "--store", store)
    assert end.code == 2
    assert message in end.err


def test_a_stored_job_has_no_password(tmp_path: Path, models: dict[str, Path]) -> None:
    setting = opened(tiny.write_job(tmp_path, store="postgresql://me:secret@host/db"))
    assert setting.document()["store"] == "postgresql://me:***@host/db"
