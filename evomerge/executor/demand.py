"""What a worker is given: the resources that it asks a cluster for, and its environment."""

import os

from evomerge.errors import JobError
from evomerge.executor.shares import Amounts
from evomerge.job import Engine as EngineSection
from evomerge.job import Executor as ExecutorSection

# What a worker sees of this process's environment. Not by way of Ray's runtime environments, which
# are logged and shown by its dashboard: there is a token among them.
_FOLDERS = ("EVOMERGE_CACHE", "EVOMERGE_DATA")
_PASSED_ON = (
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "OMP_NUM_THREADS",
    "VLLM_LOGGING_LEVEL",
)


def demanded(section: ExecutorSection, engine: EngineSection, has: Amounts) -> Amounts:
    """What each worker asks for, in a cluster that has this. Raises JobError for a device that is
    not the worker's to choose."""
    if engine.device not in ("auto", "cpu", "cuda"):
        raise JobError(
            f"engine.device: '{engine.device}': on Ray each worker is given its GPUs: give cuda, "
            "cpu or auto"
        )
    gpus = section.gpus
    if gpus == "auto":
        wanted = engine.device == "cuda" or (engine.device == "auto" and has.get("GPU", 0) > 0)
        gpus = engine.tensor_parallel if wanted else 0
    cpus = section.cpus
    if cpus == "auto":
        cpus = 1 if gpus or engine.threads == "auto" else engine.threads
    amounts = {"CPU": cpus, "GPU": gpus, **section.resources}
    return {name: amount for name, amount in amounts.items() if amount}


def settled(engine: EngineSection, demand: Amounts) -> EngineSection:
    """The engine section of a worker that asks for this: device auto is a GPU where it is given
    one, and never one that it only happens to see."""
    if engine.device != "auto":
        return engine
    return engine.model_copy(update={"device": "cuda" if "GPU" in demand else "cpu"})


def spelt(amounts: Amounts) -> str:
    """For people: '2 CPU, 0.5 GPU'."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items()) or "nothing"


def environment(engine: EngineSection) -> dict[str, str]:
    """What a worker's process is given of this one's environment. Folders are absolute: it works in
    another one."""
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    folders = {
        name: os.path.abspath(os.path.expanduser(os.environ[name]))
        for name in _FOLDERS
        if os.environ.get(name)
    }
    return {"OMP_NUM_THREADS": str(engine.threads)} | passed | folders
