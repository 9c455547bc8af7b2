"""Makes a golden store: small searches as an earlier version of evomerge left them.

Run once for each schema, with the sources of the last version that wrote it, in their root:

    git archive VERSION | tar -x -C FOLDER && cd FOLDER
    PYTHONPATH=. python .../tests/store/make_golden.py .../tests/store/golden/SCHEMA.tar.xz

001 is of a7ed35d, 002 of d86eeb5, 003 of b248ffb, 004 of 6cc9c8e, 005 of 9edfeeb. The archive
holds store.db with three searches: `finished`, exported, one candidate of which failed; `stopped`
in the middle of a generation; `failed`, all of whose proposals failed; and of the winner of
`finished` the recipe and the stored report as that version gave them.
"""

import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import evomerge.cli
from evomerge import search
from evomerge.errors import SearchFailed
from evomerge.executor import Landed, Stopped, Take, given
from evomerge.executor.inline import InlineExecutor
from evomerge.fitness.results import Failed
from evomerge.job import Job
from evomerge.search.setting import Setting
from tests import tiny

_TRAIN = 20  # examples; proposals are scored on fewer, as some are held back to watch over them

_really = InlineExecutor.evaluate


class Proposals:
    """Counts the evaluations of proposals, and lets those fail that it is told to."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        self.count = 0
        proposals = self

        def evaluate(self: InlineExecutor, take: Take) -> Iterator[Landed]:
            with suppress(Stopped):
                while (request := take()) is not None:
                    proposed = sum(map(len, request.examples.values())) < _TRAIN
                    proposals.count += request.split == "train" and proposed
                    if proposed and fails(proposals.count):
                        failed = Failed("logits that are not finite", 0.25)
                        yield Landed(request, failed, self.devices()[0].name, 1)
                    else:
                        yield from _really(self, given([request]))

        InlineExecutor.evaluate = evaluate  # a fault is injected


def launch(folder: Path, url: str, stop_at: int = 0, **changes: Any) -> None:
    """Conduct a tiny search, to its end or until so many proposals are evaluated."""
    fails = {"finished": lambda n: n == 2, "failed": lambda n: n > 0}
    proposals = Proposals(fails.get(changes["name"], lambda n: False))
    setting = Setting.open(Job.from_file(tiny.write_job(folder, **changes)))
    search.launch(setting, url, search.Silent(), lambda: proposals.count == stop_at > 0)


def run(*arguments: str | Path) -> None:
    """A command of that version."""
    sys.argv = ["evomerge", *map(str, arguments)]
    try:
        evomerge.cli.main()
    except SystemExit as end:
        if end.code:
            raise


def main(archive: Path) -> None:
    """Write the archive."""
    folder = Path.cwd() / "golden"
    store = f"sqlite:///{folder / 'store.db'}"
    tiny.write_task(folder / "task", train=_TRAIN, validation=10, test=12)
    smaller: dict[str, Any] = {
        "space": {"preset": "global_task_arithmetic"},
        "budget": {"candidates": 8},
    }
    launch(folder, store, name="finished", **smaller)
    staging = {"stages": [6, 12], "keep": [2]}
    try:
        launch(folder, store, stop_at=9, name="stopped", staging=staging, **smaller)
    except search.Interrupted:
        pass
    else:
        raise RuntimeError("the search that was to be stopped has come to its end")
    try:
        launch(folder, store, name="failed", **smaller)
    except SearchFailed:
        pass
    else:
        raise RuntimeError("the search that was to fail has come to its end")
    run("export", "finished", "-o", folder / "exported", "--store", store)
    run("export", "finished", "-o", folder / "recipe", "--recipe-only", "--store", store)
    with tarfile.open(archive, "w:xz") as written:
        written.add(folder / "store.db", "store.db")
        written.add(folder / "recipe" / "mergekit_config.yml", "recipe.yml")
        written.add(folder / "exported" / "evomerge_report.json", "report.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
