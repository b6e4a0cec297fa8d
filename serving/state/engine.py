"""Connections to the state database, SQLite or PostgreSQL; every wait has a limit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from config.errors import ConfigError

WAIT_SECONDS = 2  # for a lock, for a connection, for an answer
# Between two statements of a transaction; PostgreSQL ends it after that, so that a frozen process keeps no lock.
IDLE_SECONDS = 4


@dataclass(slots=True)
class StateEngine:
    """Transactions on one database; `name` is its URL without the password, for messages."""

    engine: Engine
    name: str
    file: Path | None
    _identity: tuple[int, int] | None = field(default=None, init=False)

    @classmethod
    def at(cls, address: str) -> "StateEngine":
        """Parse a URL; ConfigError if it is invalid or its driver is not installed."""
        try:
            url = make_url(address)
            name = url.render_as_string()
            url = url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
            if url.get_backend_name() == "sqlite":
                return cls(_sqlite(url), name, Path(url.database or ""))
            engine = create_engine(url, connect_args=_postgresql_options(url), pool_size=1)
        except (ArgumentError, NoSuchModuleError) as error:
            raise ConfigError(f"gateway.state: {error}") from error
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"gateway.state: {name} needs the package {error.name}; install quantgate[postgres]"
            ) from error
        return cls(engine, name, None)

    def close(self) -> None:
        """Close idle connections; one that is still in use closes when it is done."""
        self.engine.dispose()

    def replaced(self) -> bool:
        """Whether the SQLite file was replaced: open connections would use the deleted one, and are closed."""
        if self.file is None:
            return False
        try:
            status = self.file.stat()
        except FileNotFoundError:
            identity = None
        else:
            identity = (status.st_dev, status.st_ino)
        if identity is not None and identity == self._identity:
            return False
        self.engine.dispose()
        self._identity = identity
        return True

    def set_up(self) -> None:
        """Enable write-ahead logging, once per SQLite file: readers and the writer do not block each other."""
        if self.file is not None:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            status = self.file.stat()
            self._identity = (status.st_dev, status.st_ino)

    @contextmanager
    def transaction(self, *, writing: bool) -> Iterator[Connection]:
        """A transaction; a reading one sees a consistent snapshot."""
        options: dict[str, Any] = {"begin": "BEGIN IMMEDIATE" if writing else "BEGIN"}
        if self.file is None and not writing:
            options["isolation_level"] = "REPEATABLE READ"
        with self.engine.connect().execution_options(**options) as connection, connection.begin():
            if self.file is None:
                connection.exec_driver_sql(
                    f"SET LOCAL statement_timeout = '{WAIT_SECONDS}s';"
                    f"SET LOCAL idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'"
                )
            yield connection


def _sqlite(url: URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise ConfigError(
            "gateway.state: a database in memory cannot be shared between processes; write sqlite:///state.db"
        )
    engine = create_engine(url, connect_args={"timeout": WAIT_SECONDS})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # BEGIN is issued below
        # A commit that a power failure loses is written again with the next heartbeat.
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        """A writer locks at once (BEGIN IMMEDIATE): upgrading a read lock can fail whatever the timeout."""
        if statement := connection.get_execution_options().get("begin"):
            connection.exec_driver_sql(statement)

    return engine


def _postgresql_options(url: URL) -> dict[str, Any]:
    if url.get_driver_name() != "psycopg":
        return {}
    return {
        "connect_timeout": WAIT_SECONDS,
        "tcp_user_timeout": 2000 * WAIT_SECONDS,  # milliseconds
        "application_name": "quantgate",
        "prepare_threshold": None,  # a connection pooler may use another connection for each transaction
    }
