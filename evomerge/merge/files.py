"""The inputs of a merge, read from the models' files at every use; nothing is kept.

Knows nothing of where the results go.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.methods import drawn
from evomerge.merge.operand import Operand, Read
from evomerge.merge.plan import Input, TensorPlan
from evomerge.merge.vocabulary import aligned


class FromFiles:
    """See plan.Inputs. Values move to the device span by span."""

    def __init__(
        self,
        models: Mapping[str, Checkpoint],
        device: torch.device = torch.device("cpu"),  # noqa: B008  # immutable
    ) -> None:
        self._models = models
        self._device = device

    def operand(self, source: Input, plan: TensorPlan) -> Operand:
        """See plan.Inputs. Reading raises ModelError where a value is no number."""
        return Operand(self._read(source, plan), plan.shape, plan.compute_dtype, self._device)

    def task_vector(self, source: Input, base: Operand, plan: TensorPlan) -> Operand:
        """See plan.Inputs."""
        return self.operand(source, plan).minus(base)

    def draws(self, seed: int, plan: TensorPlan) -> Read:
        """See plan.Inputs."""
        read = drawn(seed)
        return lambda i, j: read(i, j).to(self._device)

    def _read(self, source: Input, plan: TensorPlan) -> Read:
        read = self._checked(source.model, source.name)
        if source.rows is None:
            return read
        owners = {model: self._checked(model, name) for model, name in source.owners}
        width = plan.numel // max(1, plan.shape[0])
        return aligned(source.rows, owners, width, plan.compute_dtype)

    def _checked(self, model: str, name: str) -> Read:
        read = self._models[model].values(name)

        def checked(start: int, stop: int) -> Tensor:
            try:
                values = read(start, stop)
            except OSError as error:
                raise ModelError(
                    f"tensor '{name}' of '{model}' cannot be read: {error.strerror or error}"
                ) from error
            is_sum = values.is_floating_point() and values.itemsize > 1  # a code has no sum
            if is_sum and not math.isfinite(values.sum().item()):
                _check_numbers(values, model, name, start)
            return values

        return checked


def _check_numbers(values: Tensor, model: str, name: str, start: int) -> None:
    wrong = values.isnan().nonzero()
    if len(wrong):
        raise ModelError(
            f"tensor '{name}' of '{model}' holds NaN (value {start + int(wrong[0])}): "
            "the model is damaged, copy or train it again"
        )
