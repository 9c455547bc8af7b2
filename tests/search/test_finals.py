"""The finals: who gets there, what is said of the winner, what becomes of those that break."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.imagined import TASK, World, imagined, searched, train_scores
from benchmarks.landscape import Landscape
from evomerge.coordinates import start_of
from evomerge.devices import Device
from evomerge.errors import LooksSpent, SearchFailed
from evomerge.executor import Executor, Landed, Request, Take
from evomerge.fitness.results import Evaluation, Failed, Scored
from evomerge.guard import review
from evomerge.guard.estimates import Estimate, paired_gain, promoted, score_estimate
from evomerge.guard.selection import Tried, bbc_cv
from evomerge.job import Job
from evomerge.merge.disk import RECIPE
from evomerge.search import Silent, launch, resume
from evomerge.search.finals import decide
from evomerge.search.looks import reserve
from evomerge.search.loop import Run
from evomerge.search.setting import Setting, versions
from evomerge.seeds import generator
from evomerge.store import Coordinator, Store
from tests import tiny
from tests.dice import Rolling
from tests.running import query, url


class Breaking:
    """An executor whose merges break for some requests: injects the fault, does the rest."""

    def __init__(self, inner: Executor, breaks: str, labels: set[int]) -> None:
        self._inner, self._split, self.broken = inner, breaks, labels

    def evaluate(self, take: Take) -> Iterator[Landed]:
        for landed in self._inner.evaluate(take):
            request = landed.request
            breaks = request.candidate in self.broken and request.split == self._split
            broken = replace(landed, evaluation=Failed("broken by the test"))
            yield broken if breaks else landed

    def devices(self) -> tuple[Device, ...]:
        return self._inner.devices()

    def close(self) -> None:
        self._inner.close()


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_finalist_that_breaks_is_passed_over(
    tmp_path: Path, split: str, all_of_them: bool
) -> None:
    setting = Setting.open(Job.from_file(tiny.write_job(tmp_path, budget={"candidates": 4})))
    store = Store(url(tmp_path / "store.db"), create=True)
    held = Coordinator.launch(
        store, "tiny", 0, setting.document(), versions(), setting.new_models(), setting.new_splits()
    )
    executor = Breaking(setting.executor(), split, set())
    with store, held as coordinator:
        run = Run(setting, coordinator, executor, Silent(), lambda: False)
        run.score_baselines()
        optimizer = run.optimize()
        mean = max(m.id for m in run.record.proposed) + 1
        executor.broken |= {mean}
        if all_of_them:
            executor.broken |= {m.id for m in run.record.proposed}
            with pytest.raises(SearchFailed, match="there is no winner"):
                decide(run, optimizer)
            return
        verdict = decide(run, optimizer)
        assert run.record.members[2][0].id == mean
        assert mean not in verdict["finalists"]
        assert verdict["winner"] in verdict["finalists"]
    executor.close()


@pytest.mark.slow
def test_looks_from_outside_leave_fewer_finalists(tmp_path: Path) -> None:
    """Of three looks one is given away, and no more: the other two are the finals'."""
    setting = Setting.open(Job.from_file(tiny.write_job(tmp_path, budget={"candidates": 4})))
    store_url = url(tmp_path / "store.db")
    store = Store(store_url, create=True)
    held = Coordinator.launch(
        store, "tiny", 0, setting.document(), versions(), setting.new_models(), setting.new_splits()
    )
    executor = setting.executor()
    with store:
        with held as coordinator:
            run = Run(setting, coordinator, executor, Silent(), lambda: False)
            run.score_baselines()
            run.optimize()
            worst = sorted(run.record.proposed, key=lambda m: run.record.rank(m.id))[:2]
            for member in worst:
                (tmp_path / member.name).mkdir()
                text = run.record.recipe(member).to_yaml()
                (tmp_path / member.name / RECIPE).write_text(text, encoding="utf-8")
        folders = [str(tmp_path / member.name) for member in worst]
        task = setting.tasks["ja_list_ops"]
        assert reserve(store_url, folders[0], task) == ["tiny"]
        with pytest.raises(LooksSpent, match="needs 2 of them"):
            reserve(store_url, folders[1], task)
        resume("tiny", store, Silent(), lambda: False, ["budget.candidates=8"])  # not yet too late
        verdict = store.search("tiny").verdict
    executor.close()
    assert verdict is not None
    assert len(verdict["finalists"]) == 1
    assert worst[0].id not in verdict["finalists"]


def test_a_failure_that_landed_before_a_crash_is_copied_after_it(tmp_path: Path) -> None:
    """As it would have been without the crash: equal recipes are not tried twice."""
    setting = Setting.open(Job.from_file(tiny.write_job(tmp_path)))
    store = Store(url(tmp_path / "store.db"), create=True)
    held = Coordinator.launch(
        store, "tiny", 0, setting.document(), versions(), setting.new_models(), setting.new_splits()
    )
    executor = setting.executor()
    with store, held as coordinator:
        record = Run(setting, coordinator, executor, Silent(), lambda: False).record
        start = start_of(setting.space.coordinates)
        twins = record.open(1, "proposed", None, [record.proposal(i, start) for i in range(3)])
        record.add(twins[0].id, "train", 0, Failed("broken by the test", 1.0))
        coordinator.flush()
        resumed = Run(setting, coordinator, executor, Silent(), lambda: False)
        found = resumed.evaluate(resumed.record.members[1], "train", setting.driving)
        reasons = [e.reason for e in found.values() if isinstance(e, Failed)]
        assert reasons == ["broken by the test"] * 3
        coordinator.flush()
        rows = store.evaluations(coordinator.search.id, ["train"])
        assert [row.copied_from for row in rows] == [None, twins[0].id, twins[0].id]
    executor.close()


@pytest.mark.slow
def test_finalists_are_the_mean_and_the_best_shrunk_and_all_of_train_comes_before_any_look(
    tmp_path: Path,
) -> None:
    world = World(3, None, {"train": 75, "validation": 40, "test": 4})
    staging = {"stages": [6, 12, 40], "keep": [8, 5]}
    setting = imagined(
        tmp_path, world, budget={"candidates": 26}, staging=staging, guard={"validation_looks": 4}
    )
    searched(setting, url(tmp_path / "store.db"))
    with Store(url(tmp_path / "store.db")) as store:
        row = store.search(setting.job.name)
        verdict, candidates = row.verdict or {}, store.candidates(row.id)
        driving = train_scores(store, row.id)
        tried = Tried()
        for c in candidates:
            if c.label is None:
                tried.add(str(c.id), {TASK: driving[c.id]}, {TASK: 1.0})
    shrunk = tried.shrunk()

    def rank(id: str) -> tuple[float, int, float]:
        return shrunk[id], len(driving[int(id)]), driving[int(id)].mean

    best = sorted(shrunk, key=rank, reverse=True)[:2]
    mean = next(c.id for c in candidates if c.label == "mean")
    assert verdict["finalists"] == [mean, *map(int, best)]
    assert [len(driving[int(id)]) for id in best] == [40, 40]
    order = [
        purpose
        for (purpose,) in query(tmp_path / "store.db", "SELECT purpose FROM evaluation ORDER BY id")
        if purpose in ("full", "validation")
    ]
    assert order == ["full"] * (order.count("full")) + ["validation"] * 4


@pytest.mark.parametrize("staged", [False, True])
def test_a_verdicts_estimates_are_what_they_say(tmp_path: Path, staged: bool) -> None:
    world = World(5, None, {"train": 50, "validation": 30, "test": 4})
    changes = {"staging": {"stages": [5, 10, 20], "keep": [8, 5]}} if staged else {}
    setting = imagined(tmp_path, world, budget={"candidates": 26}, **changes)
    searched(setting, url(tmp_path / "store.db"))
    with Store(url(tmp_path / "store.db")) as store:
        row = store.search(setting.job.name)
        verdict, candidates = row.verdict or {}, {c.id: c for c in store.candidates(row.id)}
        driving, full, looked = (
            {e.candidate: e.scores[TASK] for e in store.evaluations(row.id, (purpose,)) if e.scores}
            for purpose in ("train", "full", "validation")
        )
        driving = train_scores(store, row.id)
    winner, finalists, weights = verdict["winner"], verdict["finalists"], {TASK: 1.0}
    said = {
        name: Estimate(e["value"], tuple(e["interval"])) for name, e in verdict["estimates"].items()
    }
    assert said["raw_train"] == score_estimate({TASK: full[winner]}, weights)
    assert said["validation"] == score_estimate({TASK: looked[winner]}, weights)
    if candidates[winner].label == "mean":
        assert said["shrunk"] == said["raw_train"]
    else:
        tried = Tried()
        for id, scores in driving.items():
            tried.add(str(id), {TASK: scores}, weights)
        assert said["shrunk"] == tried.reconsidered(str(winner), {TASK: full[winner]}, weights)

    random = generator(world.seed, "verdict")
    ours, theirs = ({TASK: looked[id]} for id in (winner, verdict["best_parent"]))
    gain = paired_gain(ours, theirs, weights, random)
    assert verdict["validation_gain"]["value"] == gain.estimate.value
    assert verdict["promoted"] == promoted(gain, 0.05, 5)
    if staged:  # what made a finalist of it is left out
        matrix = np.stack([full[id].scores for id in finalists])
        for values, id in zip(matrix, finalists, strict=True):
            if id in driving:
                values[driving[id].examples] = np.nan
    else:
        matrix = np.stack([driving[id].scores for id in driving])
    assert said["bbc_cv"] == bbc_cv({TASK: matrix}, weights, random)
    on_validation = np.stack([looked[id].scores for id in finalists])
    assert said["validation_bbc"] == bbc_cv({TASK: on_validation}, weights, random)
    assert said["validation_bbc"].value <= said["validation"].value + 0.1


def test_an_imagined_search_is_the_same_in_any_folder(tmp_path: Path) -> None:
    """Figures over such searches have fixed seeds."""
    verdicts = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        world = World(7, Landscape.draw(7), {"train": 40, "validation": 30, "test": 4})
        setting = imagined(tmp_path / name, world, budget={"candidates": 13})
        searched(setting, url(tmp_path / name / "store.db"))
        with Store(url(tmp_path / name / "store.db")) as store:
            verdicts.append(store.search(setting.job.name).verdict)
    assert verdicts[0] == verdicts[1]


def test_groups_of_validation_are_kept_together_by_the_gate(tmp_path: Path) -> None:
    """The same search over a task whose questions belong together in tens."""
    p_values = []
    groups = np.arange(100, dtype=np.int64) // 10
    for name, found in (("alone", None), ("grouped", groups)):
        folder = tmp_path / name
        folder.mkdir()
        world = World(7, Landscape.draw(7), {"train": 40, "validation": 100, "test": 4})
        setting = imagined(folder, world, budget={"candidates": 13})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setting.tasks[TASK], "groups", {"validation": found}.get)
            searched(setting, url(folder / "store.db"))
        with Store(url(folder / "store.db")) as store:
            verdict = store.search(setting.job.name).verdict or {}
        p_values.append(verdict["validation_gain"]["p_value"])
    assert p_values[0] != p_values[1]
    coins = p_values[1] * 2**10  # ten of them
    assert coins == pytest.approx(round(coins), abs=1e-6)


def test_a_warning_of_the_gap_is_said_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Listening(Silent):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    monkeypatch.setattr(review, "_ALARM", -1e9)
    setting = imagined(
        tmp_path,
        World(1, None, {"train": 30, "validation": 10, "test": 4}),
        budget={"candidates": 26},
    )
    watcher = Listening()
    launch(setting, url(tmp_path / "store.db"), watcher, lambda: False)
    said = [text for text in watcher.notes if "by heart" in text]
    assert len(said) == 1
    events = query(tmp_path / "store.db", "SELECT text FROM event WHERE kind = 'gap'")
    assert events == [(said[0],)]


def test_a_warning_of_the_gap_is_in_the_log_as_soon_as_its_generation_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(review, "_ALARM", -1e9)
    monkeypatch.setattr(Coordinator, "save_devices", killed)
    world = World(1, None, {"train": 30, "validation": 10, "test": 4})
    setting = imagined(tmp_path, world, budget={"candidates": 26})
    with pytest.raises(KeyboardInterrupt):
        launch(setting, url(tmp_path / "store.db"), Silent(), lambda: False)
    told = "SELECT COUNT(*) FROM generation WHERE kind = 'proposed' AND told_at IS NOT NULL"
    assert query(tmp_path / "store.db", told) == [(1,)]
    warned = "SELECT COUNT(*) FROM event WHERE kind = 'gap'"
    assert query(tmp_path / "store.db", warned) == [(1,)]


class Equal(Rolling):
    """On validation all are wrong, and the worse ones of train the surer of what is right."""

    def _evaluated(self, request: Request) -> Evaluation:
        found = super()._evaluated(request)
        if request.split != "validation" or isinstance(found, Failed):
            return found
        on_train = super()._evaluated(replace(request, split="train", examples=self._setting.train))
        assert isinstance(on_train, Scored)
        tasks = {
            task: replace(
                scores,
                scores=np.zeros_like(scores.scores),
                shaping=np.full_like(scores.shaping, -on_train.tasks[task].mean),
            )
            for task, scores in found.tasks.items()
        }
        return replace(found, tasks=tasks)


def test_finalists_of_equal_validation_are_told_apart_by_their_shrunk_train_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setting, "executor", lambda setting: Equal(setting))
    optimizer, guard = {"name": "random", "population": 8}, {"validation_looks": 5}
    written = tiny.write_job(
        tmp_path, optimizer=optimizer, budget={"candidates": 32}, guard=guard, shaping=0.1
    )
    path = tmp_path / "store.db"
    launch(Setting.open(Job.from_file(written)), url(path), Silent(), lambda: False)
    with Store(url(path)) as store:
        row = store.search("tiny")
        verdict = row.verdict or {}
        means = store.means(row.id, "full", verdict["finalists"])
    on_train = {id: mean.mean for id, found in means.items() for mean in found.values()}
    assert min(on_train.values()) < on_train[verdict["winner"]] == max(on_train.values())
    ((said,),) = query(path, "SELECT text FROM event WHERE kind = 'tie'")
    assert said.startswith("validation says the same of candidate ")
    assert f": candidate {verdict['winner']} wins by its " in said
