"""State databases for tests: a SQLite file, and a PostgreSQL server of our own that can be stopped and frozen."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg

PROGRAMS = Path("/usr/lib/postgresql")
SUPERUSER = "postgres"


def postgresql_programs() -> Path | None:
    """The folder of the newest PostgreSQL server that is installed."""
    found = sorted(PROGRAMS.glob("*/bin/initdb"), key=lambda path: float(path.parents[1].name))
    return found[-1].parent if found else None


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """A server on a socket in a folder of its own."""

    programs: Path
    folder: Path

    @property
    def pids(self) -> list[int]:
        """The server's processes; the first one is the parent of the others."""
        parent = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        return [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]

    def url(self, database: str) -> str:
        """Its address as a configuration has it."""
        return f"postgresql://{SUPERUSER}@/{database}?host={self.folder}"

    def new_database(self) -> str:
        """Make an empty database and tell its address."""
        name = f"test_{secrets.token_hex(4)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def start(self) -> None:
        """Start it, and wait until it answers."""
        options = f"-k {self.folder} -c listen_addresses= -c fsync=off"
        self.run("pg_ctl", "-w", "-D", "data", "-o", options, "-l", "log", "start")

    def stop(self) -> None:
        """Stop it as a crash would: connections end at once."""
        self.run("pg_ctl", "-w", "-D", "data", "-m", "immediate", "stop")

    def signal(self, number: signal.Signals) -> None:
        """Freeze or thaw all of it."""
        for pid in self.pids:
            with suppress(ProcessLookupError):  # a server process ends when its client is gone
                os.kill(pid, number)

    def run(self, program: str, *arguments: str) -> None:
        """Run one of its programs as the user that a server wants to be."""
        # Its server must not keep our pipes open.
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        user = SUPERUSER if os.geteuid() == 0 else None
        command = [str(self.programs / program), *arguments]
        groups = {"user": user, "group": user, "extra_groups": ()} if user else {}
        subprocess.run(command, cwd=self.folder, check=True, **quiet, **groups)  # type: ignore[call-overload]


@contextmanager
def running_postgresql(programs: Path) -> Iterator[PostgreSQL]:
    """A fresh server, gone with its files after the block."""
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    if os.geteuid() == 0:
        os.chown(folder, pwd.getpwnam(SUPERUSER).pw_uid, -1)
    server = PostgreSQL(programs, folder)
    try:
        server.run("initdb", "-D", "data", "-U", SUPERUSER, "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8")
        server.start()
        yield server
        server.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def away(server: PostgreSQL, how: str) -> Iterator[None]:
    """Have a server refuse (`stopped`) or hang (`frozen`) while the block runs."""
    if how == "stopped":
        server.stop()
    else:
        server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        if how == "stopped":
            server.start()
        else:
            server.signal(signal.SIGCONT)
