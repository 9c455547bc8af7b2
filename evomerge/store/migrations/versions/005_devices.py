"""The order of asks and tells, where evaluations ran, and where the time of devices went."""

import sqlalchemy as sa
from alembic import op

revision = "005"
down_revision = "004"


def upgrade() -> None:
    """Add the columns and the table; what was stored before was proposed and told in turn, and
    evaluated on one device that nobody wrote down."""
    op.add_column("generation", sa.Column("ask", sa.Integer(), nullable=True))
    op.add_column("generation", sa.Column("tell", sa.Integer(), nullable=True))
    op.add_column("evaluation", sa.Column("device", sa.String(length=128), nullable=True))
    gpus = sa.Column("gpus", sa.Float(), nullable=False, server_default="1")
    op.add_column("evaluation", gpus)
    waited = sa.Column("waited", sa.Float(), nullable=False, server_default="0")
    op.add_column("evaluation", waited)
    op.create_table(
        "device",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("search_id", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("gpus", sa.Float(), nullable=False),
        sa.Column("held", sa.Float(), nullable=False),
        sa.Column("opening", sa.Float(), nullable=False),
        sa.Column("merging", sa.Float(), nullable=False),
        sa.Column("scoring", sa.Float(), nullable=False),
        sa.Column("lost", sa.Float(), nullable=False),
        sa.Column("evaluations", sa.Integer(), nullable=False),
        sa.Column("seen_at", sa.String(length=32), nullable=False),
        sa.ForeignKeyConstraint(["search_id"], ["search.id"], name="fk_device_search_id"),
        sa.PrimaryKeyConstraint("id", name="pk_device"),
        sa.UniqueConstraint("search_id", "epoch", "name", name="uq_device_search_id_epoch_name"),
    )
