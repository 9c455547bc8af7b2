"""The store: everything a search has done, in SQL, so that any search resumes after any crash.

`Store` opens a database and reads it; a `Coordinator` is the one process that may write one
search. The store never calls out, and knows nothing of models, merging or scoring.
"""

from evomerge.store.bulk import uncollected
from evomerge.store.coordinator import Coordinator, NewCandidate, NewModel, NewSplit, Outcome
from evomerge.store.copying import Copied, copy
from evomerge.store.database import exists, probe, shown
from evomerge.store.integrity import Findings, check
from evomerge.store.invariants import Violation
from evomerge.store.ledger import NewReading, Opening
from evomerge.store.rows import (
    NOT_BEGUN,
    CandidateRow,
    EvaluationRow,
    GenerationRow,
    MeanRow,
    SearchRow,
    SplitRow,
)
from evomerge.store.store import Store
from evomerge.store.upgrading import Upgraded, upgrade

__all__ = [
    "NOT_BEGUN",
    "CandidateRow",
    "Coordinator",
    "Copied",
    "EvaluationRow",
    "Findings",
    "GenerationRow",
    "MeanRow",
    "NewCandidate",
    "NewModel",
    "NewReading",
    "NewSplit",
    "Opening",
    "Outcome",
    "SearchRow",
    "SplitRow",
    "Store",
    "Upgraded",
    "Violation",
    "check",
    "copy",
    "exists",
    "probe",
    "shown",
    "uncollected",
    "upgrade",
]
