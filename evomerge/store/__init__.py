"""The store: everything a search has done, in SQL, so that any search resumes after any crash.

`Store` opens a database and reads it; a `Coordinator` is the one process that may write one
search. The store never calls out, and knows nothing of models, merging or scoring.
"""

from evomerge.store.coordinator import Coordinator, NewCandidate, NewModel, NewSplit, Outcome
from evomerge.store.database import exists, upgrade
from evomerge.store.store import (
    CandidateRow,
    EvaluationRow,
    GenerationRow,
    MeanRow,
    SearchRow,
    SplitRow,
    Store,
)

__all__ = [
    "CandidateRow",
    "Coordinator",
    "EvaluationRow",
    "GenerationRow",
    "MeanRow",
    "NewCandidate",
    "NewModel",
    "NewSplit",
    "Outcome",
    "SearchRow",
    "SplitRow",
    "Store",
    "exists",
    "upgrade",
]
