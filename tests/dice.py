"""An executor that rolls dice: whole searches in a fraction of a second, in any order."""

import json
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from evomerge.devices import Device
from evomerge.executor import Landed, Request, Stopped, Take
from evomerge.fitness.results import Evaluation, Failed, Scored, Scores
from evomerge.search.setting import Setting
from evomerge.seeds import generator
from tests import tiny


class Rolling:
    """An Executor whose scores depend on recipe and example alone; some recipes fail, as real ones
    may.

    workers: how many requests are under way at once. order: seeds which of them lands next. ahead:
    the next request is taken before the last one has landed, as by one that merges ahead.
    """

    def __init__(
        self, setting: Setting, workers: int = 1, order: int = 0, ahead: bool = False
    ) -> None:
        self._setting = setting
        self._workers = workers
        self._ahead = ahead
        self._random = generator(order, "landing")

    def evaluate(self, take: Take) -> Iterator[Landed]:
        """See Executor."""
        taken: list[Request] = []
        while True:
            with suppress(Stopped):
                while len(taken) < self._workers + self._ahead and (request := take()) is not None:
                    taken.append(request)
            if not taken:
                return
            under_way = len(taken[: self._workers])
            request = taken.pop(int(self._random.integers(under_way)))
            yield Landed(request, self._evaluated(request), "dice", 1)

    def _evaluated(self, request: Request) -> Evaluation:
        recipe = json.dumps(request.recipe.to_dict(), sort_keys=True)
        skill = generator(0, recipe.replace(str(tiny.ZOO), "")).random()
        if skill < 0.1:
            return Failed("the dice say so", 0.5)
        tasks = {}
        for task, examples in request.examples.items():
            size = self._setting.sizes[task][request.split]
            luck = generator(0, f"{request.split} of {task}").random(size)[examples]
            n = len(examples)
            right, sure = (luck < skill).astype(np.float32), -luck.astype(np.float32)
            none = np.zeros(n, bool)
            tasks[task] = Scores(examples, right, sure, none, np.full(n, 3, np.uint32), none)
        return Scored(tasks, 0.25, 0.5)

    def devices(self) -> tuple[Device, ...]:
        """See Executor."""
        return (Device("dice", 0, 0, 0, 0, 0, 0, 0),)

    def close(self) -> None:
        """It holds nothing."""
