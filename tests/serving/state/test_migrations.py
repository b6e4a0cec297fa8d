"""Migrations of the state database: from nothing and from version 2, to exactly the tables of the code."""

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import select, text, update

from serving.errors import StateAway
from serving.replica import State
from serving.state.database import StateDatabase
from serving.state.keys import KeyTable
from serving.state.migrations import migrate
from serving.state.migrations.versions import v2_replicas
from serving.state.tables import METADATA, SCHEMA_VERSION, STATE, VERSION_TABLE
from tests.serving.state.test_database import ME, NOW, record


def create_version_2(database: StateDatabase) -> None:
    """Create a database as quantgate left it before there were migrations."""
    with (
        database.engine.transaction(writing=True) as connection,
        Operations.context(MigrationContext.configure(connection)),
    ):
        v2_replicas.upgrade()
        row = "INSERT INTO quantgate_state (id, version, epoch, revision) VALUES (1, 2, 'old', 41)"
        connection.execute(text(row))


@pytest.mark.parametrize("version", [None, 2])
def test_the_migrations_make_the_tables_of_the_code(state: str, version: int | None) -> None:
    """Nothing is left to do for Alembic's own comparison, whether tables were created as they are or migrated."""
    database = StateDatabase.at(state)
    if version:
        create_version_2(database)
    database.heartbeat()
    with database.engine.transaction(writing=False) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert compare_metadata(context, METADATA) == []
    database.close()


def test_a_database_of_version_2_is_upgraded(state: str) -> None:
    """Its epoch, revision and replicas stay; a process that still knows version 2 only goes on."""
    database = StateDatabase.at(state)
    create_version_2(database)
    assert database.heartbeat().epoch == "old"
    receipt = database.publish(ME, [record()], NOW)
    assert receipt.revision == 42
    assert [each.state for _, each in database.snapshot().records] == [State.READY]
    with database.engine.transaction(writing=False) as connection:
        assert connection.scalar(select(STATE.c.version)) == SCHEMA_VERSION
    database.close()
    again = StateDatabase.at(state)
    assert again.heartbeat().revision == 42
    again.close()


def test_a_database_of_version_4_is_upgraded(state: str) -> None:
    """What is in it stays, and keys can be written."""
    database = StateDatabase.at(state)
    with database.engine.transaction(writing=True) as connection:
        migrate(connection, None, "4")
        row = "INSERT INTO quantgate_state (id, version, epoch, revision, rollout_revision) VALUES (1, 4, 'old', 41, 7)"
        connection.execute(text(row))
    with KeyTable(database).edited() as documents:
        documents["alice"] = "{}"
    assert KeyTable(database).read().documents == {"alice": "{}"}
    assert database.heartbeat().revision == 41
    with database.engine.transaction(writing=False) as connection:
        assert connection.scalar(select(STATE.c.version)) == SCHEMA_VERSION
        assert connection.scalar(select(STATE.c.rollout_revision)) == 7
    database.close()


def test_a_new_database_needs_no_migration_later(state: str) -> None:
    """Alembic finds the newest version in tables that were created as they are."""
    database = StateDatabase.at(state)
    database.heartbeat()
    with database.engine.transaction(writing=True) as connection:
        migrate(connection, SCHEMA_VERSION)
    assert database.heartbeat().revision == 0
    database.close()


def test_a_process_goes_on_while_the_next_version_is_rolled_out(state: str) -> None:
    """Also after an error, when it looks at the schema again; a process that starts then is told to upgrade."""
    running = StateDatabase.at(state)
    running.publish(ME, [record()], NOW)
    with running.engine.transaction(writing=True) as connection:
        connection.execute(update(STATE).values(version=SCHEMA_VERSION + 1))
    with pytest.raises(StateAway, match="is unavailable"), running.writing() as connection:
        connection.execute(text("SELECT * FROM nothing"))
    assert running.heartbeat().revision == 1
    running.close()
    late = StateDatabase.at(state)
    with pytest.raises(StateAway, match=f"has schema version {SCHEMA_VERSION + 1}"):
        late.heartbeat()
    late.close()
