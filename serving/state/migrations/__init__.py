"""Migrations of the state database by Alembic; they run when a process first uses a database of an older version.

An empty database gets the tables of `serving.state.tables` at once; a test compares both ways.

A migration only adds: processes of the version before go on with the tables that they know.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection

FOLDER = Path(__file__).parent
# The last version without migrations: its databases have its tables and no VERSION_TABLE.
FIRST = "2"


def migrate(connection: Connection, found: int | None, target: str = "head") -> None:
    """Upgrade within the transaction of the connection; `found` is the version of the database, None if it is empty."""
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    config.attributes["connection"] = connection
    if found == int(FIRST):
        command.stamp(config, FIRST)
    command.upgrade(config, target)
