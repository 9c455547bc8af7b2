"""The device that computes, from the name that a user gave it."""

import torch

from evomerge.errors import InputError


def named_device(name: str, where: str) -> torch.device:
    """'cpu', 'cuda', 'cuda:1' or 'auto', which is a GPU if there is one.

    where: what the name was given as, for messages. Raises InputError for others, and for a GPU
    that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"{where}: '{name}' is no device: give cpu, cuda or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"{where}: '{name}' is not supported: give cpu, cuda or auto")
    visible = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= visible:
        seen = "no CUDA device is" if not visible else f"CUDA devices 0 to {visible - 1} are"
        raise InputError(f"{where}: '{name}': {seen} visible: give another, cpu or auto")
    return device
