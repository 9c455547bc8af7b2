"""Leases of searches, what contamination was found, and readings of test splits."""

import sqlalchemy as sa
from alembic import op

revision = "004"
down_revision = "003"


def upgrade() -> None:
    """Add the columns and the table; what was stored before has none of it."""
    op.add_column("search", sa.Column("holder", sa.Text(), nullable=True))
    op.add_column("search", sa.Column("lease_until", sa.Float(), nullable=True))
    op.add_column("search", sa.Column("contamination", sa.Text(), nullable=True))
    op.add_column("search", sa.Column("coordinates", sa.Text(), nullable=True))
    op.create_table(
        "reading",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("ledger_id", sa.Integer(), nullable=False),
        sa.Column("asked", sa.String(length=64), nullable=False),
        sa.Column("subject", sa.String(length=64), nullable=False),
        sa.Column("task", sa.String(length=128), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("codec", sa.Integer(), nullable=False),
        sa.Column("blob", sa.LargeBinary(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["ledger_id"], ["ledger.id"], name="fk_reading_ledger_id"),
        sa.PrimaryKeyConstraint("id", name="pk_reading"),
        sa.UniqueConstraint("asked", "subject", name="uq_reading_asked_subject"),
    )
