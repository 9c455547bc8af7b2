"""What candidates are evaluated on. Knows nothing of how."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Device:
    """What a worker runs on, and where its time went, in seconds.

    name: for people, unique within an executor, such as 'node-3/gpu 0'; it stays when a worker is
    replaced on the same device. gpus: of each worker, 0 on a CPU; a fraction where several share
    one. held: how long it has been this executor's. opening: models and tasks were opened. merging,
    scoring: of evaluations that landed. lost: of evaluations that came to no end. What is left of
    `held` it was idle. evaluations: how many landed.
    """

    name: str
    gpus: float
    held: float
    opening: float
    merging: float
    scoring: float
    lost: float
    evaluations: int


# What of a device adds up over the time that it is held.
ADDED = tuple(field.name for field in fields(Device) if field.name not in ("name", "gpus"))
