"""Rollouts as the admin port shows and steers them."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import update

from config.errors import ConfigError
from gateway.rollout.administration import ENDED_SECONDS, READ_SECONDS, RolloutAdministration
from gateway.rollout.machine import Event, Phase, Preconditions, Refused
from gateway.rollout.record import UnreadableRecord
from serving.errors import RolloutChanged, StateAway
from serving.state.tables import ROLLOUT_BLOCKS, ROLLOUTS
from tests.gateway.rollout.driving import RolloutFixture, rollout_fixture


@asynccontextmanager
async def administered(state: str) -> AsyncIterator[tuple[RolloutFixture, RolloutAdministration]]:
    """An alias with its replicas, and the administration of a gateway, on one clock."""
    async with (
        rollout_fixture(state) as scene,
        RolloutAdministration(
            *(state, lambda: scene.configured, scene.snapshot, scene.registry),
            wall_clock=lambda: scene.now,
            clock=lambda: scene.monotonic,
        ) as administration,
    ):
        yield scene, administration


def administered_again(scene: RolloutFixture, state: str) -> RolloutAdministration:
    """The administration of another gateway, which has read nothing."""
    return RolloutAdministration(
        state, lambda: scene.configured, scene.snapshot, scene.registry, wall_clock=lambda: scene.now
    )


async def phases(scene: RolloutFixture, administration: RolloutAdministration) -> list[str]:
    """The phases that are shown, after the time of a read."""
    scene.monotonic += READ_SECONDS
    await administration.refresh()
    return [status["phase"] for status in administration.statuses]


async def test_a_rollout_is_followed_and_steered(state: str) -> None:
    """It is described as `rollout status --json` does, steered by name, and shown for an hour after its end."""
    async with administered(state) as (scene, administration):
        assert await phases(scene, administration) == []
        scene.start()
        await scene.reach(Phase.CANARY)
        assert await phases(scene, administration) == ["canary"]
        assert administration.statuses[0]["new"] == "odd"
        assert (await administration.steer("smol", "pause", "looks odd"))["phase"] == "paused"
        await administration.refresh()
        assert administration.statuses[0]["phase"] == "paused", "a command is seen at once"
        with pytest.raises(Refused):
            await administration.steer("smol", "pause", "")
        await administration.steer("smol", "abort", "")
        assert (await scene.end(), await phases(scene, administration)) == (Phase.ROLLED_BACK, ["rolled_back"])
        steered = [(entry.event, entry.why) for entry in scene.log() if entry.by.startswith("admin@")]
        assert [event for event, _ in steered] == ["pause", "abort"]
        assert steered[0][1] == "looks odd"
        with pytest.raises(Refused):
            await administration.steer("smol", "resume", "")
        scene.now += ENDED_SECONDS
        assert await phases(scene, administration) == []


async def test_what_cannot_be_steered(state: str) -> None:
    """An alias that does not exist, one without a rollout, and a gateway without a state database."""
    async with administered(state) as (_, administration):
        with pytest.raises(ConfigError, match="no alias 'nobody'"):
            await administration.steer("nobody", "pause", "")
        with pytest.raises(Refused, match="no rollout of smol"):
            await administration.steer("smol", "pause", "")
        async with RolloutAdministration(
            None, administration.deployment, administration.snapshot, administration.registry
        ) as without:
            await without.refresh()
            with pytest.raises(ConfigError, match=r"gateway\.state is not set"):
                await without.steer("smol", "pause", "")


async def test_while_the_database_is_away(tmp_path: Path) -> None:
    """A status shows what was read last, and a command says that it was not done."""
    async with administered(f"sqlite:///{tmp_path}/state.db") as (scene, administration):
        scene.start()
        assert await phases(scene, administration) == ["preflight"]
        recorded = scene.snapshot()
        (tmp_path / "broken.db").write_bytes(b"not a database" * 100)
        async with RolloutAdministration(
            f"sqlite:///{tmp_path}/broken.db", lambda: scene.configured, lambda: recorded, scene.registry
        ) as away:
            away.statuses = administration.statuses
            await away.refresh()
            assert [status["phase"] for status in away.statuses] == ["preflight"]
            with pytest.raises(StateAway):
                await away.steer("smol", "pause", "")
        assert scene.phase() is Phase.PREFLIGHT


def spoil_evidence(scene: RolloutFixture) -> None:
    """Make every block that is there unreadable: who reads it again fails."""
    with scene.database.database.writing() as connection:
        connection.execute(update(ROLLOUT_BLOCKS).values(document="of another version"))


async def test_evidence_is_read_once(state: str) -> None:
    """A further look reads only blocks written since, a command none, and a rollout that ended long ago is not read."""
    async with administered(state) as (scene, administration):
        scene.start(step_seconds=900)
        await scene.reach(Phase.CANARY)
        scene.see()
        scene.see()
        await scene.step()  # the driver has read them, too
        await phases(scene, administration)
        before = administration.statuses[0]["stable_conversations"]
        spoil_evidence(scene)
        scene.see()
        await phases(scene, administration)
        assert administration.statuses[0]["stable_conversations"] == before * 3 / 2
        assert administration.statuses[0]["failure"] == ""
        await administration.steer("smol", "abort", "no evidence is needed for that")
        await administration.refresh()
        assert administration.statuses[0]["phase"] == "rolling_back"
        await scene.end()
        scene.now += ENDED_SECONDS + 1
        async with administered_again(scene, state) as other:
            await other.refresh()
            assert other.statuses == ()


async def test_a_command_for_another_state(state: str) -> None:
    """What was shown when it was chosen must still be so: no other rollout is steered, and no step is skipped."""
    async with administered(state) as (scene, administration):
        old = scene.start()
        await administration.steer("smol", "abort", "")
        await scene.end()
        new = scene.start()
        with pytest.raises(RolloutChanged, match=f"rollout {new.id} of smol, in phase preflight, step 1 now"):
            await administration.steer("smol", "abort", "", Preconditions(old.id))
        await scene.reach(Phase.CANARY)
        seen = Preconditions(new.id, Phase.CANARY, 0)
        assert (await administration.steer("smol", "promote", "", seen))["step"] == 1
        with pytest.raises(RolloutChanged, match="in phase canary, step 2 now"):
            await administration.steer("smol", "promote", "", seen)
        with pytest.raises(RolloutChanged):
            await administration.steer("smol", "resume", "", Preconditions(phase=Phase.PAUSED))
        assert (await administration.steer("smol", "promote", "", Preconditions(step=1)))["step"] == 2
        assert (await administration.steer("smol", "abort", ""))["phase"] == "rolling_back"


@pytest.mark.parametrize("column", ["plan", "state", "evidence"])
async def test_what_another_version_recorded(state: str, column: str, caplog: pytest.LogCaptureFixture) -> None:
    """It is shown as unreadable, named once in the log, and hides nothing else."""
    async with administered(state) as (scene, administration):
        record = scene.start(step_seconds=900)
        await scene.reach(Phase.CANARY)
        scene.see()
        if column == "evidence":
            spoil_evidence(scene)
        else:
            with scene.database.database.writing() as connection:
                connection.execute(update(ROLLOUTS).values(**{column: '{"phase": "new", "alias": 1}'}))
        with caplog.at_level(logging.WARNING, "gateway.rollout.administration"):
            assert [await phases(scene, administration) for _ in range(2)] == [["canary"]] * 2
        (status,) = administration.statuses
        assert (status["rollout"], status["alias"], status["steps"]) == (record.id, "smol", [])
        assert status["failure"].startswith(f"unreadable: the {column} of rollout {record.id} was recorded by another")
        assert [entry.getMessage().split(":")[0] for entry in caplog.records] == [
            f"rollout {record.id} of smol cannot be described"
        ]
        if column != "evidence":
            with pytest.raises(UnreadableRecord):
                await administration.steer("smol", "abort", "")


async def test_the_wall_clock_is_set_back(state: str) -> None:
    """The rollouts are read on by the monotonic clock."""
    async with administered(state) as (scene, administration):
        scene.start()
        await phases(scene, administration)
        scene.now -= 7200
        scene.steer(Event.PAUSE)
        assert await phases(scene, administration) == ["paused"]
