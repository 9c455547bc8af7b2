"""A search as one page that can be sent on: a file of HTML that needs nothing but itself.

Reads the store, and the questions of train where their file is at hand. Of test it says what the
stored report of an export says, and nothing else. Every text is escaped, whoever wrote it; what is
markup already, the charts, says so by its type. Nothing but its own style sheet may be loaded by
it: a policy in the page itself refuses scripts, pictures and addresses.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

import evomerge
from evomerge.report import charts, words
from evomerge.report.candidate import Candidate, Sample, candidate, samples
from evomerge.report.caveats import caveats, opened_before
from evomerge.report.failures import failures
from evomerge.report.guard import guard
from evomerge.report.history import History, history
from evomerge.report.population import FrontPoint, Importance, front, importance
from evomerge.search import summary
from evomerge.store import SearchRow, Store, consistent

_TEMPLATES = Path(__file__).with_name("templates")
_ANSWERS = 4  # of each task
_COORDINATES = 12  # that are drawn
_FAILURES = 20  # causes that are listed
_CODE = re.compile(r"`([^`]*)`")


@consistent
def report(
    store: Store, name: str, candidate: int | None = None, *, with_answers: bool = True
) -> str:
    """A search as HTML. The same store gives the same page.

    candidate: whom it is about, by default the winner, before there is one whoever leads.
    with_answers: whether it quotes questions of train and what models replied to them. Raises
    StoreError for an unknown search or candidate, and for what is damaged.
    """
    row = store.search(name)
    shown = summary.show(store, name)
    went = history(store, name)
    subject = _Subject.of(store, row, shown, candidate)
    about, guarded = subject.about, guard(store, name)
    on_front = front(store, name)
    quoted = samples(store, name, about.member.id) if with_answers and about is not None else ()
    answers = _few_of_each_task(quoted)
    style = _style()
    text = _template().render(
        row=row,
        shown=shown,
        went=went,
        subject=subject,
        guarded=guarded,
        front=on_front,
        models=store.models(row.id),
        weights=summary.task_weights(store, row),
        last_at=store.latest_evaluation(row.id)[0],
        failures=failures(store, name)[:_FAILURES],
        answers=answers,
        with_answers=with_answers,
        estimate_words=summary.ESTIMATES,
        limit_words=words.LIMITS,
        dash=words.NONE,
        drawn=_Drawn.of(went, importance(store, name)[:_COORDINATES], on_front, about),
        style=Markup(style),  # files of this package
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        version=evomerge.__version__,
    )
    return text.encode(errors="replace").decode()  # half of a character is none


@dataclass(frozen=True)
class _Subject:
    """Whom a page is about. about: None before anyone was scored. winner: whether a gate has judged
    it. best_parent: its row of summary.show, with its name; None before parents are scored.
    estimates: by the names of summary.ESTIMATES. claim: the stored report; None while its test
    result is sealed. caveats: of that. opened_before: for how many recipes, when it was read."""

    about: Candidate | None
    winner: bool
    best_parent: tuple[str, Mapping[str, Any]] | None
    estimates: Mapping[str, Any]
    claim: Mapping[str, Any] | None
    caveats: Sequence[str]
    opened_before: int

    @classmethod
    def of(
        cls, store: Store, row: SearchRow, shown: Mapping[str, Any], chosen: int | None
    ) -> "_Subject":
        best = None if shown["best"] is None else shown["best"]["candidate"]
        id = best if chosen is None else chosen
        stored = None if id is None else store.report(id)
        claim = None if stored is None else json.loads(stored)
        estimates = (shown["estimates"] if id == best else claim and claim["estimates"]) or {}
        return cls(
            None if id is None else candidate(store, row.name, id),
            row.verdict is not None and id == row.verdict["winner"],
            _best_parent(shown, claim),
            estimates,
            claim,
            [] if claim is None else caveats(claim),
            0 if claim is None else opened_before(claim),
        )


def _best_parent(
    shown: Mapping[str, Any], claim: Mapping[str, Any] | None
) -> tuple[str, Mapping[str, Any]] | None:
    """As the verdict, or a report, has fixed it; before that the best on train so far."""
    scored = {name: one for name, one in shown["parents"].items() if one["score"]["train"]}
    for name, one in scored.items():
        if one["candidate"] == shown["best_parent"] or (claim and claim["best_parent"] == name):
            return name, one
    return max(scored.items(), key=lambda at: at[1]["score"]["train"]["value"], default=None)


def _few_of_each_task(found: Sequence[Sample]) -> list[Sample]:
    """The first, not the best."""
    return [
        sample
        for _, together in groupby(found, key=lambda sample: sample.task)
        for sample in islice(together, _ANSWERS)
    ]


@dataclass(frozen=True)
class _Drawn:
    """The drawings; None of what there is nothing to draw. fronts: the first objective against each
    other one."""

    budget: Markup
    fitness: Markup | None
    gap: Markup | None
    step_size: Markup | None
    importance: Markup | None
    fronts: Sequence[Markup]
    gains: Markup | None
    coefficients: Markup | None
    path: Markup | None

    @classmethod
    def of(
        cls,
        went: History,
        mattered: Sequence[Importance],
        on_front: Sequence[FrontPoint],
        about: Candidate | None,
    ) -> "_Drawn":
        proposed = [point for point in went.points if point.kind == "proposed"]
        across, *others = on_front[0].values if on_front else [""]
        gains = about.comparisons if about else ()
        weighed = about.coefficients if about else None
        path = about.path if about else None
        return cls(
            budget=charts.budget(went.budget),
            fitness=charts.fitness(went) if proposed else None,
            gap=charts.gap(went) if any(p.gap is not None for p in proposed) else None,
            step_size=charts.step_size(went) if any(p.step_size for p in proposed) else None,
            importance=charts.importance(mattered) if mattered else None,
            fronts=[charts.front(on_front, across, up) for up in others],
            gains=charts.intervals(gains) if gains else None,
            coefficients=None if weighed is None else charts.heatmap(weighed),
            path=charts.path(path) if path else None,
        )


@cache
def _style() -> str:
    """Of the page and of its charts."""
    return f"{(_TEMPLATES / 'report.css').read_text()}{charts.STYLE.read_text()}"


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update({**words.FILTERS, "coded": _coded})
    return environment.get_template("report.html")


def _coded(text: str) -> Markup:
    """What stands between backquotes, as code."""
    parts = _CODE.split(text)
    marked = (
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )
    return Markup("").join(marked)
