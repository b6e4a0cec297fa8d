"""Records of rollouts in the state database, of both kinds."""

from dataclasses import replace
from pathlib import Path

import pytest

from serving.errors import LeaseLost, RolloutChanged, RolloutExists
from serving.state.database import StateDatabase
from serving.state.rollout_records import (
    EMPTY,
    BlockRecord,
    Change,
    Demand,
    DrawRecord,
    LogEntry,
    RevisionRecord,
    RolloutRecord,
)
from serving.state.rollouts import RolloutDatabase

NOW = 1_800_000_000.0
FIRST = RolloutRecord("r-1", "smol", "{}", "{}", "preflight", True, 0, "anna", NOW)


def entry(event: str = "start", rollout: str | None = "r-1") -> LogEntry:
    return LogEntry("smol", NOW, "anna", event, "preflight", f"why {event}", rollout=rollout)


def change(phase: str = "canary", *, active: bool = True, revision: str | None = None) -> Change:
    return Change(f'{{"phase": "{phase}"}}', phase, active, (entry(phase),), revision)


@pytest.fixture
def database(state: str) -> "RolloutDatabase":
    return RolloutDatabase(StateDatabase.at(state))


def test_one_rollout_per_alias(database: RolloutDatabase) -> None:
    """The second operator learns whose rollout is active; another alias is free, and so is a final state."""
    database.start(FIRST, entry())
    with pytest.raises(RolloutExists, match=r"anna already runs rollout r-1 of smol \(phase preflight\)"):
        database.start(replace(FIRST, id="r-2", started_by="ben"), entry(rollout="r-2"))
    database.start(replace(FIRST, id="r-3", alias="big"), entry(rollout="r-3"))
    database.change("r-1", 0, change("failed", active=False), "driver", NOW, None)
    database.start(replace(FIRST, id="r-2", started_at=NOW + 1), entry(rollout="r-2"))
    latest = database.latest("smol")
    assert latest is not None
    assert latest.id == "r-2"
    database.database.close()


def test_a_change_is_one_step(database: RolloutDatabase) -> None:
    """State, log, revision and count change together, or not at all."""
    database.start(FIRST, entry())
    _, before = database.revision()
    database.change("r-1", 0, change(revision='{"weight": 0.01}'), "driver", NOW, None)
    with pytest.raises(RolloutChanged):
        database.change("r-1", 0, change(revision='{"weight": 0.05}'), "driver", NOW, None)
    snapshot = database.snapshot()
    assert snapshot.revision == before + 1
    assert [(each.number, each.document) for each in snapshot.aliases] == [(1, '{"weight": 0.01}')]
    assert [each.phase for each in snapshot.active] == ["canary"]
    assert [each.event for each in database.entries("smol")] == ["start", "canary"]
    assert database.entries("smol", limit=1)[0].event == "canary"
    database.database.close()


def test_a_driver_that_lost_its_lease_writes_nothing(database: RolloutDatabase) -> None:
    """The fencing number grows with every change of the holder."""
    database.start(FIRST, entry())
    assert database.lease("smol", "a", NOW, 10) == 1
    assert database.lease("smol", "b", NOW + 5, 10) is None
    assert database.lease("smol", "a", NOW + 5, 10) == 1
    assert database.lease_holder("smol", NOW + 6) == "a"
    assert database.lease("smol", "b", NOW + 16, 10) == 2
    with pytest.raises(LeaseLost):
        database.change("r-1", 0, change(), "a", NOW, fence=1)
    assert [each.phase for each in database.snapshot().active] == ["preflight"]
    database.change("r-1", 0, change(), "b", NOW, fence=2)
    database.release("smol", "b")
    assert database.lease("smol", "a", NOW + 17, 10) == 3
    database.database.close()


def test_revisions_without_a_rollout(database: RolloutDatabase) -> None:
    """They are numbered by alias; while a rollout is active there are none."""
    record = RevisionRecord("smol", 0, "{}", "undo", "anna", NOW)
    numbers = [database.revise(record, entry("undo", None)) for _ in range(2)]
    numbers.append(database.revise(replace(record, alias="big"), entry("undo", None)))
    assert numbers == [1, 2, 1]
    assert [each.number for each in database.revisions("smol")] == [2, 1]
    database.start(FIRST, entry())
    with pytest.raises(RolloutExists):
        database.revise(record, entry("undo", None))
    database.database.close()


def test_evidence_is_added_once(database: RolloutDatabase) -> None:
    """A worker that repeats a write changes nothing; the draws of an ended rollout are removed."""
    database.start(FIRST, entry())
    block = BlockRecord("r-1", "w", 7, NOW, "{}")
    draws = [DrawRecord(2**62, "canary", 0), DrawRecord(5, "stable", 1)]
    for _ in range(2):
        database.add_evidence("r-1", [block], draws)
    database.add_evidence("r-1", [replace(block, worker="v", at=NOW + 10)], [DrawRecord(5, "canary", 2)])
    assert [each.worker for each in database.blocks("r-1")] == ["v", "w"]
    assert [each.worker for each in database.blocks("r-1", NOW + 1)] == ["v"]
    highest, found = database.draws("r-1")
    assert list(found) == draws
    assert database.draws("r-1", highest)[0] == highest
    database.change("r-1", 0, change("done", active=False), "driver", NOW, None)
    assert database.draws("r-1") == (0, ())
    database.add_evidence("r-1", [], draws)
    assert database.draws("r-1") == (0, ())
    database.database.close()


def test_hooks_are_run_once(database: RolloutDatabase) -> None:
    """Entries wait for their hooks until those have run; what belongs to no rollout has none."""
    database.start(FIRST, entry())
    database.log(entry("note", None))
    (waiting,) = database.without_hooks("r-1")
    database.hooked(waiting.seq)
    assert database.without_hooks("r-1") == ()
    database.database.close()


def test_demands_replace_each_other(database: RolloutDatabase) -> None:
    """The latest one of a variant counts."""
    database.start(FIRST, entry())
    start, stop = Demand("new", "old", True, "r-1"), Demand("new", "old", False, "r-1")
    database.change("r-1", 0, replace(change(), demands=(start,)), "d", NOW, None)
    database.change("r-1", 1, replace(change(), demands=(stop,)), "d", NOW, None)
    assert database.snapshot().demands == (stop,)
    database.database.close()


def test_who_only_looks_makes_nothing(tmp_path: Path) -> None:
    """Without a database there are no rollouts, and no file."""
    database = RolloutDatabase(StateDatabase.at(f"sqlite:///{tmp_path}/state.db", create=False))
    assert (database.snapshot(), database.revision(), database.latest("smol")) == (EMPTY, ("", 0), None)
    assert list(tmp_path.iterdir()) == []


def test_a_change_that_another_rollout_has_overtaken(database: RolloutDatabase) -> None:
    """What is based on a snapshot is refused after any other change: the other rollout may use the same replicas."""
    database.start(FIRST, entry())
    seen = database.snapshot().revision
    database.start(replace(FIRST, id="r-2", alias="big"), entry(rollout="r-2"))
    with pytest.raises(RolloutChanged, match="another rollout has changed meanwhile"):
        database.change("r-1", 0, change(), "driver", NOW, None, seen)
    seen = database.snapshot().revision
    database.change("r-1", 0, change(), "driver", NOW, None, seen)
    assert database.snapshot().revision == seen + 1
    database.database.close()
