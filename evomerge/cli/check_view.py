"""How the answers of `evomerge check` look: of a job, of a recipe and of a task. Knows how to draw,
not what is true."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evomerge.cli.view import grid, line, percent, prose, span, stdout

_NOTES = 8  # of what is copied or left out, and of any other long list
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}
_MODULES = ("attention", "mlp", "norms", "embeddings", "head")


def job(found: dict[str, Any], preset: str | None) -> None:
    """What a job would take, and every default; preset: what its space was written out from."""
    console = stdout()
    table = grid("model", "parameters", "layers", "sha256")
    for name, model in found["models"].items():
        table.add_row(name, f"{model['parameters']:,}", str(model["layers"]), model["sha256"][:12])
    console.print(table)
    for parent, norm in found["task_vector_norms"].items():
        console.print(f"norm of the task vector of {parent}: {100 * norm:.1f}% of the base's")
    for pair, cosine in found["cosines"].items():
        console.print(f"cosine of the task vectors of {pair}: {cosine:.3f}")
    for task, t in found["tasks"].items():
        prose(
            console,
            f"task {task}: {t['driving']} + {t['monitor']} train, {t['judging']} validation, "
            f"{t['test']} test; detectable gain: {100 * t['detectable_on_validation']:.1f} points "
            f"on validation, {100 * t['detectable_on_test']:.1f} on test",
        )
        for note in t["notes"]:
            prose(console, note)
    for worn in found["worn"]:
        prose(console, worn)
    _contamination(console, found["contamination"])
    for trouble in found["troubles"]:
        prose(console, f"of a sample: {trouble}")
    space = preset or found["job"]["space"]["kind"]
    prose(
        console,
        f"space: {space}, {found['dimensions']} coordinates; {found['population']} candidates in a "
        "generation",
    )
    for note in found["settled"]:
        prose(console, note)
    console.print(f"licence of the result: {found['licence']}")
    for text in _takes(found):
        prose(console, text)
    console.print("\nthe job, with every default:\n")
    line(yaml.safe_dump(found["job"], sort_keys=False, allow_unicode=True).rstrip())


def _takes(found: dict[str, Any]) -> Iterator[str]:
    """Workers, memory and time; of a search in this process nothing is said of workers."""
    workers, forecast = found["workers"], found["forecast"]
    count, gpus, allowed = workers["count"], workers["gpus"], workers["allowed"]
    on_ray = found["job"]["executor"]["kind"] == "ray"
    if on_ray:
        room = "" if allowed in (None, count) else f", of {allowed:,} that the job asks for"
        on = f", each on {gpus:g} GPU{'s' * (gpus > 1)}" if gpus else ", each without a GPU"
        yield f"workers: room for {count:,} at present{room}{on}"
        if found["job"]["mode"] == "synchronous" and count > found["population"]:
            yield (
                f"a generation has {found['population']:,} candidates, so that "
                f"{count - found['population']:,} of {count:,} workers will have nothing to do: "
                "raise optimizer.population, or set mode: asynchronous"
            )
    held = "models and task vectors"
    if workers["merge_ahead"]:
        held = "models, task vectors and a second live model, to merge ahead"
    each = ", of each worker" if on_ray else ""
    yield f"memory: about {_size(found['memory_bytes'])} for {held}{each}"
    busy = f" ({percent(forecast['busy'])} of the workers' time is used)" if on_ray else ""
    ahead = ", merged while another one is scored" if workers["merge_ahead"] else ""
    yield (
        f"time: about {_seconds(forecast['candidate'])} per candidate{ahead}, "
        f"{_seconds(forecast['generation'])} per generation{busy}"
    )
    limit = forecast["limit"].replace("_", " ")
    count, limit = forecast["generations"], forecast["limit"].replace("_", " ")
    generations = f"{count:,} generation{'s' * (count != 1)}"
    devices = f"; {_seconds(forecast['devices'])} of devices at work" if on_ray else ""
    yield (
        f"in all: about {_seconds(forecast['whole'])}: {generations} until the {limit} are spent, "
        f"baselines and finals{devices}"
    )


def _seconds(seconds: float) -> str:
    """Such as '0.23 s' or '2 h 05 min'."""
    return f"{seconds:.2g} s" if seconds < 9.95 else span(seconds)


def task(found: dict[str, Any]) -> None:
    """What a task asks, and of how many examples."""
    console, first = stdout(), found["first"]
    for note in found["notes"]:
        prose(console, note)
    if found["sealed"]:
        prose(console, f"what may be known of test is in {found['sealed']}")
    table = grid(found["task"], "items", "hash")
    for split, listed in found["splits"].items():
        table.add_row(split, f"{listed['items']:,}", listed["identity"][:16])
    console.print(table)
    _contamination(console, found["contamination"])
    turns = first["prompt"]
    if isinstance(turns, str):
        _section(console, "the first prompt of train", Text(turns))
    else:
        for turn in turns:
            whose = f"the first conversation of train: {turn['role']}"
            _section(console, whose, Text(turn["text"]))
    for number, choice in enumerate(first["choices"]):
        console.print(Text(f"choice {number}: {choice}"))
    _section(console, "its target", Text(first["target"]))
    if first["reference"] != first["target"]:
        _section(console, "a whole reply that is right", Text(first["reference"]))


def _contamination(console: Console, found: dict[str, Any]) -> None:
    """What splits have in common, and what of train is of a public test set."""
    for note in found["notes"]:
        console.print(Text(note, "yellow"))


def recipe(found: dict[str, Any]) -> None:
    """What a merge would be."""
    console, labels = stdout(), _labels(found["models"])
    if found["models"]:
        _section(console, "models", _models(found["models"], labels))
    _section(console, "fit", _findings(found["findings"], labels))
    geometry = found["geometry"]
    if geometry is not None:
        if geometry["norms"]:
            _section(console, "task vectors", _norms(geometry, labels))
        if geometry["cosines"]:
            what = "task vectors" if geometry["base"] is not None else "models"
            _section(console, f"cosines of the {what}", _cosines(geometry["cosines"], labels))
    if found["merge"] is not None:
        _section(console, "merge", _merge(found["merge"], labels))
    if found["output"] is not None:
        _section(console, "output", _output(found["output"]))
    if found["needs"] is not None:
        _section(console, "needs", _needs(found["needs"]))
    _section(console, "licence", _licence(found["licence"], labels))


def _section(console: Console, title: str, content: RenderableType) -> None:
    console.print(Text(title, "bold"))
    console.print(Padding(content, (0, 0, 1, 2), expand=False))


def _edgeless(*columns: str) -> Table:
    table = grid(*columns)
    table.show_edge = False
    return table


def _plain(*rows: tuple[str | Text, ...]) -> Table:
    """Columns without a head; the last one wraps."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def _labels(names: Iterable[str]) -> dict[str, str]:
    """Short names: as much of the end of each path, an adapter's too, as tells them apart."""
    halves = {name: [half.split("/") for half in name.split("+")] for name in names}
    for length in itertools.count(1):
        labels = {
            name: "+".join("/".join(path[-length:]) for path in paths)
            for name, paths in halves.items()
        }
        if len({*labels.values()}) == len(labels):
            break
    return labels


def _named(text: str, labels: dict[str, str]) -> str:
    for name, label in labels.items():
        text = text.replace(f"'{name}'", f"'{label}'")
    return text


def _size(size: int) -> str:
    if size >= 1e8:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.2f} kB"


def _depth(layers: dict[str, int]) -> str:
    """Layers, by part where there are several: '32 + 24'."""
    return " + ".join(str(count) for count in layers.values() if count) or "-"


def _models(models: dict[str, Any], labels: dict[str, str]) -> RenderableType:
    """A table, and under it where each model is."""
    table = _edgeless("model", "parameters", "layers", "dtype", "size", "vocabulary", "role")
    for name, model in models.items():
        vocabulary = "-" if model["vocabulary"] is None else f"{model['vocabulary']:,}"
        table.add_row(
            labels[name],
            f"{model['parameters']:,}",
            _depth(model["layers"]),
            model["dtype"],
            _size(model["bytes"]),
            vocabulary,
            next(iter(model["roles"]), ""),
        )
    uris = [
        (labels[name], Text(model["uri"], "dim", overflow="fold"))
        for name, model in models.items()
        if model["uri"] != labels[name]
    ]
    return Group(table, "", _plain(*uris)) if uris else table


def _findings(findings: list[dict[str, str]], labels: dict[str, str]) -> RenderableType:
    if not findings:
        return "the models fit together"
    return _plain(
        *(
            (Text(f["level"], _STYLES[f["level"]]), f["about"], Text(_named(f["text"], labels)))
            for f in findings
        )
    )


def _norms(geometry: dict[str, Any], labels: dict[str, str]) -> Table:
    """Norms as shares of the base's, of all and by kind of module."""
    modules = geometry["modules"]
    kinds = [kind for kind in _MODULES if any(kind in own for own in modules.values())]
    table = _edgeless("share of the base's norm", "all", *kinds)
    for name, norm in geometry["norms"].items():
        own = [percent(modules[name].get(kind)) for kind in kinds]
        table.add_row(labels[name], percent(norm), *own)
    return table


def _cosines(cosines: list[dict[str, Any]], labels: dict[str, str]) -> Table:
    rows = []
    for entry in cosines:
        a, b = (labels[name] for name in entry["models"])
        rows.append((f"{a}, {b}", f"{entry['cosine']:.3f}"))
    return _plain(*rows)


def _merge(merge: dict[str, Any], labels: dict[str, str]) -> Table:
    made = {**merge["methods"], "copied": merge["copied"]}
    rows: list[tuple[str | Text, ...]] = [
        (name, f"{counts['tensors']:,} tensors, {_size(counts['bytes'])}")
        for name, counts in made.items()
        if counts["tensors"]
    ]
    notes = merge["notes"]
    rows += [("note", Text(_named(note, labels))) for note in notes[:_NOTES]]
    if len(notes) > _NOTES:
        rows.append(("", f"and {len(notes) - _NOTES} more: --json lists all"))
    return _plain(*rows)


def _output(output: dict[str, Any]) -> str:
    facts = [f"{output['parameters']:,} parameters"]
    if any(output["layers"].values()):
        facts.append(f"{_depth(output['layers'])} layers")
    facts.append(output["dtype"])
    if output["vocabulary"] is not None:
        facts.append(f"vocabulary {output['vocabulary']:,}")
    files = f"{output['files']} file" + "s" * (output["files"] > 1)
    return ", ".join([*facts, f"{_size(output['bytes'])} in {files}"])


def _needs(needs: dict[str, int]) -> Table:
    return _plain(
        ("disk", f"{_size(needs['disk_bytes'])}, of {_size(needs['disk_free_bytes'])} free here"),
        ("merge", f"about {_size(needs['merge_bytes'])} of memory beyond the page cache"),
        ("merge on a GPU", f"about {_size(needs['merge_device_bytes'])} of its memory"),
        (
            "search",
            f"{_size(needs['search_bytes'])}, of a GPU or the host, if all is to stay there",
        ),
    )


def _licence(licence: dict[str, Any], labels: dict[str, str]) -> Table:
    name = licence["licence"] if licence["name"] is None else f"other: {licence['name']}"
    result = f"{name} ({licence['reason']})" + (f", {licence['link']}" if licence["link"] else "")
    rows = [("result", result)]
    rows += [(labels[model], ", ".join(stated)) for model, stated in licence["models"].items()]
    return _plain(*rows, ("", Text("from the models' cards; no legal advice", "dim")))
