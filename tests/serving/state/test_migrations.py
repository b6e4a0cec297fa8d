"""Migrations of the state database: from nothing and from version 2, to exactly the tables of the code."""

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import select, text

from serving.replica import State
from serving.state.database import StateDatabase
from serving.state.migrations import VERSION_TABLE
from serving.state.migrations.versions import v2_replicas
from serving.state.tables import METADATA, SCHEMA_VERSION, STATE
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


def test_the_migrations_make_the_tables_of_the_code(state: str) -> None:
    """Nothing is left to do for Alembic's own comparison."""
    database = StateDatabase.at(state)
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
