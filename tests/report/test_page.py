"""A search as one page: it says what the store says, loads nothing, and takes nobody's word."""

import base64
import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.errors import StoreError
from evomerge.report import page, words
from evomerge.report.candidate import candidate
from evomerge.report.failures import failures
from evomerge.report.guard import guard
from evomerge.report.history import history
from evomerge.search import summary
from evomerge.store import Coordinator, NewCandidate, NewSplit, Store, upgrade
from tests.golden import SCHEMAS, golden, quiet
from tests.report.reading import Element, parsed
from tests.running import query, url

HOSTILE = """</pre></style></title><script>alert("x")</script>'<img src=x onerror=alert(1)>&lt;"""


def of(store: Path, name: str = "tiny", **options: Any) -> Element:
    with Store(url(store)) as opened:
        return parsed(page.report(opened, name, **options))


def shown(store: Path, name: str = "tiny") -> dict[str, Any]:
    with Store(url(store)) as opened:
        return summary.show(opened, name)


def changed(store: Path, folder: Path, *statements: str) -> Path:
    """A copy of a store in which these were carried out."""
    copy = folder / "store.db"
    shutil.copyfile(store, copy)
    with closing(sqlite3.connect(copy)) as connection, connection:
        for statement in statements:
            connection.execute(statement)
    return copy


def verdict(found: Element) -> str:
    (box,) = (one for one in found.all("div") if "verdict" in one.attributes.get("class", ""))
    return box.text


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the first schema, brought up to date."""
    found = golden(SCHEMAS[0], tmp_path_factory.mktemp("oldest"))
    upgrade(found.url, quiet)
    return found.store


@pytest.fixture(
    scope="module", params=["raced", "stacked", "spoken", "finished", "stopped", "failed"]
)
def any_page(request: pytest.FixtureRequest) -> Element:
    """Of every kind of search that there is."""
    if request.param in ("raced", "stacked", "spoken"):
        return of(request.getfixturevalue(request.param))
    return of(request.getfixturevalue("oldest"), request.param)


class TestIsOneFile:
    """That is safe to open, wherever it came from."""

    def test_nothing_is_loaded_and_nothing_runs(self, any_page: Element) -> None:
        for element in any_page.all():
            assert element.tag not in {"script", "link", "img", "iframe", "object", "form", "base"}
            for key, value in element.attributes.items():
                assert not key.startswith("on")
                assert key not in {"src", "srcset", "action", "style", "data"}
                assert key != "href" or value.startswith("#")
        (style,) = any_page.all("style")
        assert not any(word in style.raw for word in ("url(", "@import", "<"))

    def test_its_policy_allows_its_own_style_and_nothing_else(self, any_page: Element) -> None:
        (style,) = any_page.all("style")
        digest = base64.b64encode(hashlib.sha256(style.raw.encode()).digest()).decode()
        (policy,) = (
            meta.attributes["content"]
            for meta in any_page.all("meta")
            if meta.attributes.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy == (
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        )

    def test_it_can_be_found_one_s_way_in_without_looking(self, any_page: Element) -> None:
        levels = [int(heading.tag[1]) for heading in any_page.all("h1", "h2", "h3", "h4")]
        assert levels.count(1) == 1
        assert all(below - above <= 1 for above, below in pairwise(levels))
        ids = [one.attributes["id"] for one in any_page.all() if "id" in one.attributes]
        assert len(ids) == len(set(ids))
        for element in any_page.all("a", "section"):
            to = element.attributes.get("href", "#").removeprefix("#")
            assert (to or element.attributes.get("aria-labelledby")) in ids
        for table in any_page.all("table"):
            assert next(table.all("caption")).text
            assert all(head.attributes["scope"] in ("col", "row") for head in table.all("th"))
            (head,), rows = table.all("thead"), next(table.all("tbody")).all("tr")
            columns = len(list(head.all("th")))
            assert all(len(list(row.all("th", "td"))) == columns for row in rows)
        for drawing in any_page.all("svg"):
            assert drawing.attributes["role"] == "img"
            assert drawing.attributes["aria-label"]

    def test_nothing_is_left_unsaid_in_python_s_words(self, any_page: Element) -> None:
        (main,) = any_page.all("main")
        assert not {"None", "nan", "inf", "Undefined"} & {*main.text.replace(",", " ").split()}

    def test_the_same_store_gives_the_same_page(self, raced: Path) -> None:
        with Store(url(raced)) as store:
            assert page.report(store, "tiny") == page.report(store, "tiny")


class TestNumbers:
    """Are those of the functions that everyone else asks."""

    @pytest.fixture(params=["raced", "spoken"])
    def store(self, request: pytest.FixtureRequest) -> Path:
        found: Path = request.getfixturevalue(request.param)
        return found

    @pytest.mark.slow
    def test_estimates_go_from_the_most_flattering_to_test(self, store: Path) -> None:
        estimates = shown(store)["estimates"]
        assert of(store).table("How good") == [
            [
                meaning,
                "sealed" if key == "test" else words.percent(estimates[key]["value"]),
                "" if key == "test" else words.interval(estimates[key]["interval"]),
            ]
            for key, meaning in summary.ESTIMATES.items()
        ]

    @pytest.mark.slow
    def test_comparisons_are_paired_with_each_parent(self, store: Path) -> None:
        with Store(url(store)) as opened:
            best = summary.show(opened, "tiny")["best"]["candidate"]
            expected = candidate(opened, "tiny", best)
        found = of(store)
        assert found.table("Gain over each parent") == [
            [
                *(one.parent, one.split, words.percent(one.ours), words.percent(one.theirs)),
                *(words.points(one.gain), words.gain_interval(one.interval)),
                *(words.p_value(one.p_value), words.number(one.n)),
            ]
            for one in expected.comparisons
        ]
        assert [row[:4] for row in found.table("By task")] == [
            [one.task, one.split, words.percent(one.score), words.interval(one.interval)]
            for one in expected.tasks
        ]
        (recipe,) = (p for p in found.all("pre") if p.attributes["aria-label"] == "Recipe")
        assert recipe.raw == expected.recipe

    def test_generations_are_those_of_the_history(self, store: Path) -> None:
        with Store(url(store)) as opened:
            expected = history(opened, "tiny")
        assert of(store).table("Generations") == [
            [
                *(str(p.generation), p.kind, words.percent(p.best)),
                *(words.interval(p.best_interval), words.percent(p.raw_best)),
                *(words.percent(p.mean), words.percent(p.monitor), words.points(p.gap)),
                *(words.number(p.step_size), str(p.candidates), str(p.failed)),
                words.number(p.examples),
            ]
            for p in expected.points
        ]

    def test_models_and_splits_have_their_hashes(self, store: Path) -> None:
        found = of(store)
        with Store(url(store)) as opened:
            models = opened.models(opened.search("tiny").id)
            splits = guard(opened, "tiny").splits
        assert found.table("Models") == [
            [name, model["uri"], model["sha256"]] for name, model in models.items()
        ]
        assert found.table("Splits") == [
            [one.task, one.split, str(one.n), one.identity, one.content] for one in splits
        ]
        for task, *cells in found.table("Tasks"):
            sizes = shown(store)["tasks"][task]
            assert cells[1:] == [str(sizes[key]) for key in ("train", "validation", "test")]

    def test_parents_baselines_and_finalists_are_scored_as_show_says(self, store: Path) -> None:
        rows = {row[0].split(" ")[0]: row for row in of(store).table("Parents, baselines")}
        for name, one in shown(store)["parents"].items():
            score = one["score"]["train"]
            assert rows[name][1:4] == [
                words.percent(score["value"]),
                words.interval(score["interval"]),
                words.number(score["n"]),
            ]
        assert len(of(store).table("Looks at validation")) == shown(store)["looks"]["used"]

    def test_failures_are_by_cause(self, raced: Path) -> None:
        with Store(url(raced)) as opened:
            expected = failures(opened, "tiny")
        assert [row[:3] for row in of(raced).table("Failures")] == [
            [str(one.count), one.kind, one.cause] for one in expected
        ]
        assert expected


class TestVerdict:
    """In plain words."""

    def test_a_winner_is_promoted_or_not_by_its_gain_on_validation(self, raced: Path) -> None:
        found, said = shown(raced), verdict(of(raced))
        gain = found["validation_gain"]
        assert said.startswith("Promoted." if found["promoted"] else "Not promoted.")
        assert f"candidate {found['best']['candidate']}" in said
        assert f"{words.points(gain['value'])} points (95% interval " in said
        assert f"{words.gain_interval(gain['interval'])}; {words.p_value(gain['p_value'])}" in said
        assert "Test is still sealed." in said

    @pytest.mark.parametrize(
        ("gain", "interval", "word"),
        [
            (0.02, [-0.01, 0.05], "may be luck"),
            (-0.01, [-0.03, 0.02], "no better than"),
            (-0.2, [-0.3, -0.1], "worse than"),
        ],
    )
    def test_who_is_not_promoted_hears_why(
        self, raced: Path, tmp_path: Path, gain: float, interval: list[float], word: str
    ) -> None:
        (stored,) = query(raced, "SELECT verdict FROM search")[0]
        document = json.loads(stored) | {"promoted": False}
        document["validation_gain"] |= {"value": gain, "interval": interval, "p_value": 0.4}
        changed_verdict = json.dumps(document).replace("'", "''")
        store = changed(raced, tmp_path, f"UPDATE search SET verdict = '{changed_verdict}'")
        said = verdict(of(store))
        assert said.startswith("Not promoted.")
        assert word in said
        assert f"{words.points(gain)} points" in said

    def test_a_candidate_chosen_by_hand_was_judged_by_no_gate(self, raced: Path) -> None:
        other = shown(raced)["finalists"][0]["candidate"]
        winner = shown(raced)["best"]["candidate"]
        other = other if other != winner else shown(raced)["finalists"][1]["candidate"]
        said = verdict(of(raced, candidate=other))
        assert said.startswith("Chosen by hand.")
        assert f"candidate {other}" in said
        assert f"the winner of the search is candidate {winner}" in said

    @pytest.mark.slow
    def test_searches_of_earlier_versions_end_in_words_too(self, old: Path) -> None:
        assert verdict(of(old, "finished")).startswith(("Promoted.", "Not promoted."))
        stopped = verdict(of(old, "stopped"))
        assert stopped.startswith("Not decided. The search was stopped")
        assert stopped.endswith("but not unread: others have opened it.")  # `finished` has
        failed = verdict(of(old, "failed"))
        assert failed.startswith("Failed.")
        assert "logits that are not finite" in failed

    def test_alerts_are_at_the_top(self, raced: Path, tmp_path: Path) -> None:
        (id,) = query(raced, "SELECT id FROM search")[0]
        store = changed(
            raced,
            tmp_path,
            "INSERT INTO event (search_id, at, kind, text) VALUES "
            f"({id}, '2026-01-02T03:04:05+00:00', 'gap', 'learned by heart')",
        )
        alerts = [one.text for one in of(store).all("p") if one.attributes.get("class") == "alert"]
        assert "Gap: learned by heart (2026-01-02 03:04)" in alerts


class TestSeal:
    """What was read of test is what a stored report says, and nothing before."""

    @pytest.fixture
    def store(self, exported: Path) -> Path:
        return exported.parent / "store.db"

    @pytest.fixture
    def report(self, exported: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((exported / "evomerge_report.json").read_text())
        return found

    def test_the_claim_is_that_of_the_stored_report(
        self, store: Path, report: dict[str, Any]
    ) -> None:
        found, claim = of(store), report["claim"]
        said = verdict(found)
        assert f"over {report['best_parent']} is {words.points(claim['gain'])} points (95%" in said
        assert (
            f"{words.gain_interval(claim['interval'])}; {words.p_value(claim['p_value'])}" in said
        )
        test = report["estimates"]["test"]
        assert found.table("How good")[-1] == [
            *("test", words.percent(test["value"]), words.interval(test["interval"])),
        ]
        of_test = {row[0]: row for row in found.table("By task") if row[1] == "test"}
        for task, one in report["test_scores"].items():
            assert of_test[task][2] == words.percent(one["exported"])
            assert of_test[task][4] == words.percent(one["best_parent"])
        openings = found.table("Who opened the seal")
        assert {row[1] for row in openings} == {*report["seal"]}
        assert {row[3] for row in openings} == {str(report["candidate"])}

    def test_an_export_that_broke_off_leaves_an_opened_seal_and_no_score(
        self, store: Path, report: dict[str, Any], tmp_path: Path
    ) -> None:
        broken = changed(store, tmp_path, "DELETE FROM export")
        found = of(broken)
        assert "The test split was opened for it, and the export did not come" in verdict(found)
        assert found.table("How good")[-1] == ["test", "sealed", ""]
        assert {row[1] for row in found.table("By task")} == {"train", "validation"}

    def test_another_candidate_s_export_says_nothing_of_the_winner(
        self, store: Path, tmp_path: Path
    ) -> None:
        finalists = shown(store)["finalists"]
        other = next(
            one["candidate"]
            for one in finalists
            if one["candidate"] != shown(store)["best"]["candidate"]
        )
        found = of(store, candidate=other)
        assert "it was opened for other candidates of this search" in verdict(found)
        assert {row[1] for row in found.table("By task")} <= {"train", "validation"}

    def test_the_page_of_an_export_folder_is_the_report_without_answers(
        self, exported: Path, store: Path, report: dict[str, Any]
    ) -> None:
        text = (exported / "report.html").read_text(encoding="utf-8")
        assert report["winner"]
        with Store(url(store)) as opened:
            assert text == page.report(opened, "tiny", with_answers=False)


class TestText:
    """Whatever others wrote is shown as what it is."""

    @pytest.fixture
    def hostile(self, spoken: Path, tmp_path: Path) -> Element:
        quoted = HOSTILE.replace("'", "''")
        return of(
            changed(
                spoken,
                tmp_path,
                f"UPDATE sample SET reply = '{quoted}'",
                f"UPDATE model SET revision = '{quoted}'",
                f"UPDATE search SET stop_reason = '{quoted}'",
            )
        )

    def test_hostile_names_and_replies_are_text(self, hostile: Element) -> None:
        assert not list(hostile.all("script", "img"))
        assert all(model[1].endswith(f" revision {HOSTILE}") for model in hostile.table("Models"))
        replies = [
            p.raw.strip() for p in hostile.all("pre") if "eply" in p.attributes["aria-label"]
        ]
        assert replies
        assert {*replies} == {HOSTILE}
        assert f"It ended because {HOSTILE}." in hostile.text

    @pytest.mark.slow
    def test_answers_stand_beside_those_of_the_parents(self, spoken: Path) -> None:
        found = of(spoken)
        (answers,) = (o for o in found.all("ol") if o.attributes.get("class") == "answers")
        (first, *_) = answers.all("li")
        labels = [pre.attributes["aria-label"] for pre in first.all("pre")]
        assert labels[:3] == ["Question", "Target", "Its reply"]
        assert {*labels[3:]} == {"Reply of ops", "Reply of ja", "Reply of base"}
        assert len(list(answers.all("li"))) == 4

    def test_questions_and_answers_can_be_left_out(self, spoken: Path) -> None:
        replies = {
            reply for (reply,) in query(spoken, "SELECT reply FROM sample") if len(reply) > 4
        }
        found = of(spoken, with_answers=False)
        assert not any(one.text == "Sample answers" for one in found.all("h2"))
        assert not {pre.raw.strip() for pre in found.all("pre")} & replies

    def test_a_report_s_caveats_show_code_as_code(self) -> None:
        found = page._coded("split of `<b>` was <i>")
        assert found == "split of <code>&lt;b&gt;</code> was &lt;i&gt;"


def test_several_objectives_have_a_front_and_layers_a_path(stacked: Path) -> None:
    found = of(stacked)
    drawings = [one.attributes["aria-label"] for one in found.all("svg")]
    assert any(one.startswith("Front of score and layers") for one in drawings)
    assert any(one.startswith("Path through the layers") for one in drawings)
    rows = found.table("Front and baselines")
    assert {row[1] for row in rows} == {"yes", "no"}
    assert all(0 < float(row[3]) < 20 for row in rows)  # layers, as they are, not negated


class TestOfASearchThatHasHardlyBegun:
    """There is something to say from the first moment on."""

    @pytest.fixture
    def held(self, tmp_path: Path) -> Iterator[Coordinator]:
        job = {
            "name": "new",
            "parents": {"a": {"model": "/a"}, "b": {"model": "/b"}},
            "space": {"kind": "weight", "method": "linear"},
            "tasks": [{"task": "t", "weight": 1.0}],
            "objective": "mean",
            "optimizer": {"name": "cma-es"},
            "budget": {"candidates": 100},
            "guard": {"validation_looks": 3, "monitor": 0.2},
        }
        store = Store(url(tmp_path / "store.db"), create=True)
        splits = [NewSplit("t", of, of, of, ["x"]) for of in ("train", "validation", "test")]
        with Coordinator.launch(store, "new", 0, job, {}, [], splits) as held:
            yield held

    def test_before_anything_was_scored(self, held: Coordinator) -> None:
        found = parsed(page.report(held.store, "new"))
        assert verdict(found) == (
            "Not decided yet. The search is running, and nothing was scored. Test is still sealed."
        )
        for said in (
            "No parent was scored yet.",
            "No generation was proposed yet.",
            "There is none yet.",
            "No candidate has failed.",
        ):
            assert said in found.text
        assert [row[2:] for row in found.table("Tasks")] == [["1", "1", "1"]]

    def test_while_parents_are_scored(self, held: Coordinator) -> None:
        held.open_generation(0, "baselines", None, [NewCandidate(0, "a", None, {}, "a")])
        (row,) = parsed(page.report(held.store, "new")).table("Parents, baselines")
        assert row == ["a parent", "–", "", "–", "–", "", "–"]

    def test_while_candidates_are_open(self, held: Coordinator) -> None:
        held.open_generation(0, "baselines", None, [NewCandidate(0, "a", None, {}, "a")])
        held.open_generation(1, "proposed", 0.1, [NewCandidate(0, None, np.zeros(1), {}, "x")])
        found = parsed(page.report(held.store, "new"))
        assert [row[:3] for row in found.table("Generations")] == [
            ["0", "baselines", "–"],
            ["1", "proposed", "–"],
        ]


def test_an_unknown_search_or_candidate_is_refused(raced: Path) -> None:
    with pytest.raises(StoreError, match="no search 'tny'"):
        of(raced, "tny")
    with pytest.raises(StoreError, match="no candidate 99999"):
        of(raced, candidate=99999)
