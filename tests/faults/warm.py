"""Loaded by the server that processes are forked from, and by nothing else: one whole search and
its export, after which a process finds every module loaded and every statement compiled.

Torch keeps to one thread: threads do not survive a fork, and whoever waits for them waits for ever.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import tempfile
from pathlib import Path

import torch

from evomerge.search.setting import Setting
from tests import tiny
from tests.faults.driver import Dice
from tests.running import evomerge_, url

torch.set_num_threads(1)
torch.set_num_interop_threads(1)
with tempfile.TemporaryDirectory() as name:
    _folder = Path(name)
    _real = Setting.executor
    Dice()()
    evomerge_("run", tiny.write_job(_folder), "--store", url(_folder / "store.db"))
    Setting.executor = _real
    evomerge_("export", "tiny", "--store", url(_folder / "store.db"), "-o", _folder / "out")
