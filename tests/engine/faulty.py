"""A worker of vLLM's that can be made to take no weights, as vLLM itself once did in silence."""

from collections.abc import Iterable
from typing import Any

from evomerge.engine.vllm_worker import MergeWorker


class FaultyWorker(MergeWorker):
    """See above."""

    def ignore_swaps(self, times: int) -> None:
        """The next so many swaps do nothing."""
        swap = self.reload_weights  # of the class it is mixed into
        left = times

        def ignoring(weights_iterator: Iterable[Any]) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                swap(weights_iterator=weights_iterator)
            else:
                list(weights_iterator)

        self.reload_weights = ignoring
