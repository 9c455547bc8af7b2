"""Schema migrations. Alembic is loaded only when a database is made or upgraded."""

from pathlib import Path

from sqlalchemy import Connection


def upgrade(connection: Connection, version: str = "head") -> None:
    """Bring the schema to a version, the newest by default, inside the connection's own
    transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    command.upgrade(config, version)
