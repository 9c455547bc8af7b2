"""The tables. Knows nothing of what is done with them.

Times are UTC, ISO 8601. JSON columns hold documents for people and for resuming; numbers that are
read in bulk (genotypes, per-example scores) are packed blobs, each with its hash.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

VERSION = "006"  # the newest migration

_LARGE = BigInteger().with_variant(Integer(), "sqlite")  # SQLite's integers have any size

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

search = Table(
    "search",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("state", String(16), nullable=False),  # open | finished | failed
    Column("epoch", Integer, nullable=False),  # raised by each new coordinator
    Column("seed", _LARGE, nullable=False),
    Column("job", Text, nullable=False),  # JSON, paths absolute
    Column("versions", Text, nullable=False),  # JSON
    Column("created_at", String(32), nullable=False),
    Column("active_seconds", Float, nullable=False),  # wall time spent, resumes included
    Column("stop_reason", Text),
    Column("verdict", Text),  # JSON: finalists, winner, best parent; null before the end
    Column("holder", Text),  # JSON: who conducts it, see lease; null when let go
    Column("lease_until", Float),  # seconds since 1970 by the database's clock
    Column("contamination", Text),  # JSON: what was found at launch; null in older searches
    Column("coordinates", Text),  # JSON: what each value of a genotype is; null in older searches
)

model = Table(
    "model",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("name", String(64), nullable=False),  # the parent's name in the job, or 'base'
    Column("uri", Text, nullable=False),
    Column("revision", Text),
    Column("sha256", String(64), nullable=False),
    Column("files", Text, nullable=False),  # JSON: SHA-256 by file name
    # Whether it gives config and tokenizer; of searches before schema 003 it is not known.
    Column("first", Boolean, nullable=False, server_default="0"),
    UniqueConstraint("search_id", "name"),
)

split = Table(
    "split",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("task", String(128), nullable=False),
    Column("split", String(16), nullable=False),
    Column("content", String(64), nullable=False),  # the file, and how it is asked
    Column("identity", String(64), nullable=False),  # the records alone; the ledger's name for it
    Column("n", Integer, nullable=False),
    UniqueConstraint("search_id", "task", "split"),
)

split_item = Table(
    "split_item",
    metadata,
    Column("split_id", ForeignKey("split.id"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("hash", String(64), nullable=False),
)

generation = Table(
    "generation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", String(16), nullable=False),  # baselines (0) | proposed | final (the mean)
    Column("step_size", Float),
    Column("opened_at", String(32), nullable=False),
    Column("told_at", String(32)),  # null while candidates are being scored
    Column("review", Text),  # JSON: the guard's verdict
    Column("optimizer", Text),  # JSON: the section of the job that proposed it
    # When it was proposed and when told, counted in the search's asks and tells together, from 1:
    # what replays its optimizer. Null in older searches, which did both in turn, and of generations
    # that no optimizer proposed.
    Column("ask", Integer),
    Column("tell", Integer),
    UniqueConstraint("search_id", "number"),
)

candidate = Table(
    "candidate",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("generation_id", ForeignKey("generation.id"), nullable=False),
    Column("generation", Integer, nullable=False),
    Column("slot", Integer, nullable=False),
    Column("label", String(64)),  # of baselines, and 'mean' of the distribution's mean
    Column("state", String(16), nullable=False),  # open | scored | failed | infeasible
    Column("reason", Text),
    Column("genotype", LargeBinary),  # float64, little endian; null for baselines
    Column("genotype_sha", String(64)),
    Column("recipe", Text),  # JSON; null if infeasible
    Column("recipe_sha", String(64)),
    Column("fitness", Float),  # of all of train that it was scored on
    Column("told", Float),  # what the optimizer was told; of several objectives, the first
    Column("objectives", Text),  # JSON: its values of a search with several, higher is better
    Column("violation", Float),  # by how much it breaks the job's constraints; 0: not at all
    UniqueConstraint("search_id", "generation", "slot"),
    Index("ix_candidate_recipe_sha", "recipe_sha"),
    # What is summed up over all candidates, without their recipes beside it.
    Index(
        "ix_candidate_standing",
        *("search_id", "generation", "slot", "label", "state", "fitness", "violation"),
    ),
)

evaluation = Table(
    "evaluation",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("candidate_id", ForeignKey("candidate.id"), nullable=False),
    Column("purpose", String(16), nullable=False),  # train | monitor | full | validation
    Column("stage", Integer, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("state", String(16), nullable=False),  # scored | failed
    Column("reason", Text),
    Column("merge_seconds", Float, nullable=False),
    Column("seconds", Float, nullable=False),
    Column("recorded_at", String(32), nullable=False),
    Column("copied_from", Integer),  # the candidate with the same recipe that was scored
    Column("device", String(128)),  # where, by its name in table device; null of copies
    Column("gpus", Float, nullable=False, server_default="1"),  # held for it; on a CPU 1
    Column("waited", Float, nullable=False, server_default="0"),  # seconds for a free device
    UniqueConstraint("candidate_id", "purpose", "stage"),
)

score = Table(
    "score",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("evaluation_id", ForeignKey("evaluation.id"), nullable=False),
    Column("task", String(128), nullable=False),
    Column("n", Integer, nullable=False),
    Column("mean", Float, nullable=False),
    Column("truncated", Integer, nullable=False),  # examples
    Column("tokens", _LARGE, nullable=False, server_default="0"),  # of all replies
    Column("overlong", Integer, nullable=False, server_default="0"),  # examples
    Column("failed", Integer, nullable=False, server_default="0"),  # examples
    Column("codec", Integer, nullable=False),
    Column("blob", LargeBinary, nullable=False),
    Column("sha256", String(64), nullable=False),
    UniqueConstraint("evaluation_id", "task"),
    Index("ix_score_means", "evaluation_id", "task", "n", "mean"),  # without the blobs beside them
)

ledger = Table(
    "ledger",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("kind", String(16), nullable=False),  # look | more looks | unseal
    Column("content", String(64), nullable=False),  # of the split that is used
    Column("subject", String(128), nullable=False),  # what it is used on
    Column("entry", Text, nullable=False),  # JSON
    Column("at", String(32), nullable=False),
    Column("previous", String(64), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    UniqueConstraint("kind", "content", "subject"),
)

# What an opened test split said of a model: read once, whoever asks again.
reading = Table(
    "reading",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("ledger_id", ForeignKey("ledger.id"), nullable=False),  # under which it was read
    Column("asked", String(64), nullable=False),  # hash of the test split as asked and scored
    Column("subject", String(64), nullable=False),  # hash of the recipe, or of a parent's content
    Column("task", String(128), nullable=False),
    Column("n", Integer, nullable=False),
    Column("codec", Integer, nullable=False),
    Column("blob", LargeBinary, nullable=False),
    Column("sha256", String(64), nullable=False),
    UniqueConstraint("asked", "subject"),
)

# Where the time of the devices went that a coordinator has held; seconds.
device = Table(
    "device",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("name", String(128), nullable=False),
    Column("gpus", Float, nullable=False),  # of each worker; 0 on a CPU
    Column("held", Float, nullable=False),
    Column("opening", Float, nullable=False),
    Column("merging", Float, nullable=False),
    Column("scoring", Float, nullable=False),
    Column("lost", Float, nullable=False),
    Column("evaluations", Integer, nullable=False),
    Column("seen_at", String(32), nullable=False),
    UniqueConstraint("search_id", "epoch", "name"),
)

export = Table(
    "export",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("candidate_id", ForeignKey("candidate.id"), nullable=False, unique=True),
    Column("report", Text, nullable=False),  # JSON, returned byte for byte ever after
    Column("at", String(32), nullable=False),
)

event = Table(
    "event",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("at", String(32), nullable=False),
    Column("kind", String(32), nullable=False),
    Column("text", Text, nullable=False),
)

# What others ask of whoever conducts a search: the latest of a search counts.
wish = Table(
    "wish",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("search_id", ForeignKey("search.id"), nullable=False),
    Column("kind", String(16), nullable=False),  # pause | stop | none
    Column("by", String(64), nullable=False),
    Column("at", String(32), nullable=False),
)

# What a candidate replied to some examples of train, for people to read.
sample = Table(
    "sample",
    metadata,
    Column("evaluation_id", ForeignKey("evaluation.id"), primary_key=True),
    Column("task", String(128), primary_key=True),
    Column("position", Integer, primary_key=True),  # in the split
    Column("reply", Text, nullable=False),
)

# What a server was asked to do, searches and exports, in one queue.
submission = Table(
    "submission",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("kind", String(16), nullable=False),  # search | export | push
    Column("search", String(64), nullable=False),  # by name; of a queued one there is no row yet
    Column("document", Text, nullable=False),  # JSON: the job, or what an export or push is of
    Column("overrides", Text, nullable=False),  # JSON: 'key=value' to resume it with
    Column("priority", Integer, nullable=False),  # higher goes first
    Column("state", String(16), nullable=False),  # see queue.State
    Column("error", Text),
    Column("result", Text),  # JSON
    Column("webhook", Text),
    Column("by", String(64), nullable=False),
    Column("key", String(128), unique=True),  # of idempotent requests; else a random one
    Column("asked", String(64)),  # hash of what came with that key
    Column("attempts", Integer, nullable=False),  # begun since it last got anywhere
    Column("submitted_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("ended_at", String(32)),
)

token = Table(
    "token",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("sha256", String(64), nullable=False, unique=True),  # of the secret, which is random
    Column("scopes", String(64), nullable=False),  # such as 'read run'
    Column("created_at", String(32), nullable=False),
    Column("expires_at", String(32)),
    Column("revoked_at", String(32)),
    Column("used_at", String(32)),
)

# Every change that was made through a server, and every refusal of one.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", String(32), nullable=False),
    Column("who", String(64), nullable=False),  # a token's name, or 'local'
    Column("address", String(64), nullable=False),
    Column("action", String(64), nullable=False),
    Column("subject", String(128), nullable=False),
    Column("detail", Text, nullable=False),  # JSON, without secrets
)
