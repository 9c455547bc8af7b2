"""Searches with several objectives, constraints, other optimizers and reasons to stop."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import InputError
from evomerge.guard import pareto
from evomerge.job import Job
from evomerge.search import Interrupted, Silent, Status, launch, resume
from evomerge.search.setting import Setting
from evomerge.store import CandidateRow, Store
from tests import tiny
from tests.running import evomerge_, log, query, url


def read(database: Path) -> list[CandidateRow]:
    with Store(url(database)) as store:
        return store.candidates(store.search("tiny").id)


def shown(database: Path) -> dict[str, Any]:
    end = evomerge_("show", "tiny", "--store", url(database), "--json")
    document: dict[str, Any] = json.loads(end.out)
    return document


def search(folder: Path, *overrides: str, **changes: Any) -> Path:
    job, database = tiny.write_job(folder, **changes), folder / "store.db"
    end = evomerge_("run", job, *overrides, "--store", url(database))
    assert end.code == 0, end.err
    return database


def generating(folder: Path) -> None:
    """The tiny task, answered by generating instead of by one forward."""
    path = tiny.write_task(folder / "task")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("teacher_forced: true", "teacher_forced: false"), encoding="utf-8")


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Accuracy against the length of replies and the number of layers, by NSGA-II."""
    folder = tmp_path_factory.mktemp("front")
    generating(folder)
    return search(
        folder,
        space={"preset": "layer_stack"},
        objective="pareto",
        objectives=["score", "length", "layers"],
        optimizer={"name": "nsga2", "population": 6},
        budget={"candidates": 18},
    )


@pytest.mark.slow
def test_front_holds_whom_nobody_beats_in_everything(front: Path) -> None:
    found, said = read(front), shown(front)
    complete = [c for c in found if c.objectives is not None]
    assert len(complete) >= 6
    once = {c.recipe_sha: c for c in reversed(complete)}  # the first of each recipe
    complete = [c for c in complete if once[c.recipe_sha] is c]
    values = np.array([c.objectives for c in complete])
    expected = {complete[i].id for i in pareto.front(values)}
    assert {row["candidate"] for row in said["front"]} == expected
    assert said["hypervolume"] >= 0


@pytest.mark.slow
def test_hypervolume_never_falls(front: Path) -> None:
    reviews = query(front, "SELECT review FROM generation WHERE kind = 'proposed' ORDER BY number")
    volumes = [json.loads(review)["hypervolume"] for (review,) in reviews if review]
    assert len(volumes) >= 2
    assert volumes == sorted(volumes)


@pytest.mark.slow
def test_objectives_are_what_they_say(front: Path) -> None:
    by_id = {c.id: c for c in read(front)}
    with Store(url(front)) as store:
        row = store.search("tiny")
        for e in store.evaluations(row.id, ["train"]):
            assert e.scores is not None
            scores, candidate = e.scores["ja_list_ops"], by_id[e.candidate]
            recipe = store.recipe(candidate.id)
            assert recipe is not None
            depth = sum(
                end - start
                for piece in recipe["slices"]
                for start, end in [piece["sources"][0]["layer_range"]]
            )
            length = float(scores.tokens.mean(dtype=np.float64))
            assert candidate.objectives == (pytest.approx(scores.mean), -length, -depth)


@pytest.mark.slow
def test_finalists_of_several_objectives_include_a_knee(front: Path) -> None:
    said = shown(front)
    on_front = {row["candidate"] for row in said["front"]}
    assert on_front & {row["candidate"] for row in said["finalists"]}


@pytest.mark.slow
def test_front_is_shown_to_people(front: Path) -> None:
    out = evomerge_("show", "tiny", "--store", url(front)).out
    assert "on the front" in out
    assert "hypervolume" in out


@pytest.mark.slow
def test_same_front_is_found_again(front: Path, tmp_path: Path) -> None:
    end = evomerge_("run", front.parent / "job.yaml", "--store", url(tmp_path / "store.db"))
    assert end.code == 0, end.err
    assert log(tmp_path / "store.db") == log(front)


def test_length_of_replies_needs_replies(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path, objective="pareto", objectives=["score", "length"])
    end = evomerge_("run", job, "--store", url(tmp_path / "store.db"))
    assert end.code == 2
    assert "teacher_forced: false" in end.err
    assert not (tmp_path / "store.db").exists()


def test_cma_es_refuses_several_objectives_and_names_who_takes_them(tmp_path: Path) -> None:
    job = tiny.write_job(tmp_path, objective="pareto", objectives=["score", "layers"])
    end = evomerge_("run", job, "--store", url(tmp_path / "store.db"))
    assert end.code == 2
    assert "nsga2" in end.err


@pytest.mark.slow
def test_candidates_that_break_a_constraint_are_told_below_those_that_keep_it(
    tmp_path: Path,
) -> None:
    """No merge reads Japanese as `ja` does: whoever keeps more of it leads."""
    tiny.write_task(tmp_path / "task")
    tiny.write_task(tmp_path / "reading", source="ja_transcription")
    database = search(
        tmp_path,
        tasks=[{"task": "task"}, {"task": "reading", "weight": 0}],
        constraints=[{"task": "ja_transcription", "of": "ja", "drop": 0.1}],
        optimizer={"name": "cma-es", "population": 8},
        budget={"candidates": 16},
    )
    found = [c for c in read(database) if c.label is None and c.state == "scored"]
    assert {c.violation is not None for c in found} == {True}
    assert any(c.violation for c in found)
    for number in (1, 2):
        generation = [c for c in found if c.generation == number]
        ranked = sorted(generation, key=lambda c: -(c.told or 0))
        kept = [not c.violation for c in ranked]
        assert kept == sorted(kept, reverse=True)
        broken = [c.violation or 0 for c in ranked if c.violation]
        assert broken == sorted(broken)


@pytest.mark.slow
def test_a_task_without_weight_is_no_part_of_the_score(tmp_path: Path) -> None:
    tiny.write_task(tmp_path / "task")
    tiny.write_task(tmp_path / "reading", source="ja_transcription")
    tasks = [{"task": "task"}, {"task": "reading", "weight": 0}]
    said = shown(search(tmp_path, tasks=tasks, budget={"candidates": 4}))
    best = said["best"]
    assert best["score"]["train"]["value"] == best["train"]["ja_list_ops"]["score"]


def test_equal_recipes_are_scored_once_and_told_each(tmp_path: Path) -> None:
    """A space of few models: 2 parents over 1 granule of depth-wise choices."""
    space = {"preset": "layer_stack", "max_layers": 12}
    optimizer = {"name": "random", "population": 8}
    database = tmp_path / "store.db"
    job = tiny.write_job(tmp_path, space=space, optimizer=optimizer, budget={"candidates": 8})
    setting = Setting.open(Job.from_file(job))
    one = setting.space.decode(np.full(len(setting.space.coordinates), 0.9))
    object.__setattr__(setting, "space", Alike(setting.space))
    launch(setting, url(database), Silent(), lambda: False)
    found = [c for c in read(database) if c.generation == 1]
    assert len({c.recipe_sha for c in found}) == 1
    assert one is not None
    assert len({c.fitness for c in found}) == len({c.told for c in found}) == 1
    owners = query(
        database,
        "SELECT copied_from, COUNT(*) FROM evaluation JOIN candidate ON candidate.id = candidate_id"
        " WHERE purpose = 'train' GROUP BY copied_from ORDER BY 1",
    )
    assert owners == [(None, 1), (found[0].id, 7)]
    used = shown(database)["budget"]
    assert used["candidates"]["used"] == 8
    assert used["example_evaluations"]["used"] == 20 + 4  # one on train, one on the monitor slice


class Alike:
    """A space in which every genotype means the same model."""

    def __init__(self, space: Any) -> None:
        self.coordinates, self.sigma, self._space = space.coordinates, space.sigma, space

    def decode(self, genotype: Any) -> Any:
        return self._space.decode(np.array([c.start for c in self.coordinates]))


def halted(folder: Path, budget: int, **changes: Any) -> tuple[Path, Store]:
    """A search that was stopped by its budget of candidates before its finals."""
    job, database = tiny.write_job(folder, budget={"candidates": 400}, **changes), folder / "s.db"
    store = Store(url(database), create=True)

    def enough() -> bool:
        sql = "SELECT COUNT(*) FROM candidate WHERE label IS NULL"
        return query(database, sql)[0][0] > budget

    with pytest.raises(Interrupted):
        launch(Setting.open(Job.from_file(job)), store.url, Silent(), enough)
    return database, store


@pytest.mark.slow
def test_optimizer_may_change_in_mid_search_and_is_told_what_was_found(tmp_path: Path) -> None:
    database, store = halted(tmp_path, budget=8)
    with store:
        resume(
            "tiny",
            store,
            Silent(),
            lambda: False,
            ["optimizer.name=lra-cma-es", "optimizer.population=6", "budget.candidates=24"],
        )
    found = read(database)
    sizes = [sum(c.generation == g and c.label is None for c in found) for g in range(1, 7)]
    assert sizes[:3] == [4, 4, 4]
    assert set(sizes[3:-1]) <= {6, 0}
    rows = query(database, "SELECT optimizer FROM generation WHERE kind = 'proposed'")
    names = [json.loads(row)["name"] for (row,) in rows]
    assert names == ["cma-es"] * 3 + ["lra-cma-es"] * 2
    events = [text for (text,) in query(database, "SELECT text FROM event WHERE kind='changed'")]
    assert events == [
        "from here on: optimizer.name=lra-cma-es, optimizer.population=6, budget.candidates=24"
    ]
    assert query(database, "SELECT * FROM event WHERE kind = 'replay'") == []


@pytest.mark.slow
def test_a_finished_search_is_not_taken_further(tmp_path: Path) -> None:
    database = search(tmp_path, budget={"candidates": 4})
    end = evomerge_("resume", "tiny", "budget.candidates=8", "--store", url(database))
    assert end.code == 2
    assert "is finished" in end.err


@pytest.mark.slow
def test_nothing_changes_while_the_winner_is_chosen(tmp_path: Path) -> None:
    database, store = halted(tmp_path, budget=8)
    with store:
        looked, short = "SELECT * FROM ledger", ["budget.candidates=16"]
        with pytest.raises(Interrupted):
            resume("tiny", store, Silent(), lambda: bool(query(database, looked)), short)
        before = log(database)
        with pytest.raises(InputError, match="resume it without budget"):
            resume("tiny", store, Silent(), lambda: False, ["budget.candidates=20"])
        assert log(database) == before
        resume("tiny", store, Silent(), lambda: False, ["executor.kind=inline"])
        assert store.search("tiny").state == "finished"


@pytest.mark.slow
def test_a_limit_that_is_reached_already_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    database, store = halted(tmp_path, budget=8)
    before = log(database)
    with store:
        for limit in (8, 12):
            end = evomerge_("resume", "tiny", f"budget.candidates={limit}", "--store", store.url)
            assert end.code == 2
            assert "budget.candidates: 12 are spent already: give more" in end.err
            assert log(database) == before


class Hearing(Silent):
    """Notes of which generations it is told."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def generation(self, status: Status) -> None:
        self.numbers.append(status.generation)


@pytest.mark.slow
def test_a_search_that_had_stopped_goes_on_under_a_larger_budget(tmp_path: Path) -> None:
    random = {"name": "random", "population": 4}  # it opens no generation for a mean
    path = tiny.write_job(tmp_path, optimizer=random, budget={"candidates": 4})
    with Store(url(tmp_path / "store.db"), create=True) as store:

        def stopped() -> bool:
            return store.search("tiny").stop_reason is not None

        with pytest.raises(Interrupted):
            launch(Setting.open(Job.from_file(path)), store.url, Silent(), stopped)
        assert stopped()
        with pytest.raises(Interrupted):
            resume("tiny", store, Silent(), lambda: True, ["budget.candidates=8"])
        assert not stopped()
        heard = Hearing()
        resume("tiny", store, heard, lambda: False)
        assert heard.numbers == [2]  # of the first one it was told when it was scored
        row = store.search("tiny")
        assert (row.state, row.stop_reason) == ("finished", "the budget of 8 candidates is spent")


@pytest.mark.slow
def test_a_space_that_is_exhausted_ends_a_search_of_whatever_budget(tmp_path: Path) -> None:
    parents = {
        name: {"model": str(tiny.write_model(tmp_path / name, seed, layers=2))}
        for seed, name in enumerate(("one", "other"))
    }
    database = search(
        tmp_path,
        parents=parents,
        base=None,
        space={"kind": "layers", "form": "depth_wise"},
        optimizer={"name": "random", "population": 8},
        budget={"example_evaluations": 10**9},
    )
    said = shown(database)
    assert said["stop_reason"] == "the space is exhausted: no new recipe in the last 20 generations"
    assert len({c.recipe_sha for c in read(database) if c.generation > 0}) <= 4


@pytest.mark.slow
def test_an_incumbent_and_not_whoever_met_easy_examples_leads(tmp_path: Path) -> None:
    """Before there is a winner, and n counts the tasks that the score is made of."""
    tiny.write_task(tmp_path / "task")
    tiny.write_task(tmp_path / "reading", source="ja_transcription")
    path = tiny.write_job(
        tmp_path,
        tasks=[{"task": "task", "weight": 0}, {"task": "reading"}],
        optimizer={"name": "random", "population": 8},
        staging={"stages": [1, 12], "keep": [2]},
        budget={"candidates": 16},
    )
    database = tmp_path / "store.db"

    def enough() -> bool:
        return query(database, "SELECT COUNT(*) FROM generation")[0][0] > 2

    with Store(url(database), create=True) as store, pytest.raises(Interrupted):
        launch(Setting.open(Job.from_file(path)), store.url, Silent(), enough)
    best = shown(database)["best"]
    ((review,),) = query(database, "SELECT review FROM generation WHERE review IS NOT NULL")
    assert best["candidate"] == json.loads(review)["incumbent"]
    assert best["score"]["train"]["n"] == 12


@pytest.mark.slow
def test_what_scores_depend_on_does_not_change_in_mid_search(tmp_path: Path) -> None:
    _, store = halted(tmp_path, budget=4)
    with (
        store,
        pytest.raises(InputError, match="only mode, optimizer, budget, stop, executor and guard"),
    ):
        resume("tiny", store, Silent(), lambda: False, ["shaping=0"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "words"),
    [
        ({"target": 0.001}, None),
        ({"stagnation": 1}, "stagnation: "),
    ],
)
def test_search_says_why_it_stopped_early(
    tmp_path: Path, stop: dict[str, Any], words: str | None
) -> None:
    said = shown(search(tmp_path, stop=stop, budget={"candidates": 40}))
    if words is None:
        words = "the budget of 40" if said["best"]["train"]["ja_list_ops"]["score"] == 0 else "the "
    assert said["stop_reason"].startswith(words)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "auto",
        "cma-es-margin",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("lra-cma-es", "tpe", "qmc", "random")),
    ],
)
def test_every_optimizer_conducts_a_search(tmp_path: Path, name: str) -> None:
    optimizer = {"name": name, "population": 4}
    database = search(tmp_path, optimizer=optimizer, budget={"candidates": 8})
    said = shown(database)
    assert said["state"] == "finished"
    assert said["optimizer"] == ("cma-es" if name == "auto" else name)


@pytest.mark.slow
def test_what_was_settled_is_said_and_kept(tmp_path: Path) -> None:
    job, database = tiny.write_job(tmp_path, optimizer={}, staging="auto"), tmp_path / "store.db"
    end = evomerge_("run", job, "--store", url(database))
    assert end.code == 0, end.err
    assert "optimizer: lra-cma-es, as " in end.err
    assert "staging: [" in end.err
    ((stored,),) = query(database, "SELECT job FROM search")
    assert json.loads(stored)["optimizer"]["name"] == "lra-cma-es"
    assert json.loads(stored)["staging"]["stages"]
