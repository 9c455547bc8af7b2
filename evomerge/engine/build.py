"""Which engine a job asks for. Whichever it is, its libraries are loaded only then."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evomerge.engine import Engine
from evomerge.job import Engine as EngineSection

if TYPE_CHECKING:
    from evomerge.merge.checkpoint import Checkpoint  # loads torch


def build(section: EngineSection, models: Mapping[str, "Checkpoint"], first: str) -> Engine:
    """The engine of a job's section, with `models` (by their names in recipes) resident.

    first: the model that gives config and tokenizer.
    """
    if section.kind == "vllm":
        from evomerge.engine.vllm import VllmEngine

        return VllmEngine(section, models, first)
    from evomerge.engine.transformers import TransformersEngine

    return TransformersEngine(section, models, first)
