"""CMA-ES by the cma library: what the contract of optimizers does not say."""

import numpy as np
from numpy.typing import NDArray

from evomerge.optimizer.cma_es import CmaEs
from evomerge.optimizer.generations import Generations


def moved(told: str) -> NDArray[np.float64]:
    """How far the mean is from the start after these of two generations that were asked for at
    once were told, in this order."""
    start = np.full(6, 0.5)
    optimizer = Generations(CmaEs(start, 0.05, 8, seed=1, restarts=0), 6)
    asked = {"a": optimizer.ask(), "b": optimizer.ask()}
    for name in told:
        optimizer.tell(asked[name], -((asked[name] - 0.6) ** 2).sum(axis=1))
    return optimizer.mean() - start


def test_a_generation_that_was_drawn_before_the_last_update_takes_nothing_of_it_back() -> None:
    assert np.abs(moved("a") - moved("b")).max() > 0.01
    np.testing.assert_allclose(moved("ab"), moved("a") + moved("b"), atol=1e-6)
