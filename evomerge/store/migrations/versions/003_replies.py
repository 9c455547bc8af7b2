"""Of a task's scores how long replies were, and which examples could not be asked or graded; of a
search's models which one gives config and tokenizer."""

import sqlalchemy as sa
from alembic import op

revision = "003"
down_revision = "002"


def upgrade() -> None:
    """Add the columns; what was stored before says nothing of them."""
    large = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    for name, kind in (("tokens", large), ("overlong", sa.Integer()), ("failed", sa.Integer())):
        op.add_column("score", sa.Column(name, kind, nullable=False, server_default="0"))
    op.add_column("model", sa.Column("first", sa.Boolean(), nullable=False, server_default="0"))
