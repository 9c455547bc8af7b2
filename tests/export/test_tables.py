"""A way out: a search as tables, as files and as a study of Optuna's, with nothing of test."""

import contextlib
import csv
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas
import pytest
from pyarrow import parquet

import evomerge
from evomerge.errors import StoreError
from evomerge.export.tables import Tables, write_csv
from evomerge.store import Coordinator, Store
from tests import tiny
from tests.golden import SCHEMAS, golden
from tests.running import evomerge_, url

NAMES = {
    "candidates",
    "genotypes",
    "scores",
    "evaluations",
    "generations",
    "devices",
    "recipes",
}


def change(path: Path, statement: str) -> None:
    """Alter a store behind its back."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)


@pytest.fixture(scope="module")
def tables(searched: Path) -> Tables:
    """Of a finished search."""
    return evomerge.load(searched, "tiny")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_table_is_a_data_frame(tables: Tables, name: str) -> None:
    table = getattr(tables, name)
    frame = pandas.DataFrame(table)
    assert list(frame.columns) == list(table)
    assert len(frame) > 0
    assert {len(column) for column in table.values()} == {len(frame)}


def test_example_in_the_documents_runs(
    searched: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (tiny.ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    shutil.copyfile(searched, tmp_path / "evomerge.db")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(block.replace("ja-list-ops", "tiny"), found)
    assert len(found["proposed"]) == 8
    assert found["best"].index.names == ["task", "example"]
    assert "train_ja_list_ops_se" in capsys.readouterr().out


def test_documents_name_every_column(searched: Path, tables: Tables) -> None:
    text = (tiny.ROOT / "docs" / "store.md").read_text(encoding="utf-8")
    for name in NAMES - {"genotypes"}:
        (row,) = re.findall(rf"^\| `{name}` \|.*$", text, re.M)
        columns = {column for column in getattr(tables, name) if "_ja_" not in column}
        missing = [column for column in columns if not re.search(rf"\b{column}\b", row)]
        assert not missing


def test_candidates_are_those_that_top_shows(searched: Path, tables: Tables) -> None:
    end = evomerge_("top", "tiny", "--store", url(searched), "--json")
    shown = {row["id"]: row for row in json.loads(end.out)}
    frame = pandas.DataFrame(tables.candidates).set_index("id")
    assert set(frame.index) == set(shown)
    for id, row in frame.iterrows():
        of_top = shown[id]
        assert (row.generation, row.slot, row.state) == (
            (of_top["generation"], of_top["slot"], of_top["state"])
        )
        assert (None if pandas.isna(row.label) else row.label) == of_top["label"]
        assert row.recipe_sha == of_top["recipe_sha"]
        split = "full" if np.isnan(row.train_ja_list_ops) else "train"
        for task, score in of_top["scores"].items():
            assert row[f"{split}_{task}"] == pytest.approx(score)


def test_a_candidates_figures_follow_from_its_scores(tables: Tables) -> None:
    candidates = pandas.DataFrame(tables.candidates).set_index("id")
    scores = pandas.DataFrame(tables.scores)
    for purpose in ("train", "full", "validation"):
        for task in ("ja_list_ops", "ja_transcription"):
            chosen = scores[(scores.purpose == purpose) & (scores.task == task)]
            groups = chosen.astype({"score": float}).groupby("candidate").score
            name = f"{purpose}_{task}"
            frame = candidates[candidates[f"{name}_n"] > 0]
            assert set(frame.index) == set(groups.groups)
            for id, group in groups:
                assert frame[name][id] == pytest.approx(group.mean())
                assert frame[f"{name}_n"][id] == len(group)
                assert frame[f"{name}_se"][id] == pytest.approx(group.sem())
            rest = candidates[candidates[f"{name}_n"] == 0]
            assert rest[name].isna().all()


def test_genotypes_have_the_names_of_their_coordinates(searched: Path, tables: Tables) -> None:
    first, *names = tables.genotypes
    assert (first, names[0], len(names)) == ("candidate", "ja: embeddings weight", 16)
    with Store(url(searched)) as store:
        rows = [c for c in store.candidates(store.search("tiny").id) if c.genotype is not None]
    matrix = np.column_stack([tables.genotypes[name] for name in names])
    assert matrix.tolist() == [c.genotype.tolist() for c in rows if c.genotype is not None]
    assert tables.genotypes["candidate"].tolist() == [c.id for c in rows]


def test_coordinates_of_older_searches_are_numbered(searched: Path, tmp_path: Path) -> None:
    shutil.copyfile(searched, tmp_path / "store.db")
    change(tmp_path / "store.db", "UPDATE search SET coordinates = NULL")
    found = evomerge.load(url(tmp_path / "store.db"), "tiny").genotypes
    assert list(found)[:3] == ["candidate", "x0", "x1"]


def test_generations_and_recipes_are_complete(searched: Path, tables: Tables) -> None:
    generations = pandas.DataFrame(tables.generations)
    assert generations.kind[:3].tolist() == ["baselines", "proposed", "proposed"]
    assert generations.optimizer[1:3].tolist() == ["cma-es", "cma-es"]
    assert generations.shrunk[1:3].notna().all()
    recipes = pandas.DataFrame(tables.recipes)
    assert len(recipes) == len(tables.candidates["id"])
    assert all("merge_method" in json.loads(text) for text in recipes.recipe)


def test_recipes_are_read_when_they_are_asked_for(searched: Path, tmp_path: Path) -> None:
    store = Path(shutil.copyfile(searched, tmp_path / "store.db"))
    found = evomerge.load(store, "tiny")
    store.unlink()
    assert len(found.candidates["id"]) == 15
    with pytest.raises(StoreError, match="there is no such file"):
        _ = found.recipes


def test_no_score_of_the_test_split_is_in_any_table(exported: Path) -> None:
    found = evomerge.load(exported.parent / "store.db", "tiny")
    assert set(found.scores["purpose"]) == {"train", "monitor", "full", "validation"}
    sizes = {s.n for (_, split), s in _splits(exported).items() if split == "test"}
    columns = [c for name in NAMES for c in getattr(found, name)]
    assert not any("test" in column for column in columns)
    assert sizes == {16}
    frame = pandas.DataFrame(found.scores)
    counts = frame.groupby(["candidate", "task", "purpose", "stage"]).size()
    assert not set(counts) & sizes


def _splits(exported: Path) -> dict[tuple[str, str], object]:
    with Store(url(exported.parent / "store.db")) as store:
        return dict(store.splits(store.search("tiny").id))


def test_search_that_runs_can_be_read(searched: Path, tmp_path: Path) -> None:
    shutil.copyfile(searched, tmp_path / "store.db")
    with Store(url(tmp_path / "store.db")) as store, Coordinator.take_over(store, "tiny"):
        assert len(evomerge.load(tmp_path / "store.db", "tiny").candidates["id"]) > 8
        end = evomerge_(
            "export", "tiny", "--csv", tmp_path / "out", "--store", url(tmp_path / "store.db")
        )
        assert end.code == 0, end.err


@pytest.mark.slow
def test_damage_is_refused_by_name(searched: Path, tmp_path: Path) -> None:
    shutil.copyfile(searched, tmp_path / "store.db")
    broken = "UPDATE candidate SET genotype = zeroblob(128) WHERE id = 9"
    change(tmp_path / "store.db", broken)
    with pytest.raises(StoreError, match="the coordinates of candidate 9 do not match their hash"):
        evomerge.load(tmp_path / "store.db", "tiny")
    store = url(tmp_path / "store.db")
    for command in ("show", "top"):
        end = evomerge_(command, "tiny", "--store", store)
        assert end.code == 0
        assert end.out
    end = evomerge_("db", "check", "--store", store)
    assert end.code != 0
    assert "candidate 9, its genotype" in end.out
    assert evomerge_("ls", "--store", store).code == 0
    end = evomerge_("resume", "tiny", "--store", store, "--json")
    assert end.code == 0  # a finished search is shown as it is
    change(tmp_path / "store.db", "UPDATE search SET state = 'open', verdict = NULL")
    end = evomerge_("resume", "tiny", "--store", store)
    assert end.code == 2
    assert "the coordinates of candidate 9 do not match their hash" in end.err


def test_unknown_search_is_refused_with_the_nearest_name(searched: Path) -> None:
    with pytest.raises(StoreError, match="no search 'tinny': did you mean 'tiny'"):
        evomerge.load(searched, "tinny")


@pytest.mark.slow
def test_importing_evomerge_loads_nothing_heavy(searched: Path) -> None:
    code = (
        "import sys, evomerge; heavy = {'numpy', 'torch', 'sqlalchemy', 'optuna', 'pyarrow'}; "
        "print(sorted(heavy & {*sys.modules})); "
        f"evomerge.load({str(searched)!r}, 'tiny'); "
        "print(sorted({'torch', 'optuna', 'pyarrow', 'pandas'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_csv_holds_the_tables(searched: Path, tables: Tables, tmp_path: Path) -> None:
    end = evomerge_("export", "tiny", "--csv", tmp_path / "out", "--store", url(searched), "--json")
    assert end.code == 0, end.err
    files = [Path(file) for file in json.loads(end.out)["files"]]
    assert {file.name for file in files} == {f"{name}.csv" for name in NAMES}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {file.name for file in files}
    assert [path.name for path in tmp_path.glob(".*")] == []
    with (tmp_path / "out" / "candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["fitness"]) for row in rows] == tables.candidates["fitness"].tolist()
    assert "" in {row["train_ja_list_ops"] for row in rows}  # of baselines, which have none
    assert "nan" not in {value for row in rows for value in row.values()}
    assert len(pandas.read_csv(tmp_path / "out" / "scores.csv")) == len(tables.scores["score"])


def test_csv_is_the_same_however_many_rows_are_written_at_once(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write_csv(tables, tmp_path / "whole", lambda text: None)
    monkeypatch.setattr("evomerge.export.tables._ROWS_AT_ONCE", 7)
    pieces = write_csv(tables, tmp_path / "pieces", lambda text: None)
    assert [path.read_bytes() for path in pieces] == [path.read_bytes() for path in whole]


def test_parquet_holds_the_tables(searched: Path, tables: Tables, tmp_path: Path) -> None:
    end = evomerge_("export", "tiny", "--parquet", tmp_path / "out", "--store", url(searched))
    assert end.code == 0, end.err
    assert end.out.strip() == str(tmp_path / "out")
    for name in NAMES:
        found = parquet.read_table(tmp_path / "out" / f"{name}.parquet").to_pydict()
        table = getattr(tables, name)
        assert list(found) == list(table)
        for column, values in table.items():
            if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
                assert found[column] == list(values)
            else:
                np.testing.assert_array_equal(found[column], values)


def test_study_has_every_told_candidate(searched: Path, tables: Tables, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'optuna.db'}"
    end = evomerge_("export", "tiny", "--optuna", storage, "--store", url(searched), "--json")
    assert end.code == 0, end.err
    assert json.loads(end.out) == {"study": "tiny", "url": storage, "complete": 8, "failed": 0}
    study = optuna.load_study(study_name="tiny", storage=storage)
    frame = pandas.DataFrame(tables.candidates).set_index("id")
    for trial in study.trials:
        row = frame.loc[trial.user_attrs["candidate"]]
        assert (trial.value, trial.user_attrs["fitness"]) == (row.told, row.fitness)
        assert trial.user_attrs["generation"] == row.generation
        assert trial.user_attrs["train_ja_list_ops"] == pytest.approx(row.train_ja_list_ops)
        assert trial.datetime_start < trial.datetime_complete
        at = tables.genotypes["candidate"].tolist().index(row.name)
        for name, value in trial.params.items():
            assert value == tables.genotypes[name][at]
        assert len(trial.params) == 16
        assert not any("test" in key for key in trial.user_attrs)


def test_study_is_not_written_into_a_store(searched: Path, tmp_path: Path) -> None:
    shutil.copyfile(searched, tmp_path / "store.db")
    store = url(tmp_path / "store.db")
    end = evomerge_("export", "tiny", "--optuna", store, "--store", store)
    assert end.code == 2
    assert "is a store of evomerge: name a database of its own" in end.err


@pytest.mark.parametrize("schema", SCHEMAS)
def test_study_is_not_written_into_an_older_store(
    searched: Path, tmp_path: Path, schema: str
) -> None:
    older = golden(schema, tmp_path)
    before = older.store.read_bytes()
    end = evomerge_("export", "tiny", "--optuna", older.url, "--store", url(searched))
    assert end.code == 2
    assert "is a store of evomerge: name a database of its own" in end.err
    assert older.store.read_bytes() == before


def test_database_with_a_study_is_no_store(searched: Path, tmp_path: Path) -> None:
    storage = url(tmp_path / "optuna.db")
    assert evomerge_("export", "tiny", "--optuna", storage, "--store", url(searched)).code == 0
    end = evomerge_("ls", "--store", storage)
    assert end.code == 2
    assert "holds the tables of something else: name another" in end.err


def test_password_of_a_studys_database_is_not_shown(searched: Path, postgres_url: str) -> None:
    storage = postgres_url.replace("postgresql://", "postgresql+psycopg://")
    storage = storage.replace("@", ":geheim@")  # which the server does not ask for
    command = ("export", "tiny", "--optuna", storage, "--store", url(searched))
    first, again = evomerge_(*command, "--json"), evomerge_(*command)
    bad = evomerge_(*command[:3], storage.replace("psycopg", "nothing"), *command[4:])
    assert (first.code, again.code, bad.code) == (0, 2, 2), first.err
    assert json.loads(first.out)["url"] == storage.replace("geheim", "***")
    assert "has a study 'tiny' already" in again.err
    for end in (first, again, bad):
        assert "geheim" not in end.out + end.err
        assert ":***@" in end.out + end.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "give one of -o, --csv, --parquet, --optuna"),
        (["--csv", "a", "--parquet", "b"], "not --csv and --parquet"),
        (["-o", "a", "--csv", "b"], "not -o and --csv"),
        (["--csv", "a", "--recipe-only"], "--recipe-only is for -o alone"),
        (["--optuna", "sqlite:///a", "--candidate", "9"], "--candidate is for -o alone"),
    ],
)
def test_ways_out_exclude_each_other(searched: Path, options: list[str], told: str) -> None:
    end = evomerge_("export", "tiny", *options, "--store", url(searched))
    assert end.code == 2
    assert told in end.err


def test_files_are_written_to_a_new_place_only(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    for place, told in (("full", "is not empty"), ("full/file", "is a file")):
        end = evomerge_("export", "tiny", "--csv", tmp_path / place, "--store", url(searched))
        assert end.code == 2
        assert told in end.err
    (tmp_path / "empty").mkdir()
    end = evomerge_("export", "tiny", "--csv", tmp_path / "empty", "--store", url(searched))
    assert end.code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    end = evomerge_("export", "tiny", "--csv", ".", "--store", url(searched))
    assert end.code == 2
    assert "it is the current directory" in end.err
    assert (tmp_path / "full" / "file").read_text() == "mine"
