"""Rollouts as the admin port shows and steers them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from config.errors import ConfigError
from gateway.rollout.administration import ENDED_SECONDS, READ_SECONDS, RolloutAdministration
from gateway.rollout.machine import Phase, Refused
from serving.errors import StateAway
from tests.gateway.rollout.driving import RolloutFixture, rollout_fixture


@asynccontextmanager
async def administered(state: str) -> AsyncIterator[tuple[RolloutFixture, RolloutAdministration]]:
    """An alias with its replicas, and the administration of a gateway, on one clock."""
    async with (
        rollout_fixture(state) as scene,
        RolloutAdministration(
            state, lambda: scene.configured, scene.snapshot, scene.registry, lambda: scene.now
        ) as administration,
    ):
        yield scene, administration


async def phases(scene: RolloutFixture, administration: RolloutAdministration) -> list[str]:
    """The phases that are shown, after the time of a read."""
    scene.now += READ_SECONDS
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
