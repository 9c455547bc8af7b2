"""The migrations and the tables in the code say the same."""

from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from evomerge.errors import StoreError
from evomerge.store import Store, migrations, schema, upgrade


def test_migrated_schema_equals_the_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'store.db'}"
    with Store(url, create=True) as store, store.database.read() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, schema.metadata) == []


def test_version_is_the_newest_migration() -> None:
    scripts = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert scripts.get_heads() == [schema.VERSION]


def first_store(path: Path) -> str:
    """An empty store as the first version made it."""
    url = f"sqlite:///{path}"
    with create_engine(url).begin() as db:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = db
        command.upgrade(config, "001")
    return url


def test_older_store_is_refused_with_its_remedy_and_upgraded_beside_a_copy(tmp_path: Path) -> None:
    url = first_store(tmp_path / "store.db")
    with pytest.raises(StoreError, match=f"evomerge db upgrade --store {url}"):
        Store(url)
    found = upgrade(url)
    assert found == ("001", tmp_path / "store.db.schema-001")
    with Store(url) as store:
        assert store.searches() == []
    with pytest.raises(StoreError, match="schema 001"):
        Store(f"sqlite:///{found[1]}")
    assert upgrade(url) is None


def test_newer_store_is_refused(tmp_path: Path) -> None:
    url = first_store(tmp_path / "store.db")
    with create_engine(url).begin() as db:
        db.exec_driver_sql("UPDATE alembic_version SET version_num = '999'")
    for open_it in (Store, upgrade):
        with pytest.raises(StoreError, match="schema 999"):
            open_it(url)
