"""How much memory is to spare: of the machine, and of the control groups that limit a process."""

from pathlib import Path

import pytest
import torch

from evomerge.merge import memory
from evomerge.merge.memory import free_on_host, spare_memory

GB = 10**9
FREE = 8_000_000 * 1024  # of the machine


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """What the kernel says of the machine."""
    folder = tmp_path / "proc"
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable:    8000000 kB\n")
    return folder


def limited(
    group: Path, limit: str | int, used: int, pages: int = 0, version: int = 2, other: int = 0
) -> None:
    """A control group; other: file pages that are in use."""
    group.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    most, current, inactive = names[version]
    (group / most).write_text(f"{limit}\n")
    (group / current).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\n{inactive} {pages}\nactive_file {other}\n")


def test_without_control_groups_the_machine_tells(proc: Path, tmp_path: Path) -> None:
    assert free_on_host(proc, tmp_path / "none") == FREE
    (proc / "self" / "cgroup").write_text("0::/\n")
    assert free_on_host(proc, tmp_path / "none") == FREE


def test_a_group_of_version_2_limits_what_is_free(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/pods/one\n")
    groups = tmp_path / "cgroup"
    limited(groups / "pods" / "one", 4 * GB, 3 * GB, pages=GB // 2, other=GB)
    assert free_on_host(proc, groups) == 3 * GB // 2  # file pages that nobody uses give way
    limited(groups / "pods" / "one", "max", 3 * GB)
    assert free_on_host(proc, groups) == FREE
    limited(groups / "pods", 5 * GB, 4 * GB)  # of all groups in it together
    assert free_on_host(proc, groups) == GB


def test_a_group_of_version_1_limits_what_is_free(proc: Path, tmp_path: Path) -> None:
    table = "11:cpu,cpuacct:/docker/one\n4:memory:/docker/one\n0::/docker/one\n"
    (proc / "self" / "cgroup").write_text(table)
    groups = tmp_path / "cgroup"
    limited(groups / "memory" / "docker" / "one", 4 * GB, 3 * GB, GB // 4, version=1)
    limited(groups / "memory", 9223372036854771712, 6 * GB, version=1)  # as unlimited is written
    assert free_on_host(proc, groups) == 5 * GB // 4


@pytest.mark.parametrize("version", [1, 2])
def test_inside_a_container_its_own_group_stands_at_the_root(
    proc: Path, tmp_path: Path, version: int
) -> None:
    """Whatever the path of the host's that the kernel gives."""
    line = {1: "4:memory:/docker/one\n", 2: "0::/../two\n"}[version]
    (proc / "self" / "cgroup").write_text(line)
    groups = tmp_path / "cgroup"
    limited(groups / {1: "memory", 2: ""}[version], 2 * GB, GB, version=version)
    assert free_on_host(proc, groups) == GB


def test_nothing_is_free_of_a_group_that_is_full(proc: Path, tmp_path: Path) -> None:
    (proc / "self" / "cgroup").write_text("0::/\n")
    limited(tmp_path / "cgroup", GB, GB + 4096)
    assert free_on_host(proc, tmp_path / "cgroup") == 0


def test_a_part_of_what_is_free_is_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_on_host", lambda: 1000)
    assert 500 < spare_memory(torch.device("cpu")) < 1000


def test_of_this_machine_some_is_free() -> None:
    assert 0 < free_on_host() < 10**15
