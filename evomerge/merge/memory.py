"""How much memory is to spare, on a GPU and on the host, whatever limit the host sets us."""

from collections.abc import Iterator
from pathlib import Path

import torch

_SHARE = 0.7  # of the free memory: the rest is for activations and working memory

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")  # where Linux's distributions and containers mount them

# Of a control group's memory the limit, what is used, and what of that are file pages that give way
# to others: by the name of its controller in /proc/self/cgroup, which in version 2 has none.
_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def spare_memory(device: torch.device) -> int:
    """Bytes that parents may take: most of what is free, less what merging and scoring need."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_on_host()
    return int(free * _SHARE)


def free_on_host(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that this process may still take: of the machine's, and of what the control groups
    (v1 or v2) that it is in, such as a container's, are limited to."""
    lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) * 1024
    return max(0, min([free, *_left_in_groups(proc, cgroups)]))


def _left_in_groups(proc: Path, cgroups: Path) -> Iterator[int]:
    """What each control group that has a limit leaves."""
    table = proc / "self" / "cgroup"
    if not table.is_file():
        return
    for line in table.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in {*controllers.split(",")} & _FILES.keys():
            root = cgroups / controller
            own = root / path.lstrip("/")
            # The groups above set limits too. In a container the path may be the host's, which is
            # not there, and its own group stands at the root.
            for group in (own, *(above for above in own.parents if above.is_relative_to(root))):
                yield from _left_in(group, *_FILES[controller])


def _left_in(group: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        pages = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
    except OSError:  # it is elsewhere, or has no limits, as the root of version 2
        return
    if most != "max":
        yield int(most) - used + int(pages.get(reclaimable, 0))
