"""What a search over models of full size needs, from their shapes alone; nothing is measured.

    python -m benchmarks.sizing [--gpus 24,80] [--update-docs]

Plans a merge by task arithmetic, in bfloat16, of models that are names and shapes without values,
and adds up what the plan reads, holds and writes: by the formula of `evomerge check`, and by the
rules by which a worker finds a place for its parents.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from benchmarks.models import Shape, outline
from benchmarks.report import Report, arguments, published
from evomerge.errors import InputError
from evomerge.merge.checkpoint import Checkpoint
from evomerge.merge.plan import Plan
from evomerge.merge.planner import make_plan
from evomerge.merge.preflight import search_bytes
from evomerge.recipe import Recipe

NAME = "bench-sizing"
DOCUMENTS = ("docs/operations.md",)
PARENTS = (2, 3, 4)
MODELS = {
    "1.1B (TinyLlama)": Shape(2048, 5632, 22, 32, 4, 32000),
    "3.4B (OpenLLaMA)": Shape(3200, 8640, 26, 32, 32, 32000),
    "6.7B (Llama 2)": Shape(4096, 11008, 32, 32, 32, 32000),
    "13B (Llama 2)": Shape(5120, 13824, 40, 40, 40, 32000),
    "69B (Llama 2)": Shape(8192, 28672, 80, 64, 8, 32000),
}
TO_SPARE = 0.7  # of what the live model leaves: what parents may take, as merge.memory has it


@dataclass(frozen=True)
class Placed:
    """Where a worker on a GPU finds room for what a merge reads, in bytes: on the GPU, in pinned
    memory of the host, as torch allocates it. None where the live model alone does not fit."""

    gpu: int
    host: int


@dataclass(frozen=True)
class Needs:
    """Of one search, in bytes.

    live: the model that is merged into. at_hand: parents and base, all of them in memory. moved: by
    each merge, each of them read once and the live model written once. whole: the smallest GPU that
    holds all; ahead: and a second live model. placed: by the size of a GPU in GB.
    """

    model: str
    parameters: int
    parents: int
    live: int
    at_hand: int
    moved: int
    whole: int
    ahead: int
    placed: dict[int, Placed | None]


def needs(name: str, shape: Shape, parents: int, gpus: Sequence[int]) -> Needs:
    """Of models of this shape."""
    names = ("base", *(f"parent {number}" for number in range(1, parents + 1)))
    plan = task_arithmetic({each: outline(each, shape, torch.bfloat16) for each in names})
    live, whole = plan.bytes, search_bytes(plan)
    held = whole - live
    all_on_it = live + int(held / TO_SPARE)
    return Needs(
        name,
        shape.parameters,
        parents,
        live,
        at_hand=held,
        moved=held + live,
        whole=all_on_it,
        ahead=max(all_on_it, live + held + int(live / TO_SPARE)),
        placed={gpu: place(plan, gpu * 10**9) for gpu in gpus},
    )


def task_arithmetic(models: dict[str, Checkpoint]) -> Plan:
    """Of a base, which comes first, and parents."""
    base, *parents = models
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": base,
        "models": [{"model": parent, "parameters": {"weight": 0.5}} for parent in parents],
        "dtype": "bfloat16",
    }
    return make_plan(Recipe.from_dict(recipe), models)


def place(plan: Plan, memory: int) -> Placed | None:
    """See Placed. memory: of the GPU, in bytes."""
    if plan.bytes > memory:
        return None
    room = int((memory - plan.bytes) * TO_SPARE)
    gpu = host = 0
    for size in _read(plan):
        if gpu + size <= room:
            gpu += size
        else:
            host += 1 << (size - 1).bit_length()
    return Placed(gpu, host)


def _read(plan: Plan) -> Iterator[int]:
    """The bytes of each tensor that is read, in the order of their first use."""
    for tensor in plan.tensors:
        size = tensor.numel * tensor.compute_dtype.itemsize
        yield from [size] * (len(tensor.inputs) + (tensor.base is not None))


def tabulate(gpus: Sequence[int]) -> Report:
    """The table of all models and numbers of parents."""
    found = [
        needs(name, shape, parents, gpus) for name, shape in MODELS.items() for parents in PARENTS
    ]
    columns = ["model", "parents", "live", "at hand", "a merge moves", "all on a GPU of", "ahead"]
    columns += [f"on {gpu} GB + host" for gpu in gpus]
    notes = [
        "Computed from shapes, nothing measured; GB of 10^9 bytes. Task arithmetic in bfloat16 "
        "over a base. Live: the model that is merged into. At hand: parents and base. A merge "
        "moves: each of these once. All on a GPU of: the smallest one that holds both and has "
        "three tenths of what the live model leaves to spare for scoring. Ahead: and a second live "
        "model. Last: what of the parents lies on a GPU of that size beside the live model, and "
        "what in pinned memory of its host, for each worker.",
    ]
    rows = [_row(each) for each in found]
    title = "what a search needs"
    return Report(NAME, title, columns, rows, notes, {"needs": [asdict(n) for n in found]})


def _row(found: Needs) -> list[str]:
    sizes = (found.live, found.at_hand, found.moved, found.whole, found.ahead)
    return [
        found.model,
        str(found.parents),
        *(f"{size / 1e9:.0f} GB" if size > 1e10 else f"{size / 1e9:.1f} GB" for size in sizes),
        *(
            "too small" if each is None else f"{each.gpu / 1e9:.0f} + {each.host / 1e9:.0f}"
            for each in found.placed.values()
        ),
    ]


def main(given: Sequence[str] | None = None) -> int:
    """Compute the table; gives the exit code."""
    parser = arguments("benchmarks.sizing", __doc__)
    parser.add_argument("--gpus", default="24,80", help="sizes of GPUs, in GB")
    options = parser.parse_args(given)

    def report() -> Report:
        sizes = options.gpus.split(",")
        if not all(size.isdigit() for size in sizes):
            raise InputError(f"--gpus: '{options.gpus}': give sizes in GB, such as 24,80")
        return tabulate([int(size) for size in sizes])

    return published(options, NAME, DOCUMENTS, report)


if __name__ == "__main__":
    sys.exit(main())
