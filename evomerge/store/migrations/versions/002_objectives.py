"""Who proposed a generation, what candidates give of several objectives, and results that are
those of an equal candidate."""

import sqlalchemy as sa
from alembic import op

revision = "002"
down_revision = "001"


def upgrade() -> None:
    """Add the columns; what was stored before has none of it."""
    op.add_column("generation", sa.Column("optimizer", sa.Text(), nullable=True))
    op.add_column("candidate", sa.Column("objectives", sa.Text(), nullable=True))
    op.add_column("candidate", sa.Column("violation", sa.Float(), nullable=True))
    op.add_column("evaluation", sa.Column("copied_from", sa.Integer(), nullable=True))
