"""How results look, on stdout. Knows how to draw, not what is true."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from evomerge.errors import InputError
from evomerge.messages import one_line

_SHOWN = 12  # candidates of a front
_WIDTH = 100  # of results where stdout is no terminal


def answer(found: Any, as_json: bool, render: Callable[[Any], None]) -> None:
    """A result, as a document or drawn."""
    if as_json:
        document(found)
    else:
        render(found)


def line(text: str) -> None:
    """One plain line on stdout."""
    sys.stdout.write(text + "\n")


def document(found: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """JSON Lines, one for each record. Raises InputError where the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise InputError(f"'{path}' cannot be written: {one_line(error)}") from None


def stdout() -> Console:
    """What draws results."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)


def percent(value: float | None) -> str:
    """Such as '51.6%'; '-' for None."""
    return "-" if value is None else f"{100 * value:.1f}%"


def span(seconds: float | None) -> str:
    """Such as '1 min 05 s'; '-' for None."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def prose(console: Console, text: str, hang: int = 0) -> None:
    """Words, in lines of the console's width, all but the first indented by `hang`. A path that is
    longer stays in one piece."""
    lines = wrap(
        text,
        console.width,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
    console.print("\n".join(lines), soft_wrap=True, markup=False)


def grid(*columns: str, title: str | None = None) -> Table:
    """An empty table in the style of all of them: names on the left, numbers on the right."""
    table = Table(
        box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def constraint(kept: dict[str, Any]) -> str:
    """Of a job, such as 'en_list_ops not below base by more than 1.0 points'."""
    least = f" by more than {100 * kept['drop']:.1f} points" if kept["drop"] else ""
    return f"{kept['task']} not below {kept['of']}{least}"


def ls(rows: list[dict[str, Any]]) -> None:
    """A table of searches."""
    table = grid("search", "state", "generations", "candidates", "train, shrunk", "spent")
    for row in rows:
        table.add_row(
            row["name"],
            row["state"],
            str(row["generations"]),
            f"{row['candidates']:,}",
            percent(row["shrunk"]),
            span(3600 * row["hours"]),
        )
    stdout().print(table)


def tokens(rows: list[dict[str, Any]]) -> None:
    """A table of tokens; times to the minute, UTC."""
    table = grid("token", "scopes", "state", "made", "expires", "last used")
    for row in rows:
        times = (row[key] for key in ("created_at", "expires_at", "used_at"))
        shown = ("-" if at is None else at[:16].replace("T", " ") for at in times)
        table.add_row(row["name"], ", ".join(row["scopes"]), row["state"], *shown)
    stdout().print(table)


def top(rows: list[dict[str, Any]]) -> None:
    """A table of candidates."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["scores"]))
    cells: dict[str, list[str]] = {
        "candidate": [
            str(row["id"]) + (f" {row['label']}" if row["label"] else "") for row in rows
        ],
        "generation": [str(row["generation"]) for row in rows],
        "slot": [str(row["slot"]) for row in rows],
        "state": [row["state"] for row in rows],
        "train fitness": [
            "-" if row["fitness"] is None else f"{row['fitness']:.4f}" for row in rows
        ],
        "n": [f"{row['n']:,}" for row in rows],
        **{task: [percent(row["scores"].get(task)) for row in rows] for task in tasks},
        "recipe": [(row["recipe_sha"] or "-")[:12] for row in rows],
    }
    console, table = stdout(), _columnwise(cells)
    for column in ("slot", "recipe", "state"):  # no score is to be cut
        options = console.options.update(max_width=10 * console.width)
        if console.measure(table, options=options).maximum > console.width:
            del cells[column]
            table = _columnwise(cells)
    console.print(table)
    prose(console, "scores of train, whose best flatter: `evomerge show` says what is left of them")
    if any(row["fitness"] is not None and row["fitness"] < 0 for row in rows):
        prose(console, "fitness below 0: a score of 0 with a little log-likelihood (shaping)")


def _columnwise(cells: dict[str, list[str]]) -> Table:
    table = grid(*cells)
    for values in zip(*cells.values(), strict=True):
        table.add_row(*values)
    return table


def show(found: dict[str, Any]) -> None:
    """How a search stands: scores with intervals, what is spent, what is claimed."""
    console = stdout()
    console.print(
        f"search {found['name']}: {found['state']}, {found['generations']} generations by "
        f"{found['optimizer']}"
    )
    if found["stop_reason"]:
        prose(console, f"stopped because {found['stop_reason']}")
    _scores(console, found)
    if found["objective"] not in ("mean", "pareto"):
        console.print(
            f"the search climbs '{found['objective']}'; the scores above are weighted means"
        )
    _by_task(console, found)
    if found["front"]:
        _front(console, found)
    for kept in found["constraints"] or ():
        console.print(f"constraint: {constraint(kept)}")
    if found["violation"]:
        console.print(f"the winner breaks it by {100 * found['violation']:.1f} points on train")
    _spent(console, found)
    looks = found["looks"]
    console.print(f"looks at validation: {looks['used']} of {looks['allowed']}")
    for later in found["more_looks"]:
        prose(console, _later(later))
    if found["gap"]:
        gap, error = 100 * found["gap"]["gap"], 100 * found["gap"]["standard_error"]
        console.print(f"gap, train minus monitor slice: {gap:+.1f} points (SE {error:.1f})")
    if found["estimates"]:
        console.print(_estimates(found["estimates"]))
    if found["promoted"] is not None:
        _verdict(console, found)
    shared = (found["contamination"] or {}).get("notes", ())
    seal = _seal(found["unsealed_by"].get(found["name"], 0))
    for text in (*shared, seal, *(worn["text"] for worn in found["worn"])):
        prose(console, text)


def _spent(console: Console, found: dict[str, Any]) -> None:
    """Of the budget, and where the time went."""
    for name, spent in found["budget"].items():
        is_time = name in ("hours", "gpu_hours")
        show_it = (lambda hours: span(3600 * hours)) if is_time else "{:,}".format
        allowed = "" if spent["allowed"] is None else f" of {show_it(spent['allowed'])}"
        words = {"hours": "time", "gpu_hours": "time of devices"}.get(name, name.replace("_", " "))
        console.print(f"{words}: {show_it(spent['used'])}{allowed}")
    if found["seconds_left"] is not None:
        resumed = "" if found["state"] == "running" else ", once it is resumed"
        console.print(
            f"time left, at the pace so far: about {span(found['seconds_left'])}{resumed}"
        )
    for text in _time(found["devices"], found["time"]):
        prose(console, text)


def _time(devices: list[dict[str, Any]], time: dict[str, Any]) -> Iterator[str]:
    """Where the time went; of one device in one line."""
    if time["candidate_median"] is None:
        return
    median, longest = time["candidate_median"], time["candidate_longest"]
    each = f"{median:.3g} s a candidate (median; longest {longest:.3g} s)"
    if not time["held"]:
        yield each
        return
    busy = f"{percent(time['busy'])} busy"
    if len(devices) == 1:
        yield f"one device, {busy}; {each}"
        return
    hosts = len({device["name"].rpartition("/")[0] for device in devices})
    on = "one host" if hosts == 1 else f"{hosts} hosts"
    worst = min(devices, key=lambda device: (device["held"] == 0, device["busy"] or 0.0))
    host, _, device = worst["name"].rpartition("/")
    least = f"{device} of host {host}" if host else device
    yield f"{len(devices)} devices on {on}, {busy}; least busy: {least}, {percent(worst['busy'])}"
    words = {
        "scoring": "scoring",
        "merging": "merging",
        "opening": "opening models",
        "lost": "lost to failures",
        "idle": "idle",
    }
    parts = (f"{percent(time[key] / time['held'])} {word}" for key, word in words.items())
    yield f"their time: {', '.join(parts)}"
    if time["waited"] is not None:
        each += f"; waited {time['waited']:.3g} s for a device on average"
    yield each


def _estimates(estimates: dict[str, Any]) -> Table:
    """Everything that is known of how good one candidate is."""
    from evomerge.search.summary import ESTIMATES

    table = grid("how good it is", "score", "95% interval")
    for key, words in ESTIMATES.items():
        value, interval = None, ""
        if key not in estimates:  # of a verdict that an older evomerge stored
            continue
        if estimates[key] is not None:
            value = estimates[key]["value"]
            interval = _interval(estimates[key]["interval"])
        table.add_row(words, percent(value), interval)
    return table


def _interval(interval: list[float] | None) -> str:
    """Such as '48.1 to 55.0'; reviews that an older evomerge stored have none."""
    if interval is None:
        return ""
    low, high = interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def _later(looks: dict[str, Any]) -> str:
    """Looks that were asked for after the launch."""
    opened = ", after test had been opened" if looks["opened"] else ""
    return (
        f"post hoc: {looks['allowed']} looks instead of {looks['before']} since "
        f"{looks['at'][:16]}{opened}: what is chosen by them is no longer what was announced"
    )


def _scores(console: Console, found: dict[str, Any]) -> None:
    table = grid("", "train, raw", "95% interval", "n", "validation", "95% interval", "n")
    for name, row in [*found["parents"].items(), *found["baselines"].items()]:
        mark = ", best parent" if row["candidate"] == found["best_parent"] else ""
        table.add_row(name + mark, *_measured(row))
    winner = found["best"]
    for row in found["finalists"]:
        if row["candidate"] != winner["candidate"]:
            table.add_row(_named(row), *_measured(row))
    if winner:
        table.add_row(f"* {_named(winner)}", *_measured(winner), style="bold")
        table.caption = "* the winner" if found["promoted"] is not None else "* the best so far"
        table.caption_justify = "left"
    console.print(table)


def _by_task(console: Console, found: dict[str, Any]) -> None:
    """Train scores, task by task, of the source models and the best candidate, each with what
    makes it less than it seems."""
    rows = dict(found["parents"])
    if found["best"]:
        rows[f"* {_named(found['best'])}"] = found["best"]
    written = any(score["tokens"] for row in rows.values() for score in row["train"].values())
    if len(found["tasks"]) > 1 or written:
        table = grid("train, by task", *found["tasks"])
        for name, row in rows.items():
            table.add_row(name, *(_on_task(row["train"].get(task)) for task in found["tasks"]))
        if written:
            table.caption = "(of the answers, cut off by the token limit; tokens of an answer)"
            table.caption_justify = "left"
        console.print(table)
    for name, row in rows.items():
        for task, score in row["train"].items():
            for key, words in (
                ("overlong", "do not fit into the context and score 0"),
                ("failed", "have a reply that cannot be graded and counts 0"),
            ):
                if score[key]:
                    of = f"{score[key]:,} of {score['n']:,} examples of '{task}'"
                    prose(console, f"{name}: {of} {words}")


def _on_task(score: dict[str, Any] | None) -> str:
    """Such as '61.3% (2.0%, 87)'."""
    if score is None:
        return "-"
    of_replies = f" ({percent(score['truncated'])}, {score['tokens']:.0f})"
    return percent(score["score"]) + (of_replies if score["tokens"] else "")


def _front(console: Console, found: dict[str, Any]) -> None:
    """What no other candidate beats in everything, by the first objective, after the baselines."""
    table = grid("on the front", *found["objectives"])

    def add(name: str, objectives: list[float], style: str | None = None) -> None:
        values = zip(found["objectives"], objectives, strict=True)
        table.add_row(name, *(_objective(*pair) for pair in values), style=style)

    for name, row in [*found["parents"].items(), *found["baselines"].items()]:
        if row["objectives"]:
            add(f"for comparison: {name}", row["objectives"], "dim")
    for row in sorted(found["front"], key=lambda row: row["objectives"], reverse=True)[:_SHOWN]:
        add(f"candidate {row['candidate']}", row["objectives"])
    console.print(table)
    more = len(found["front"]) - _SHOWN
    rest = f"; {more} more on the front: --json lists all" if more > 0 else ""
    console.print(f"hypervolume above the worst of the baselines: {found['hypervolume']:.4g}{rest}")


def _objective(name: str, value: float) -> str:
    """Of what is kept small the value itself, which is stored negated."""
    return percent(value) if name == "score" or name.startswith("task:") else f"{-value:,.4g}"


def _named(row: dict[str, Any]) -> str:
    return "mean of the distribution" if row["label"] == "mean" else f"candidate {row['candidate']}"


def _measured(row: dict[str, Any]) -> tuple[str, ...]:
    """Weighted score, interval and number of examples, on train, then on validation."""
    cells: list[str] = []
    for split in ("train", "validation"):
        score = row["score"][split]
        if score is None:
            cells += ["-", "", ""]
        else:
            cells += [percent(score["value"]), _interval(score["interval"]), f"{score['n']:,}"]
    return tuple(cells)


def _verdict(console: Console, found: dict[str, Any]) -> None:
    gain = found["validation_gain"]
    low, high = gain["interval"]
    prose(
        console,
        f"gain over the best parent on validation: {100 * gain['value']:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}, p = {gain['p_value']:.2g}): "
        + _promotion(found["promoted"], gain["value"], high),
    )


def _promotion(promoted: bool, gain: float, high: float) -> str:
    if promoted:
        return "promoted"
    if gain > 0:
        return "not promoted: it may be luck"
    return f"not promoted: {'worse' if high < 0 else 'no better'} than the best parent"


def _seal(opened_for: int) -> str:
    """Of the test splits, by this search itself; what others have opened is their wear."""
    if not opened_for:
        return "test: sealed until `evomerge export`"
    return f"test: opened for {opened_for:,} recipe{'s' if opened_for > 1 else ''} of this search"


def report(found: dict[str, Any], out: Path) -> None:
    """What an export found out, then where it is."""
    from evomerge.report.caveats import caveats

    console, claim, looks = stdout(), found["claim"], found["looks"]
    table = grid("test split", "score", "95% interval", "n")
    for name, estimate in (
        ("exported model", found["estimates"]["test"]),
        (f"best parent: {found['best_parent']}", found["best_parent_test"]),
    ):
        table.add_row(
            name,
            percent(estimate["value"]),
            _interval(estimate["interval"]),
            f"{claim['n']:,}",
        )
    console.print(table)
    low, high = claim["interval"]
    prose(
        console,
        f"gain over the best parent: {100 * claim['gain']:+.1f} points "
        f"({100 * low:+.1f} to {100 * high:+.1f}, p = {claim['p_value']:.2g}); {_judged(found)}",
    )
    console.print(_estimates(found["estimates"]))
    console.print(f"candidates tried: {found['candidates_tried']:,}")
    console.print(f"looks at validation: {looks['used']} of {looks['allowed']}")
    for caveat in caveats(found):
        prose(console, caveat)
    line(str(out))


def _judged(found: dict[str, Any]) -> str:
    if not found["winner"]:
        return "chosen by hand: no gate judged it"
    return "promoted on validation" if found["promoted"] else "not promoted on validation"


def evaluation(found: dict[str, Any]) -> None:
    """The score of one model."""
    notes = [f"SE {100 * found['standard_error']:.1f}", f"n {found['n']:,}"]
    if found["tokens"] is not None:
        notes.append(f"{found['tokens']:.0f} tokens an answer")
        notes.append(f"{percent(found['truncated'])} cut off by the token limit")
    score = f"{found['task']} {found['split']}: {percent(found['score'])}"
    prose(stdout(), f"{score} ({', '.join(notes)})")
    for trouble in found["troubles"]:
        prose(stdout(), trouble)
