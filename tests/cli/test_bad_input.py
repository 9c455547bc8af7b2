"""Wrong input: exit code 2, one line that says what and where, and nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from evomerge.store import Coordinator, Store
from tests import tiny
from tests.running import count, evomerge_, url

Models = dict[str, Path]


def refuse(folder: Path, message: str, *arguments: str | Path) -> None:
    """Run a command that must be refused with this message, and leave the folder as it is."""
    before = set(folder.rglob("*"))
    end = evomerge_(*arguments)
    assert (end.code, end.out) == (2, "")
    assert end.err.startswith("evomerge: ")
    assert end.err.count("\n") == 1
    assert end.err.endswith("\n")
    assert message in end.err
    written = {path for path in folder.rglob("*") if ".db" not in path.name} - before
    assert written == set()
    searches = "SELECT count(*) FROM search"
    assert count(folder / "new.db", searches) == 0


def run(folder: Path, message: str, job: Path, *overrides: str) -> None:
    """`evomerge run` into a new store must be refused."""
    refuse(folder, message, "run", job, *overrides, "--store", url(folder / "new.db"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget.candidates", "override 'budget.candidates': write key=value"),
        ("=3", "override '=3': write key=value"),
        ("seed.deep=3", "override 'seed.deep=3': 'seed' holds no keys"),
        ("seed=[", "override 'seed=[': '[' is not YAML"),
        ("sed=3", "sed: unknown key: did you mean 'seed'?"),
        ("budget={}", "no limit: give candidates, example_evaluations, hours or gpu_hours"),
        ("budget.candidates=0", "budget.candidates: 0"),
        ("optimizer.name=cmaes", "optimizer.name: 'cmaes'"),
        ("optimizer.population=1", "optimizer.population: 1: give at least 2, or auto"),
        ("name=a/b", "name: 'a/b': use letters, digits"),
        ("parents={}", "parents: 0 given: give at least 1"),
        ("parents.ja.model=nowhere", "job.yaml: parents.ja.model: no folder '"),
        ("base.model=nowhere", "base.model: no folder '"),
        ("base=null", "job.yaml: base: required, and missing: 'task_arithmetic'"),
        ("space.preset=per_layer_tsk", "space.preset: 'per_layer_tsk' is unknown"),
        ("space.method=tie", "method: 'tie' is unknown: did you mean 'ties'?"),
        (
            "tasks=[{task: nothing}]",
            "job.yaml: task 'nothing' is neither a file nor a packaged task",
        ),
        ("tasks=[{task: task}, {task: task}]", "'ja_list_ops' is named twice"),
        (
            "staging={stages: [10, 99], keep: [2]}",
            "job.yaml: staging.stages: 99 examples are more than the 20 of task",
        ),
        ("staging={stages: [10, 5], keep: [2]}", "stages: [10, 5] do not grow"),
        ("engine.device=toaster", "engine.device: 'toaster' is no device"),
    ],
)
def test_wrong_value_of_a_job_is_refused(job_file: Path, override: str, message: str) -> None:
    run(job_file.parent, message, job_file, override)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "job.yaml' cannot be read: "),
        ("name: [", "job.yaml' is not YAML: line 1, column 8: while parsing a flow node, "),
        ("name: x\nseed: 1\nname: y", "job.yaml' is not YAML: line 3: 'name' is given in line 1 "),
        ("- name", "job.yaml' holds no keys: "),
        ("", "job.yaml' holds no keys: "),
        ("name: x", "job.yaml: parents: required, and missing"),
    ],
)
def test_job_file_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    job = tmp_path / "job.yaml"
    if text is not None:
        job.write_text(text)
    run(tmp_path, message, job)


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("parent", "message"),
    [
        ("deep", "they do not fit together"),
        ("wide", "they do not fit together"),
        ("cut", "model.safetensors' is truncated or no safetensors file"),
        ("empty", "config.json is missing"),
        ("weightless", "no safetensors file in the folder"),
    ],
)
def test_parent_that_does_not_fit_is_refused(
    models: Models, tmp_path: Path, parent: str, message: str, command: str
) -> None:
    folder = tmp_path / parent
    if parent == "wide":
        tiny.write_model(folder, seed=4, hidden=32)
    elif parent == "empty":
        folder.mkdir()
    else:
        shutil.copytree(models["deep" if parent == "deep" else "a"], folder)
    weights = folder / "model.safetensors"
    if parent == "cut":
        weights.write_bytes(weights.read_bytes()[:5000])
    if parent == "weightless":
        weights.unlink()
    parents = {"one": {"model": str(models["b"])}, "two": {"model": str(folder)}}
    job = tiny.write_job(tmp_path, parents=parents, base={"model": str(models["base"])})
    if command == "run":
        run(tmp_path, message, job)
    else:
        refuse(tmp_path, message, "check", job)


def replace_line(number: int, text: str) -> Callable[[Path], None]:
    """Replaces a line of train.jsonl; the first is 1."""

    def change(task: Path) -> None:
        path = task / "data" / "train.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    return change


def overlap(task: Path) -> None:
    """Puts the fifth test item into train, as its third."""
    lines = (task / "data" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    replace_line(3, lines[4])(task)


@pytest.mark.parametrize("command", ["run", "check"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_line(7, ""), "data/train.jsonl:7: the line is empty: remove it"),
        (replace_line(2, "{"), "data/train.jsonl:2: not JSON: "),
        (replace_line(1, "[]"), "data/train.jsonl:1: not a JSON object"),
        (replace_line(24, '{"a": 1}'), "data/train.jsonl:24: the template does not fit"),
        (overlap, "item 5 of test is item 3 of train: splits must not overlap"),
        (lambda task: (task / "data" / "test.jsonl").unlink(), "data/test.jsonl' is missing"),
        (lambda task: (task / "data" / "validation.jsonl").write_text(""), "jsonl' is empty"),
        (lambda task: (task / "data" / "train.jsonl").write_bytes(b"\xff"), "is not UTF-8"),
        (lambda task: (task / "task.yaml").write_text("name: x"), "data: required, and missing"),
        (lambda task: (task / "task.yaml").write_text("name: ["), "task.yaml' cannot be read"),
    ],
)
def test_task_with_bad_data_is_refused(
    job_file: Path, change: Callable[[Path], None], message: str, command: str
) -> None:
    change(job_file.parent / "task")
    if command == "run":
        run(job_file.parent, message, job_file)
    else:
        refuse(job_file.parent, message, "check", job_file)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run RECIPE", "RECIPE' is a merge recipe: merge it with: evomerge merge RECIPE OUT"),
        ("run MODEL", "MODEL' is a model folder: score it with: evomerge eval MODEL --task TASK"),
        ("run TASK", "TASK' is a task: look at it with: evomerge check TASK"),
        ("merge JOB OUT", "JOB' is a job: launch it with: evomerge run JOB"),
        ("merge MODEL OUT", "MODEL' is a model folder: score it with: evomerge eval MODEL"),
        ("eval JOB --task TASK", "JOB' is a job: launch it with: evomerge run JOB"),
        ("check MODEL", "MODEL' is a model folder: score it with: evomerge eval MODEL"),
    ],
)
def test_what_is_for_another_command_is_sent_there(
    job_file: Path, command: str, message: str
) -> None:
    folder = job_file.parent
    (folder / "recipe.yaml").write_text("merge_method: linear\nmodels: [{model: x}]")
    places = {
        "RECIPE": folder / "recipe.yaml",
        "MODEL": tiny.ZOO / "ja",
        "TASK": folder / "task" / "task.yaml",
        "JOB": job_file,
        "OUT": folder / "out",
    }
    said = message.removesuffix("OUT").removesuffix("--task TASK").rstrip()
    for word, path in places.items():
        said = said.replace(word, str(path))
    refuse(folder, said, *(str(places.get(word, word)) for word in command.split()))


@pytest.mark.parametrize(
    "command", ["ls", "show x", "top x", "resume x", "export x -o out", "report x -o out.html"]
)
def test_a_folder_where_no_search_was_launched_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EVOMERGE_STORE", raising=False)
    refuse(tmp_path, "no search was launched here yet: launch one", *command.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--store a.db --storage-path b", "--store and --storage-path: a search is in one place"),
        ("--timeout -5", "--timeout: -5: give seconds, more than 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    job_file: Path, monkeypatch: pytest.MonkeyPatch, options: str, message: str
) -> None:
    monkeypatch.chdir(job_file.parent)
    refuse(job_file.parent, message, "run", job_file, *options.split())


@pytest.mark.parametrize("command", ["run JOB", "ls", "show tiny", "resume tiny"])
@pytest.mark.parametrize(
    ("store", "message"),
    [
        (
            "sqlite:store.db",
            "store 'sqlite:store.db' is no URL: write a file's path, or postgresql",
        ),
        ("mysql://me:geheim@host/db", "mysql://me:***@host/db' is neither a SQLite file nor"),
        ("postgresql://me:geheim@host:port/db", "postgresql://me:***@host:port/db' is no URL"),
        ("postgresql://me:geheim@127.0.0.1:1/db", "postgresql://me:***@127.0.0.1:1/db' cannot be"),
        (
            "postgresql://127.0.0.1:1/db?user=me&password=geheim",
            "db?password=***&user=me' cannot be",
        ),
        ("sqlite:///{folder}/job.yaml", "cannot be opened: file is not a database"),
        ("sqlite:///{folder}/missing/s.db", "missing"),
    ],
)
def test_store_that_cannot_be_opened_is_refused(
    job_file: Path, command: str, store: str, message: str
) -> None:
    words = command.replace("JOB", str(job_file)).split()
    folder = job_file.parent
    refuse(folder, message, *words, "--store", store.format(folder=folder))


def test_taken_name_is_refused(searched: Path, tmp_path: Path) -> None:
    shutil.copyfile(searched, tmp_path / "store.db")
    before = (tmp_path / "store.db").read_bytes()
    job, store = tiny.write_job(tmp_path), url(tmp_path / "store.db")
    message = f"the name 'tiny' is taken in store '{store}': resume that search"
    refuse(tmp_path, message, "run", job, "--store", store)
    assert (tmp_path / "store.db").read_bytes() == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("show tine", "has no search 'tine': did you mean 'tiny'?"),
        ("top tine", "has no search 'tine'"),
        ("resume tine", "has no search 'tine'"),
        ("export tine -o OUT", "has no search 'tine'"),
        ("export tine -o OUT --recipe-only", "has no search 'tine'"),
        ("export tiny -o OUT --candidate 999", "search 'tiny' has no candidate 999"),
        ("export tiny -o OUT --candidate 999 --recipe-only", "has no candidate 999"),
        ("export tiny -o FULL", "is not empty: name another, or empty it"),
        ("export tiny -o FULL --recipe-only", "is not empty: name another, or empty it"),
        ("export tiny -o FULL/file", "is a file: name a folder"),
    ],
)
def test_what_is_not_in_the_store_or_in_the_way_is_refused(
    searched: Path, tmp_path: Path, command: str, message: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    words = command.replace("OUT", str(tmp_path / "out")).replace("FULL", str(tmp_path / "full"))
    refuse(tmp_path, message, *words.split(), "--store", url(searched))
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_export_before_the_end_is_refused(tmp_path: Path) -> None:
    store = url(tmp_path / "store.db")
    with Store(store, create=True) as opened:
        Coordinator.launch(opened, "tiny", 0, {}, {}, [], []).close()
    message = "search 'tiny' is stopped and has no winner yet: resume it"
    refuse(tmp_path, message, "export", "tiny", "-o", tmp_path / "out", "--store", store)


def test_search_that_is_conducted_is_refused_to_others(tmp_path: Path, searched: Path) -> None:
    shutil.copyfile(searched, tmp_path / "store.db")
    store = url(tmp_path / "store.db")
    with Store(store) as opened, Coordinator.take_over(opened, "tiny"):
        message = "search 'tiny' is being conducted by process"
        refuse(tmp_path, message, "export", "tiny", "-o", tmp_path / "out", "--store", store)


def test_an_export_of_a_search_under_way_is_told_to_wait(tmp_path: Path) -> None:
    store = url(tmp_path / "store.db")
    message = "search 'tiny' is running and has no winner yet: wait for it"
    with (
        Store(store, create=True) as opened,
        Coordinator.launch(opened, "tiny", 0, {}, {}, [], []),
    ):
        refuse(tmp_path, message, "export", "tiny", "-o", tmp_path / "out", "--store", store)


def test_a_bare_path_is_no_address_for_a_study(searched: Path, tmp_path: Path) -> None:
    message = "--optuna 'opt.db': give a database's URL, such as sqlite:///opt.db"
    refuse(tmp_path, message, "export", "tiny", "--optuna", "opt.db", "--store", url(searched))


def recipe(models: Models) -> dict[str, object]:
    """A merge that works."""
    source = {"model": str(models["a"]), "layer_range": [0, 3]}
    return {"merge_method": "passthrough", "slices": [{"sources": [source]}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "passthru"}, "'passthru' is unknown: did you mean 'passthrough'?"),
        ({"parameters": {"weigth": 1}}, "parameters.weigth: 'passthrough' has no such parameter"),
        ({"dtype": "float99"}, "dtype: 'float99' is unknown"),
        ({"merge_methd": "linear"}, "merge_methd: unknown key: did you mean 'merge_method'?"),
        ({"slices": []}, "slices: the list is empty"),
        ({"slices": [{"sources": [{"model": "A", "layer_range": [1, 4]}]}]}, "has 3 layers"),
        ({"slices": [{"sources": [{"model": "A", "layer_range": [2, 2]}]}]}, "holds no layer"),
        ({"slices": [{"sources": [{"model": "nowhere", "layer_range": [0, 1]}]}]}, "'nowhere'"),
    ],
)
def test_wrong_recipe_is_refused(
    models: Models, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(recipe(models) | change).replace("model: A", f"model: {models['a']}")
    path.write_text(text)
    refuse(tmp_path, message, "merge", path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe.yaml' cannot be read"),
        ("[", "not YAML"),
        ("- a", "not a recipe"),
        ("a: 1\na: 2", "not YAML: line 2: 'a' is given in line 1 already: keep one of them"),
    ],
)
def test_recipe_file_that_is_none_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    refuse(tmp_path, message, "merge", path, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "model.safetensors' is truncated or no safetensors file"),
        ("lost", "shard 'model-00002-of-00002.safetensors' of its index is missing"),
        ("deep", "layers and '"),
        ("nan", "tensor 'lm_head.weight' of '"),
    ],
)
def test_a_merge_of_a_damaged_parent_ends_with_one_line(
    models: Models, tmp_path: Path, damage: str, message: str
) -> None:
    parent = models["deep"]
    if damage != "deep":
        parent = Path(shutil.copytree(models["a"], tmp_path / "parent"))
    weights = parent / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    if damage == "lost":
        files = {"lm_head.weight": "model.safetensors", "x": "model-00002-of-00002.safetensors"}
        index = {"metadata": {}, "weight_map": files}
        (parent / "model.safetensors.index.json").write_text(json.dumps(index))
    if damage == "nan":
        tensors = load_file(weights)
        tensors["lm_head.weight"][3, 4] = float("nan")
        save_file(tensors, weights)
    listed = [{"model": str(path), "parameters": {"weight": 1}} for path in (models["b"], parent)]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": listed}))
    before = set(tmp_path.rglob("*"))
    end = evomerge_("merge", path, tmp_path / "out")
    assert (end.code, end.out) == (2, "")
    *_, last = end.err.splitlines()
    assert last.startswith("evomerge: ")
    assert message in last
    assert "Traceback" not in end.err
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size", ["", "5X", "0B", "-1B"])
def test_wrong_shard_size_is_refused(models: Models, tmp_path: Path, size: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(models)))
    message = f"--out-shard-size: '{size}' is no size"
    refuse(tmp_path, message, "merge", path, tmp_path / "out", f"--out-shard-size={size}")


def test_merge_into_a_folder_with_files_is_refused(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(models)))
    refuse(tmp_path, "is not empty", "merge", path, tmp_path)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("afile/out", "afile' is a file: name another folder"),
        ("afile/deeper/out", "afile' is a file: name another folder"),
        (".", "output '.' cannot be written: it is the current directory"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "export", "recipe"])
def test_output_that_cannot_be_made_is_refused(
    models: Models,
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    out: str,
    message: str,
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(models)))
    (tmp_path / "afile").write_text("mine")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty" if out == "." else tmp_path)
    if command == "merge":
        refuse(tmp_path, message, "merge", path, out)
        return
    shutil.copyfile(searched, tmp_path / "store.db")
    options = ["export", "tiny", "-o", out, "--store", url(tmp_path / "store.db")]
    if command == "export":
        refuse(tmp_path, message, *options)
        assert count(tmp_path / "store.db", "SELECT count(*) FROM ledger WHERE kind='unseal'") == 0
    elif out == ".":  # a recipe is written into the folder that is there
        assert evomerge_(*options, "--recipe-only").code == 0
        assert (tmp_path / "empty" / "mergekit_config.yml").is_file()
    else:
        refuse(tmp_path, message, *options, "--recipe-only")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("MODEL --task TASK --split test", "--split: test is sealed: only `evomerge export`"),
        ("MODEL --task TASK --split trian", "--split: 'trian' is no split: did you mean 'train'?"),
        ("MODEL --task nothing", "task 'nothing' is neither a file nor a packaged task"),
        ("nowhere --task TASK", "model 'nowhere': no such folder"),
        ("MODEL --task TASK --device toaster", "'toaster' is no device"),
        ("MODEL", "Missing option '--task'"),
        ("MODEL --task TASK --limit 0", "Invalid value for '--limit'"),
        ("MODEL --task TASK --samples no/where", "--samples: there is no folder 'no'"),
        ("MODEL --task TASK --engine bach_size=4", "did you mean 'batch_size'?"),
        ("MODEL --task TASK --engine batch_size=0", "--engine: batch_size"),
    ],
)
def test_wrong_evaluation_is_refused(
    models: Models, tmp_path: Path, command: str, message: str
) -> None:
    task = tiny.write_task(tmp_path / "task")
    words = command.replace("MODEL", str(models["a"])).replace("TASK", str(task)).split()
    refuse(tmp_path, message, "eval", *words)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "Missing command: see --help"),
        ("runn", "No such command 'runn'"),
        ("run", "Missing argument 'JOB.yaml'"),
        ("show", "Missing argument 'SEARCH'"),
        ("export tiny", "export: give one of -o, --csv, --parquet, --optuna"),
        ("ls --stoer x", "No such option: --stoer"),
        ("ls --store", "requires an argument"),
        ("top tiny -n many", "Invalid value for '-n'"),
        ("top tiny -n 0", "Invalid value for '-n'"),
        ("show tiny more", "Got unexpected extra argument"),
        ("check", "check: name a job file, a recipe or a task, or ask"),
    ],
)
def test_wrong_usage_is_refused(tmp_path: Path, command: str, message: str) -> None:
    refuse(tmp_path, message, *command.split())
