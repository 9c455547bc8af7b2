"""A search that goes the whole way that a user's would: launched, brought to its end, exported
with its one reading of test. Knows nothing of what is measured by it."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.export.export import export
from evomerge.job import Job
from evomerge.progress import Steps
from evomerge.search import Silent, launch
from evomerge.search.setting import Setting
from evomerge.store import Store


@dataclass(frozen=True)
class Conducted:
    """setting, url: of the search and its store. test: score of the export. seconds: CPU time of
    the search."""

    setting: Setting
    url: str
    test: float
    seconds: float


def conducted(job: Mapping[str, Any], folder: Path) -> Conducted:
    """Conduct a job, given as plain data, with its store and its export in a folder."""
    path = folder / "job.yaml"
    path.write_text(json.dumps(job))  # JSON is YAML
    setting = Setting.open(Job.from_file(path))
    url = f"sqlite:///{folder}/store.db"
    started = time.process_time()
    launch(setting, url, Silent(), lambda: False)
    seconds = time.process_time() - started
    with Store(url) as store:
        steps = Steps(lambda text: None, lambda written, total: None)
        report = export(store, setting.job.name, folder / "out", None, steps)
    return Conducted(setting, url, report["estimates"]["test"]["value"], seconds)
