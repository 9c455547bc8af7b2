"""The sink in memory: a plan is written into the parameters of a live model, without any disk.

Parents stay resident on the device; task vectors are computed once per search. Knows nothing of
what the model computes.
"""

from collections.abc import Mapping

import torch

from evomerge.errors import ModelError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.methods import Spare
from evomerge.merge.plan import Plan, compute

Located = tuple[str, str]  # (model, tensor name)


class Resident:
    """Models held on one device. Casts and task vectors are made on first use, then kept."""

    def __init__(self, models: Mapping[str, Checkpoint], device: torch.device) -> None:
        self.spare = Spare()
        self._models = models
        self._device = device
        self._tensors: dict[tuple[str, str, torch.dtype], torch.Tensor] = {}
        self._vectors: dict[tuple[Located, Located, torch.dtype], torch.Tensor] = {}

    def tensor(self, model: str, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See plan.Inputs."""
        key = (model, name, dtype)
        if key not in self._tensors:
            value = self._models[model].tensor(name)
            self._tensors[key] = value.to(self._device, dtype, copy=True)
        return self._tensors[key]

    def task_vector(
        self, model: tuple[str, str], base: tuple[str, str], dtype: torch.dtype
    ) -> torch.Tensor:
        """See plan.Inputs."""
        key = (model, base, dtype)
        if key not in self._vectors:
            value = self._models[model[0]].tensor(model[1]).to(self._device, dtype)
            self._vectors[key] = value - self.tensor(*base, dtype)
        return self._vectors[key]

    def write(self, plan: Plan, parameters: Mapping[str, torch.Tensor]) -> None:
        """Merge into live parameters, by tensor name. Raises ModelError if names do not match.

        Values are rounded to the plan's dtype first, whatever the live dtype: they are those that
        the sink on disk would write. Live parameters that the plan lacks stay as they are.
        """
        missing = [tensor.name for tensor in plan.tensors if tensor.name not in parameters]
        if missing:
            raise ModelError(f"the live model has no tensor '{missing[0]}'")
        method = plan.recipe.merge_method
        with torch.no_grad():
            for tensor in plan.tensors:
                compute(tensor, method, self, plan.seed, out=parameters[tensor.name].data)
