"""Alembic's environment: migrations run on the connection that `migrate` passes, in its transaction."""

from alembic import context

from serving.state.tables import METADATA, VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE
)
context.run_migrations()
