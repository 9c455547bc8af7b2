"""The store: everything a search has done, in SQL, so that any search resumes after any crash.

`Store` opens a database and reads it; a `Coordinator` is the one process that may write one
search; a `Queue` holds what a server was asked to do. The store never calls out, and knows nothing
of models, merging or scoring.
"""

from evomerge.store.audit import Audit, AuditLine
from evomerge.store.bulk import uncollected
from evomerge.store.coordinator import (
    NOWHERE,
    Coordinator,
    NewCandidate,
    NewModel,
    NewSplit,
    Outcome,
    Placement,
)
from evomerge.store.copying import Copied, copy
from evomerge.store.database import exists, probe, shown
from evomerge.store.integrity import Findings, check
from evomerge.store.invariants import Violation
from evomerge.store.ledger import NewReading, Opening
from evomerge.store.queue import Queue, Submission
from evomerge.store.rows import (
    NOT_BEGUN,
    CandidateRow,
    EvaluationRow,
    GenerationRow,
    MeanRow,
    SearchRow,
    SplitRow,
)
from evomerge.store.store import Store, consistent
from evomerge.store.sums import FailureSums, Sort, Sums
from evomerge.store.tokens import LOCAL, SCOPES, Scope, Token, Tokens
from evomerge.store.upgrading import Upgraded, upgrade
from evomerge.store.wishes import Wish, Wishes

__all__ = [
    "LOCAL",
    "NOT_BEGUN",
    "NOWHERE",
    "SCOPES",
    "Audit",
    "AuditLine",
    "CandidateRow",
    "Coordinator",
    "Copied",
    "EvaluationRow",
    "FailureSums",
    "Findings",
    "GenerationRow",
    "MeanRow",
    "NewCandidate",
    "NewModel",
    "NewReading",
    "NewSplit",
    "Opening",
    "Outcome",
    "Placement",
    "Queue",
    "Scope",
    "SearchRow",
    "Sort",
    "SplitRow",
    "Store",
    "Submission",
    "Sums",
    "Token",
    "Tokens",
    "Upgraded",
    "Violation",
    "Wish",
    "Wishes",
    "check",
    "consistent",
    "copy",
    "exists",
    "probe",
    "shown",
    "uncollected",
    "upgrade",
]
