"""Workers that share GPUs: Ray counts their shares, here on a node that only claims to have any."""

import os
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from evomerge.executor.ray import RayExecutor
from evomerge.executor.spec import Opening
from evomerge.executor.worker import Worker
from evomerge.job import Job
from evomerge.search import Silent, launch
from evomerge.search.setting import Setting
from evomerge.store import Store
from tests import tiny
from tests.clusters import (
    OBJECTS,
    Misbehaving,
    Nodes,
    eventually,
    giving,
    misbehaving,
    requests,
    section,
)
from tests.running import url

pytestmark = pytest.mark.ray

SHARED = [f"{socket.gethostname()}/gpu {n}" for n in ("0", "0 (2)", "1", "1 (2)")]


@pytest.fixture(scope="module", autouse=True)
def two(nodes: Nodes) -> Iterator[None]:
    """A node that claims to have two GPUs."""
    node = nodes.cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=OBJECTS)
    yield
    nodes.cluster.remove_node(node)


@dataclass(frozen=True)
class Looking(Misbehaving):
    """A spec whose workers write down which GPUs their processes may see."""

    def opening(self) -> Opening[Worker]:
        """See WorkerSpec."""
        (Path(self.folder) / f"{os.getpid()}.sees").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        return (yield from super().opening())


def test_each_of_four_workers_sees_the_gpu_that_it_shares_and_a_fifth_waits(tmp_path: Path) -> None:
    spec = Looking(**vars(misbehaving(tmp_path)))
    with closing(RayExecutor(section(workers=5, gpus=0.5), spec)) as pool:

        def sees() -> list[str]:
            assert len(list(pool.evaluate(giving(requests(8))))) == 8
            return sorted(path.read_text() for path in tmp_path.glob("*.sees"))

        assert eventually(lambda: sees() == ["0", "0", "1", "1"])
        assert sorted(device.name for device in pool.devices()) == SHARED
        assert {device.gpus for device in pool.devices()} == {0.5}
        assert pool.workers().count == 4


def test_a_search_is_charged_for_its_share_of_gpus(models: dict[str, Path], tmp_path: Path) -> None:
    job = tiny.write_job(
        tmp_path,
        parents={name: {"model": str(models[name])} for name in ("a", "b")},
        base={"model": str(models["base"])},
        executor={"kind": "ray", "workers": 2, "cpus": 0.5, "gpus": 0.5},
        budget={"candidates": 4},
    )
    launch(Setting.open(Job.from_file(job)), url(tmp_path / "store.db"), Silent(), lambda: False)
    with Store(url(tmp_path / "store.db")) as store:
        (search,) = store.searches()
        devices = store.devices(search.id)
        purposes = ("train", "monitor", "full", "validation")
        found = store.evaluations(search.id, purposes, with_scores=False)
        charged = store.device_seconds(search.id)
    assert devices
    assert {device.name for device in devices} <= {*SHARED}
    assert {device.gpus for device in devices} == {0.5}
    made = [evaluation for evaluation in found if evaluation.copied_from is None]
    assert {evaluation.gpus for evaluation in made} == {0.5}
    landed = Counter(evaluation.device for evaluation in made)
    assert landed == {device.name: device.evaluations for device in devices if device.evaluations}
    busy = sum(device.merging + device.scoring for device in devices)
    assert charged == pytest.approx(0.5 * busy)
    assert charged == pytest.approx(0.5 * sum(evaluation.seconds for evaluation in made))
