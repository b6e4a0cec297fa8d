"""State databases of both kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving.state.databases import PostgreSQL, postgresql_programs, running_postgresql


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSQL]:
    """A PostgreSQL server; skipped where none is installed."""
    programs = postgresql_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server under /usr/lib/postgresql; `apt-get install postgresql` brings one")
    with running_postgresql(programs) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty state database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/state.db"
    server: PostgreSQL = request.getfixturevalue("postgresql")
    return server.new_database()
