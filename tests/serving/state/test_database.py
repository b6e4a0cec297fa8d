"""The state database, of both kinds, asked by several processes."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import update

from config.errors import ConfigError
from serving.errors import StateAway
from serving.replica import Replica, State
from serving.state.database import EMPTY, Owner, ReplicaRecord, StateDatabase, differences, state_url
from serving.state.tables import SCHEMA_VERSION, STATE
from tests.fakes.running import ROOT
from tests.serving.state.databases import PostgreSQL

NOW = 1_800_000_000.0
ME = Owner("box-1", "box", 17)


def record(name: str = "int4-1", state: State = State.READY, reason: str = "", since: float = NOW) -> ReplicaRecord:
    """One replica's entry."""
    adapters = ("math", "law")
    replica = Replica(name, "int4", "int4", "http://127.0.0.1:9", name, "the-key", 4096, "injected", adapters=adapters)
    return ReplicaRecord(replica, state, reason, since, pid=99)


def test_what_is_published_is_read(state: str) -> None:
    """Everything but the key comes back, under the revision that the change made."""
    database = StateDatabase.at(state)
    published = database.publish(ME, [record()], NOW)
    snapshot = database.snapshot()
    database.close()
    bare = dataclasses.replace(record(), replica=dataclasses.replace(record().replica, api_key=None), revision=1)
    assert snapshot.records == (("box-1", bare),)
    assert (snapshot.heartbeat.revision, published.revision, published.revisions) == (1, 1, {"int4-1": 1})
    assert snapshot.heartbeat.owners == (Owner("box-1", "box", 17, joined_at=NOW, beat=1, beat_at=NOW),)


def test_keys_are_never_stored(tmp_path: Path) -> None:
    """No byte of the files holds a replica's key."""
    database = StateDatabase.at(f"sqlite:///{tmp_path}/state.db")
    database.publish(ME, [record()], NOW)
    assert [path.name for path in tmp_path.iterdir() if b"int4-1" in path.read_bytes()]
    assert not [path.name for path in tmp_path.iterdir() if b"the-key" in path.read_bytes()]
    database.close()


def test_revision_counts_changes_only(state: str) -> None:
    """A beat is no news; a change, an arrival and a departure are, each in one step, for the rows that it concerns."""
    database = StateDatabase.at(state)
    steps = [
        ([record("a")], 1, {"a": 1}),
        ([record("a", since=NOW + 1)], 1, {"a": 1}),
        ([record("a"), record("b")], 2, {"a": 1, "b": 2}),
        ([record("a", State.DRAINING), record("b")], 3, {"a": 3, "b": 2}),
        ([record("b")], 4, {"b": 2}),
        ([record("b")], 4, {"b": 2}),
    ]
    for number, (entries, revision, revisions) in enumerate(steps):
        published = database.publish(ME, entries, NOW + number)
        assert (published.revision, published.revisions) == (revision, revisions)
    assert database.heartbeat().owners[0].beat == len(steps)
    database.withdraw("box-1")
    assert (database.heartbeat().revision, database.snapshot().records, database.heartbeat().owners) == (5, (), ())
    database.close()


def test_owners_keep_apart(state: str) -> None:
    """Two supervisors may have a replica of the same name; each writes its own only."""
    database = StateDatabase.at(state)
    database.publish(ME, [record()], NOW)
    database.publish(Owner("box-2", "other", 1), [record(state=State.WARMING)], NOW + 1)
    database.publish(ME, [], NOW)
    assert [(owner, each.state) for owner, each in database.snapshot().records] == [("box-2", State.WARMING)]
    assert [owner.id for owner in database.heartbeat().owners] == ["box-1", "box-2"]
    database.close()


def test_followers_are_known_to_those_who_publish(state: str) -> None:
    """A follower's revision and beats are told; one that speaks of another database's count is not believed."""
    database = StateDatabase.at(state)
    epoch = database.heartbeat().epoch
    database.acknowledge("gateway-1", epoch, 0, NOW)
    database.acknowledge("gateway-1", epoch, 3, NOW)
    database.acknowledge("gateway-1", "another", 9, NOW)
    (seen,) = database.publish(ME, [], NOW).followers
    assert (seen.id, seen.revision, seen.beat) == ("gateway-1", 3, 2)
    database.leave("gateway-1")
    assert database.publish(ME, [], NOW).followers == ()
    database.close()


def test_the_dead_are_forgotten_in_the_end(state: str) -> None:
    """A supervisor that is silent for days goes with its replicas, a follower after hours; that is news."""
    database = StateDatabase.at(state)
    database.publish(ME, [record()], NOW)
    heartbeat = database.heartbeat()
    database.acknowledge("gateway-1", heartbeat.epoch, 1, NOW)
    published = database.publish(Owner("box-2", "other", 1), [], NOW + 90_000)
    assert (published.followers, published.revision) == ((), heartbeat.revision + 1)
    assert database.snapshot().records == ()
    database.close()


def test_unknown_tables_are_refused(state: str) -> None:
    """Tables of another version of quantgate are left alone, and the message says what to do."""
    database = StateDatabase.at(state)
    database.heartbeat()
    with database.engine.transaction(writing=True) as connection:
        connection.execute(update(STATE).values(version=7))
    database.close()
    other = StateDatabase.at(state)
    with pytest.raises(StateAway, match=rf"version 7, this quantgate needs {SCHEMA_VERSION}; run the same"):
        other.publish(ME, [record()], NOW)
    other.close()


def test_who_only_looks_makes_nothing(state: str, tmp_path: Path) -> None:
    """Where nobody has published yet, nothing is found and nothing is left."""
    looking = StateDatabase.at(state, create=False)
    assert (looking.snapshot(), looking.heartbeat()) == (EMPTY, EMPTY.heartbeat)
    assert list(tmp_path.iterdir()) == []
    database = StateDatabase.at(state)
    database.publish(ME, [record()], NOW)
    assert len(looking.snapshot().records) == 1
    database.close()
    looking.close()


def test_a_deleted_file_is_made_anew(tmp_path: Path) -> None:
    """Connections don't go on with a file that is gone; the new one counts from 0 and has another epoch."""
    writer, reader = (StateDatabase.at(f"sqlite:///{tmp_path}/state.db") for _ in range(2))
    writer.publish(ME, [record()], NOW)
    before = reader.heartbeat()
    for path in tmp_path.iterdir():
        path.unlink()
    writer.publish(ME, [record()], NOW)
    after = reader.heartbeat()
    assert (before.revision, after.revision) == (1, 1)
    assert before.epoch != after.epoch
    assert len(reader.snapshot().records) == 1
    writer.close()
    reader.close()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    """What isn't ours is said to be away, with its name and the reason."""
    (tmp_path / "state.db").write_text("no database at all, and long enough to be read as one " * 10)
    database = StateDatabase.at(f"sqlite:///{tmp_path}/state.db")
    with pytest.raises(StateAway, match=rf"sqlite:///{tmp_path}/state.db is unavailable: file is not a database"):
        database.heartbeat()
    database.close()


def test_a_locked_file_can_be_read(tmp_path: Path) -> None:
    """Somebody who writes for long keeps writers out, readers not."""
    database, other = (StateDatabase.at(f"sqlite:///{tmp_path}/state.db") for _ in range(2))
    database.publish(ME, [record()], NOW)
    with other.engine.transaction(writing=True):
        assert database.heartbeat().revision == 1
        with pytest.raises(StateAway, match="is unavailable: database is locked"):
            database.publish(ME, [], NOW)
    assert database.publish(ME, [], NOW).revision == 2
    database.close()
    other.close()


WRITER = """\
import sys
from serving.replica import Replica, State
from serving.state.database import Owner, StateDatabase, ReplicaRecord
name, url, changes = sys.argv[1], sys.argv[2], int(sys.argv[3])
database = StateDatabase.at(url)
for number in range(changes):
    replica = Replica(f"int4-{number}", "int4", "int4", "http://127.0.0.1:9", name)
    published = database.publish(Owner(name, "box", number), [ReplicaRecord(replica, State.READY, "", 0.0)], 1.8e9)
    database.acknowledge(name, database.heartbeat().epoch, published.revision, 1.8e9)
"""


def test_processes_that_come_at_once(state: str) -> None:
    """Several processes make the tables together and count every change of each once."""
    changes, names = 10, ["a", "b", "c", "d"]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, name, state, str(changes)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for name in names
    ]
    errors = [writer.communicate(timeout=60)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0] * len(names), errors
    database = StateDatabase.at(state)
    snapshot = database.snapshot()
    database.close()
    assert snapshot.heartbeat.revision == changes * len(names)
    assert [(owner, each.replica.id) for owner, each in snapshot.records] == [(name, "int4-9") for name in names]


@pytest.mark.parametrize(
    "known, entry, written",
    [
        (record(), record(), False),
        (record(), record(since=NOW + 1.5), False),
        (record(), record(since=NOW + 60), True),
        (record(), record(state=State.DRAINING), True),
        (record(), record(reason="why"), True),
        (record(), dataclasses.replace(record(), pid=100), True),
        (dataclasses.replace(record(), revision=5), record(), False),
    ],
)
def test_differences(known: ReplicaRecord, entry: ReplicaRecord, written: bool) -> None:
    """What people or gateways would see differently is written; clocks may wobble."""
    bare = dataclasses.replace(known, replica=dataclasses.replace(known.replica, api_key=None))
    assert differences({"int4-1": bare}, [entry]) == ([entry] if written else [], [])
    assert differences({"int4-1": bare}, []) == ([], ["int4-1"])


@pytest.mark.parametrize(
    "url, resolved",
    [
        ("sqlite:///state.db", "sqlite:////etc/quantgate/state.db"),
        ("sqlite:///lib/state.db", "sqlite:////etc/quantgate/lib/state.db"),
        ("sqlite:////var/state.db", "sqlite:////var/state.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://db/quantgate", "postgresql://db/quantgate"),
    ],
)
def test_a_relative_file_is_beside_the_configuration(url: str, resolved: str) -> None:
    """Where a process was started doesn't matter."""
    assert state_url(url, Path("/etc/quantgate")) == resolved


@pytest.mark.parametrize(
    "url, words",
    [
        ("sqlite://", "a database in memory cannot be shared"),
        ("sqlite:///:memory:", "a database in memory cannot be shared"),
        ("postgresql+asyncpg2://u:hunter2@db/x", "gateway.state: "),
        (
            "postgresql+psycopg2://u:hunter2@db/x",
            r"u:\*\*\*@db/x needs the package psycopg2; install quantgate\[postgr",
        ),
    ],
)
def test_addresses_that_cannot_be_used(url: str, words: str) -> None:
    """They are the configuration's fault, told before anything runs, without the password."""
    with pytest.raises(ConfigError, match=words) as caught:
        StateDatabase.at(url)
    assert "hunter2" not in str(caught.value)


def test_a_server_that_is_not_there() -> None:
    """A refused connection is told at once, without the password."""
    database = StateDatabase.at("postgresql://u:hunter2@127.0.0.1:1/x")
    began = time.monotonic()
    with pytest.raises(StateAway, match=r"postgresql://u:\*\*\*@127.0.0.1:1/x is unavailable: .*refused") as caught:
        database.heartbeat()
    assert time.monotonic() - began < 10
    assert "hunter2" not in str(caught.value)


def test_a_process_that_freezes_in_a_transaction(postgresql: PostgreSQL) -> None:
    """The server ends its transaction, so that others can write; the process can go on with a new one."""
    url = postgresql.new_database()
    frozen, other = StateDatabase.at(url), StateDatabase.at(url)
    frozen.publish(ME, [], NOW)
    with pytest.raises(StateAway, match="idle-in-transaction timeout"), frozen.writing() as connection:
        connection.execute(update(STATE).values(revision=5))
        began = time.monotonic()
        while not can_write(other):
            assert time.monotonic() - began < 60, "the lock is kept"
        connection.execute(update(STATE).values(revision=6))
    frozen.publish(ME, [], NOW)
    assert other.snapshot().heartbeat.revision == 0
    frozen.close()
    other.close()


def can_write(database: StateDatabase) -> bool:
    """Whether nobody keeps the lock of the state for longer than a statement may take."""
    try:
        with database.writing() as connection:
            connection.execute(update(STATE).values(revision=0))
    except StateAway:
        return False
    return True
