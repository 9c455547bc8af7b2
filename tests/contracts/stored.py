"""A search in a store, as the suites of the store write it."""

import hashlib
import json

import numpy as np
from sqlalchemy import select

from evomerge.fitness.results import Scores
from evomerge.fitness.task import Unsealed
from evomerge.store import Coordinator, NewCandidate, NewModel, NewSplit, Store, schema
from evomerge.store.ledger import Opening

JOB = {"k": ["ü"], "guard": {"validation_looks": 5}}
GENOTYPE = np.array([0.1 + 0.2, 5e-324, -0.0, 1 - 2**-53, 0.0, 1.0])
RECIPE = {
    "merge_method": "linear",
    "models": [{"model": "/models/ja", "parameters": {"weight": 1}}],
}


def launched(store: Store, name: str) -> Coordinator:
    """A new search."""
    models = [NewModel("ja", "/models/ja", "a" * 64, {"config.json": "b" * 64}, True)]
    splits = [NewSplit("task", "train", "c" * 64, "f" * 64, ["d" * 64, "e" * 64])]
    return Coordinator.launch(store, name, 7, JOB, {"torch": "2"}, models, splits)


def proposal(slot: int, genotype: np.ndarray = GENOTYPE) -> NewCandidate:
    """A candidate as the optimizer proposes it."""
    return NewCandidate(slot, None, genotype, RECIPE, f"{slot}" * 64)


def scores(*values: float) -> Scores:
    """Per-example results in which every bit matters."""
    n = len(values)
    examples = np.arange(n, dtype=np.uint32)[::-1] + np.uint32(2**32 - n)
    shaping = -np.arange(n, dtype=np.float32) / np.float32(3)
    tokens = np.uint32(2**32 - 1) - np.arange(n, dtype=np.uint32)
    odd, third = np.arange(n) % 2 == 1, np.arange(n) % 3 == 2
    reasons = {int(at): "ü" for at in examples[third]}
    return Scores(examples, np.array(values, np.float32), shaping, odd, tokens, third, reasons)


def unseal(coordinator: Coordinator, content: str, recipe_sha: str) -> tuple[Unsealed, Opening]:
    """As an export does, asking as the task does."""
    return coordinator.unseal(content, recipe_sha, "e" * 64, {"purpose": "export"})


def identical(ours: Scores, theirs: Scores) -> bool:
    """Whether two results agree in every bit and in their types."""
    parts = ("examples", "scores", "shaping", "truncated", "tokens", "overlong")
    pairs = [(getattr(ours, part), getattr(theirs, part)) for part in parts]
    same = all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)
    return same and ours.failures == theirs.failures


def broken_link(store: Store) -> int | None:
    """The first row of the ledger whose hash does not follow from it and from the row before."""
    table, previous = schema.ledger, "0" * 64
    with store.database.read() as db:
        rows = db.execute(select(table).order_by(table.c.id)).all()
    for number, row in enumerate(rows):
        hashed = {k: v for k, v in row._asdict().items() if k not in ("id", "hash")}
        digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
        if row.previous != previous or row.hash != digest:
            return number
        previous = row.hash
    return None
