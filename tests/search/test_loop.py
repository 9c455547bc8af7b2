"""Whole searches on the zoo: what they write, when they stop, what they never touch."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import update

from evomerge.fitness.results import Scores
from evomerge.job import Job
from evomerge.search import Interrupted, Silent, launch, resume
from evomerge.search.setting import Setting
from evomerge.store import CandidateRow, EvaluationRow, SearchRow, Store, codec, schema
from tests import tiny
from tests.running import evomerge_, log, query, url

SHAPING = 0.05  # the default of a job


@dataclass(frozen=True)
class Found:
    """What a search left in its store. scores: by candidate id, purpose, stage and task."""

    row: SearchRow
    candidates: list[CandidateRow]
    evaluations: list[EvaluationRow]

    @property
    def proposed(self) -> list[CandidateRow]:
        return [c for c in self.candidates if c.label is None]

    def generation(self, number: int) -> list[CandidateRow]:
        return [c for c in self.candidates if c.generation == number]

    def scores(self, candidate: int, purpose: str, stage: int = 0) -> Scores:
        """Of the job's only task."""
        (row,) = [
            e
            for e in self.evaluations
            if (e.candidate, e.purpose, e.stage) == (candidate, purpose, stage)
        ]
        assert row.scores is not None
        return row.scores["ja_list_ops"]

    def examples(self, purpose: str) -> set[int]:
        """Every example of the first task that anyone was scored on for a purpose."""
        rows = [e.scores for e in self.evaluations if e.purpose == purpose]
        return {int(x) for scores in rows if scores for x in scores["ja_list_ops"].examples}


def read(database: Path) -> Found:
    """The only search of a store."""
    with Store(url(database)) as store:
        row = store.search("tiny")
        purposes = ("train", "monitor", "full", "validation")
        return Found(row, store.candidates(row.id), store.evaluations(row.id, purposes))


def search(folder: Path, **changes: Any) -> Path:
    """The store of a tiny search."""
    job, database = tiny.write_job(folder, **changes), folder / "store.db"
    end = evomerge_("run", job, "--store", url(database))
    assert end.code == 0, end.err
    return database


def shown(database: Path) -> dict[str, Any]:
    """What `evomerge show` says."""
    document: dict[str, Any] = json.loads(
        evomerge_("show", "tiny", "--store", url(database), "--json").out
    )
    return document


def test_same_job_gives_the_same_search_bit_for_bit(searched: Path, tmp_path: Path) -> None:
    database = tmp_path / "store.db"
    end = evomerge_("run", searched.parent / "job.yaml", "--store", url(database))
    assert end.code == 0
    assert log(database) == log(searched)


@pytest.mark.slow
def test_other_seed_gives_another_search(searched: Path, tmp_path: Path) -> None:
    database = tmp_path / "store.db"
    end = evomerge_("run", searched.parent / "job.yaml", "seed=4", "--store", url(database))
    assert end.code == 0
    ours, theirs = read(database), read(searched)
    for mine, other in zip(ours.proposed, theirs.proposed, strict=True):
        assert mine.genotype is not None
        assert other.genotype is not None
        assert not np.array_equal(mine.genotype, other.genotype)
    assert ours.examples("monitor") != theirs.examples("monitor")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cma-es",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("nsga2", "lra-cma-es", "cma-es-margin", "tpe", "qmc", "random")
        ),
    ],
)
def test_search_resumed_for_one_evaluation_at_a_time_ends_the_same(
    tmp_path: Path, name: str
) -> None:
    staging = {"stages": [4, 16], "keep": [3]}
    optimizer = {"name": name, "population": 4}
    budget = {"candidates": 8}
    database = search(tmp_path, budget=budget, optimizer=optimizer, staging=staging)
    job = Job.from_file(tmp_path / "job.yaml")
    with Store(url(tmp_path / "halting.db"), create=True) as store:
        with pytest.raises(Interrupted):
            launch(Setting.open(job), store.url, Silent(), lambda: True)
        halts = 1
        while store.search("tiny").state == "stopped":
            try:
                resume("tiny", store, Silent(), lambda: True)
            except Interrupted:
                halts += 1
    assert log(tmp_path / "halting.db") == log(database)
    assert halts == len(read(database).evaluations)


def test_finished_search_is_left_as_it_is_by_resume(searched: Path, tmp_path: Path) -> None:
    database = tmp_path / "store.db"
    shutil.copyfile(searched, database)
    before = list(query(database, "SELECT * FROM search")), log(database)
    assert evomerge_("resume", "tiny", "--store", url(database)).code == 0
    assert (list(query(database, "SELECT * FROM search")), log(database)) == before


def test_generations_and_slots_are_numbered_without_gaps(searched: Path) -> None:
    found = read(searched)
    places = [(c.generation, c.slot) for c in found.candidates]
    sizes = Counter(generation for generation, _ in places)
    assert places == [(g, s) for g in sorted(sizes) for s in range(sizes[g])]
    assert (sizes[1], sizes[2], sizes[3]) == (4, 4, 1)  # two of proposals, then the mean
    assert [c.label for c in found.generation(3)] == ["mean"]


def test_optimizer_is_told_the_weighted_fitness_of_each_candidate(searched: Path) -> None:
    found = read(searched)
    rows = {e.candidate: e.scores for e in found.evaluations if e.purpose == "train"}
    for candidate in found.proposed:
        scores = rows[candidate.id]
        assert scores is not None
        first, second = scores["ja_list_ops"], scores["ja_transcription"]
        fitness = (first.fitness(SHAPING) + 0.5 * second.fitness(SHAPING)) / 1.5
        assert candidate.told == candidate.fitness == pytest.approx(fitness, abs=1e-12)


def test_monitor_slice_and_driving_examples_share_nothing_and_make_train(searched: Path) -> None:
    found = read(searched)
    driving, monitor = found.examples("train"), found.examples("monitor")
    assert not driving & monitor
    assert driving | monitor == set(range(30))
    assert len(monitor) == 6


def test_gap_is_that_of_the_fittest_candidate(searched: Path) -> None:
    found, said = read(searched), shown(searched)
    fittest = max(found.proposed, key=lambda c: c.fitness or -np.inf)
    assert said["gap"]["incumbent"] == fittest.id
    assert said["gap"]["gap"] == said["gap"]["train"] - said["gap"]["monitor"]


@pytest.mark.slow
def test_without_a_monitor_slice_there_is_no_gap(tmp_path: Path) -> None:
    guard = {"monitor": 0.0, "validation_looks": 2}
    database = search(tmp_path, guard=guard, budget={"candidates": 4})
    assert shown(database)["gap"] is None
    assert read(database).examples("train") == set(range(24))


@pytest.mark.slow
@pytest.mark.parametrize("looks", [2, 4])
def test_validation_is_looked_at_as_often_as_allowed_by_those_that_count(
    tmp_path: Path, looks: int
) -> None:
    database = search(tmp_path, guard={"validation_looks": looks}, budget={"candidates": 4})
    found, said = read(database), shown(database)
    looked = {e.candidate for e in found.evaluations if e.purpose == "validation"}
    finalists = [f["candidate"] for f in said["finalists"]]
    assert looked == {said["best_parent"], *finalists}
    assert said["looks"] == {"used": len(looked), "allowed": looks}
    assert len(looked) == looks
    assert said["best"]["candidate"] in finalists


def test_winner_has_the_best_validation_score(searched: Path) -> None:
    said = shown(searched)

    def score(row: dict[str, Any]) -> float:
        tasks = row["validation"]
        return tasks["ja_list_ops"]["score"] + 0.5 * tasks["ja_transcription"]["score"]

    assert score(said["best"]) == max(score(f) for f in said["finalists"])


def test_best_parent_is_the_best_source_model_on_all_of_train(searched: Path) -> None:
    said = shown(searched)

    def score(row: dict[str, Any]) -> float:
        tasks = row["train"]
        return tasks["ja_list_ops"]["score"] + 0.5 * tasks["ja_transcription"]["score"]

    assert set(said["parents"]) == {"base", "ops", "ja"}
    best = max(said["parents"].values(), key=score)
    chosen = [p for p in said["parents"].values() if p["candidate"] == said["best_parent"]]
    assert score(chosen[0]) == score(best)


def test_test_split_is_nowhere_before_an_export(searched: Path) -> None:
    purposes = {row[0] for row in query(searched, "SELECT purpose FROM evaluation")}
    assert purposes == {"train", "monitor", "full", "validation"}
    assert {row[0] for row in query(searched, "SELECT kind FROM ledger")} == {"look"}
    assert query(searched, "SELECT * FROM export") == []
    sizes = {"train": {30, 24}, "validation": {12}, "test": {16}}
    for split, n in query(searched, "SELECT split, n FROM split"):
        assert n in sizes[split]
    assert query(searched, "SELECT * FROM score WHERE n = 16") == []


def test_no_text_of_any_test_item_is_kept(searched: Path) -> None:
    store = searched.read_bytes()
    for task in ("task", "reading"):
        lines = (searched.parent / task / "data" / "test.jsonl").read_text(encoding="utf-8")
        for line in lines.splitlines():
            assert json.loads(line)["prompt"].encode() not in store


@pytest.mark.parametrize("command", [["show", "tiny"], ["top", "tiny"], ["ls"]])
def test_no_command_shows_a_test_score(searched: Path, command: list[str]) -> None:
    def keys(node: Any) -> set[str]:
        if isinstance(node, dict):
            return set(node) | {k for value in node.values() for k in keys(value)}
        return {k for value in node for k in keys(value)} if isinstance(node, list) else set()

    document = json.loads(evomerge_(*command, "--store", url(searched), "--json").out)
    if command[0] == "show":
        assert {t: s.pop("test") for t, s in document["tasks"].items()} == {
            "ja_list_ops": 16,
            "ja_transcription": 16,
        }  # how many items there are, and no more
        assert document["estimates"].pop("test") is None  # until it is exported
    assert not {key for key in keys(document) if "test" in key}


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """A search of 2 generations of 6, of whom 3 and then 2 go on to the next stage."""
    folder = tmp_path_factory.mktemp("staged")
    optimizer = {"name": "cma-es", "population": 6}
    staging = {"stages": [5, 9, 15], "keep": [3, 2]}
    return read(search(folder, optimizer=optimizer, staging=staging))


def subset(found: Found, generation: int, stage: int) -> list[list[int]]:
    """The examples of each candidate of a generation that took part in a stage."""
    ids = {c.id for c in found.generation(generation)}
    rows = [e for e in found.evaluations if e.candidate in ids and e.stage == stage]
    parts = [e.scores["ja_list_ops"] for e in rows if e.purpose == "train" and e.scores]
    return [part.examples.tolist() for part in parts]


@pytest.mark.parametrize("generation", [1, 2])
def test_each_stage_has_its_number_of_candidates_and_examples(
    staged: Found, generation: int
) -> None:
    stages = [subset(staged, generation, stage) for stage in range(3)]
    assert [len(rows) for rows in stages] == [6, 3, 2]
    assert [{len(row) for row in rows} for rows in stages] == [{5}, {4}, {6}]


def test_examples_are_shared_within_a_generation_and_drawn_anew_for_the_next(
    staged: Found,
) -> None:
    drawn = []
    for generation in (1, 2):
        stages = [subset(staged, generation, stage) for stage in range(3)]
        assert all(row == rows[0] for rows in stages for row in rows)
        drawn.append([x for rows in stages for x in rows[0]])
    assert all(len(set(examples)) == 15 for examples in drawn)
    assert set(drawn[0]) != set(drawn[1])
    assert not staged.examples("train") & staged.examples("monitor")


@pytest.mark.parametrize("generation", [1, 2])
def test_staged_candidates_are_told_in_the_order_of_stage_then_fitness(
    staged: Found, generation: int
) -> None:
    def standing(candidate: CandidateRow) -> tuple[int, float]:
        rows = [e for e in staged.evaluations if e.candidate == candidate.id]
        stages = [e.stage for e in rows if e.purpose == "train"]
        joined = Scores.joined([staged.scores(candidate.id, "train", s) for s in stages])
        assert candidate.fitness == joined.fitness(SHAPING)
        return max(stages), joined.fitness(SHAPING)

    candidates = staged.generation(generation)
    told = {c.id: c.told for c in sorted(candidates, key=standing) if c.told is not None}
    assert list(told.values()) == sorted(told.values())
    ended = [c for c in candidates if standing(c)[0] == 2]
    assert [c.told for c in ended] == [c.fitness for c in ended]
    assert all(c.fitness is not None and told[c.id] <= c.fitness for c in candidates)


@pytest.mark.parametrize("generation", [1, 2])
def test_the_fittest_of_a_stage_go_on(staged: Found, generation: int) -> None:
    fitness = {
        c.id: staged.scores(c.id, "train").fitness(SHAPING) for c in staged.generation(generation)
    }
    rows = [e.candidate for e in staged.evaluations if (e.purpose, e.stage) == ("train", 1)]
    went_on = set(rows) & set(fitness)
    assert went_on == set(sorted(fitness, key=lambda id: fitness[id])[-3:])


@pytest.mark.slow
def test_who_goes_on_depends_on_the_stages_before_alone(tmp_path: Path) -> None:
    optimizer = {"name": "cma-es", "population": 6}
    staging = {"stages": [5, 15], "keep": [2]}
    path = tiny.write_job(tmp_path, optimizer=optimizer, staging=staging, budget={"candidates": 6})
    database = tmp_path / "store.db"
    with Store(url(database), create=True) as store:
        landed = iter(range(100))
        setting = Setting.open(Job.from_file(path))
        with pytest.raises(Interrupted):  # after the baselines, a stage, and one more
            launch(setting, store.url, Silent(), lambda: next(landed) == 6 + 6)
        ((first,),) = query(database, "SELECT candidate_id FROM evaluation WHERE stage = 1")
        disappoint(store, first)
        resume("tiny", store, Silent(), lambda: False)
    found = read(database)
    fitness = {c.id: found.scores(c.id, "train").fitness(SHAPING) for c in found.generation(1)}
    assert first in fitness
    went_on = {e.candidate for e in found.evaluations if e.stage == 1}
    assert went_on == set(sorted(fitness, key=lambda id: fitness[id])[-2:])


def disappoint(store: Store, candidate: int) -> None:
    """Make the second stage of a candidate as bad as can be."""
    (row,) = [
        e
        for e in store.evaluations(store.search("tiny").id, ["train"])
        if (e.candidate, e.stage) == (candidate, 1)
    ]
    assert row.scores is not None
    old = row.scores["ja_list_ops"]
    worst = replace(old, scores=old.scores * 0, shaping=old.shaping * 0 - np.float32(20))
    blob = codec.pack_scores(worst)
    with store.database.write() as db:
        db.execute(
            update(schema.score)
            .where(schema.score.c.sha256 == codec.sha256(codec.pack_scores(old)))
            .values(blob=blob, sha256=codec.sha256(blob))
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("candidates", 6, "the budget of 6 candidates is spent"),
        ("example_evaluations", 100, "the budget of 100 example evaluations is spent"),
        ("hours", 1e-9, "the budget of 1e-09 hours is spent"),
    ],
)
def test_search_stops_at_the_end_of_the_generation_that_spends_the_budget(
    tmp_path: Path, limit: str, value: float, reason: str
) -> None:
    database = search(tmp_path, budget={limit: value, "candidates": 12} | {limit: value})
    said = shown(database)
    assert said["stop_reason"] == reason
    used = said["budget"][limit]
    assert used["used"] >= used["allowed"] == value
    before_the_last = {
        "candidates": used["used"] - 4,
        "example_evaluations": used["used"] - 4 * 20 - 4,
        "hours": 0,
    }
    assert before_the_last[limit] < value
    assert (said["state"], said["generations"]) == ("finished", 0 if limit == "hours" else 2)


@pytest.mark.slow
def test_random_search_has_no_mean_to_choose(tmp_path: Path) -> None:
    optimizer = {"name": "random", "population": 3}
    database = search(tmp_path, optimizer=optimizer, budget={"candidates": 6})
    found, said = read(database), shown(database)
    assert {c.label for c in found.candidates if c.generation > 0} == {None}
    fittest = sorted(found.proposed, key=lambda c: -(c.fitness or 0))[:2]
    assert [f["candidate"] for f in said["finalists"]] == [c.id for c in fittest]


@pytest.mark.slow
def test_infeasible_candidates_rank_worst_and_the_search_goes_on(tmp_path: Path) -> None:
    space = {"preset": "layer_stack", "max_layers": 6}
    optimizer = {"name": "cma-es", "population": 8}
    database = search(tmp_path, space=space, optimizer=optimizer, budget={"candidates": 16})
    found = read(database)
    infeasible = [c for c in found.proposed if c.state == "infeasible"]
    assert infeasible
    assert all("layers are more than max_layers 6" in (c.reason or "") for c in infeasible)
    scored = {e.candidate for e in found.evaluations}
    assert not scored & {c.id for c in infeasible}
    for number in (1, 2):
        told = [(c.state, c.told) for c in found.generation(number)]
        worst = {value for state, value in told if state == "infeasible" and value is not None}
        rest = [value for state, value in told if state == "scored" and value is not None]
        assert len(rest) + sum(state == "infeasible" for state, _ in told) == 8
        assert len(worst) <= 1
        assert max(worst, default=-np.inf) < min(rest)
    assert shown(database)["candidates"] == {
        "infeasible": len(infeasible),
        "scored": 16 - len(infeasible),
    }


def test_space_that_starts_outside_its_own_limits_is_refused(tmp_path: Path) -> None:
    space = {"preset": "layer_stack", "max_layers": 1}
    job, database = tiny.write_job(tmp_path, space=space), tmp_path / "store.db"
    end = evomerge_("run", job, "--store", url(database))
    assert (end.code, end.out) == (2, "")
    assert "max_layers" in end.err
    assert not database.exists()


def test_parent_whose_outputs_are_no_numbers_fails_the_search(
    models: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models["a"], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["lm_head.weight"], torch.nan)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    parents = {"broken": {"model": str(broken)}, "b": {"model": str(models["b"])}}
    job = tiny.write_job(tmp_path, parents=parents, base={"model": str(models["base"])})
    end = evomerge_("run", job, "--store", url(tmp_path / "store.db"))
    assert end.code == 1
    assert "baseline 'broken' cannot be scored: " in end.err.splitlines()[-1]
    said = shown(tmp_path / "store.db")
    assert said["state"] == "failed"
    assert "baseline 'broken' cannot be scored: " in said["stop_reason"]
