"""Batches: what runs together, and what happens when memory runs out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.engine.batches import Batches, Row
from evomerge.errors import ModelError

CPU = torch.device("cpu")


def size(tokens: int, outputs: int) -> float:
    return tokens + 10 * outputs


class Device:
    """What runs batches, in so much memory; remembers which it was given."""

    def __init__(self, rows: list[Row], room: float, kept: int = 0) -> None:
        self.rows = rows
        self.room = room
        self.kept = kept
        self.ran: list[list[int]] = []
        self.failed = 0

    def run(self, batch: list[int]) -> list[str]:
        rows = [self.rows[i] for i in batch]
        takes = len(rows) * size(max(r.tokens for r in rows), max(r.outputs for r in rows))
        if takes + self.kept > self.room:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.ran.append(batch)
        return [f"result {i}" for i in batch]

    def forget(self) -> bool:
        held, self.kept = self.kept > 0, 0
        return held


some_rows = st.lists(
    st.builds(Row, st.integers(1, 50), st.integers(1, 5), st.sampled_from([0, 8])), max_size=30
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(some_rows, st.integers(100, 2000), st.none() | st.integers(1, 8))
def test_every_row_runs_once_in_what_memory_there_is(
    rows: list[Row], room: int, most: int | None
) -> None:
    device = Device(rows, room)
    batches = Batches(CPU, most, lambda: size, device.forget)
    assert batches.run(rows, device.run) == [f"result {i}" for i in range(len(rows))]
    assert sorted(i for batch in device.ran for i in batch) == list(range(len(rows)))
    for batch in device.ran:
        assert len({rows[i].written for i in batch}) == 1
        assert most is None or len(batch) <= most
        assert [rows[i].tokens for i in batch] == sorted(rows[i].tokens for i in batch)[::-1]
    ran, device.failed = device.ran, 0
    device.ran = []
    batches.run(rows, device.run)
    assert device.failed == 0  # what did not fit is remembered
    assert len(device.ran) >= len(ran)


def test_one_batch_is_enough_where_there_is_room() -> None:
    rows = [Row(tokens, 1) for tokens in range(1, 400)]
    device = Device(rows, float("inf"))
    Batches(CPU, None, lambda: size, device.forget).run(rows, device.run)
    assert len(device.ran) == 1


def test_what_can_be_done_without_is_freed_before_batches_are_halved() -> None:
    rows = [Row(10, 1)] * 8
    device = Device(rows, room=170, kept=100)
    Batches(CPU, None, lambda: size, device.forget).run(rows, device.run)
    assert [len(batch) for batch in device.ran] == [8]
    assert device.failed == 1


def test_a_row_that_does_not_fit_alone_is_said_with_a_remedy() -> None:
    rows = [Row(10, 1), Row(90, 1), Row(10, 1)]
    device = Device(rows, room=50)
    with pytest.raises(ModelError, match=r"90 tokens do not fit .* cpu .*: lower") as raised:
        Batches(CPU, None, lambda: size, device.forget).run(rows, device.run)
    assert "\n" not in str(raised.value)


def test_memory_that_the_cpu_lacks_counts_too_and_other_errors_do_not() -> None:
    rows = [Row(10, 1)] * 2

    def huge(batch: list[int]) -> list[int]:
        if len(batch) > 1:
            torch.empty(1 << 60, dtype=torch.uint8)
        return batch

    assert Batches(CPU, None, lambda: size, lambda: False).run(rows, huge) == [0, 1]

    def odd(batch: list[int]) -> list[int]:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        Batches(CPU, None, lambda: size, lambda: False).run(rows, odd)
