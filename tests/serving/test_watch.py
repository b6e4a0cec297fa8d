"""Replicas that somebody else runs."""

import signal

from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica, State
from serving.watch import Watch
from tests.fakes.running import running_fake
from tests.serving.supervised import ready, until


async def test_foreign_replica_is_followed() -> None:
    """It is ready once it answers, under the name that it really serves, and failed when it is gone."""
    registry = Registry()
    async with running_fake(served="something") as fake, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4")
        async with Watch((far,), registry, probe, every_seconds=0.02):
            assert (await ready(registry)).replica.served_name == "something"
            fake.process.send_signal(signal.SIGKILL)
            status = await until(registry, lambda status: status.state is State.FAILED)
            assert "is not healthy" in status.reason


async def test_wrong_credential_is_told() -> None:
    """A replica that refuses our key is healthy but not ready."""
    registry = Registry()
    async with running_fake(env={"VLLM_API_KEY": "right"}) as fake, Probe() as probe:
        far = Replica("int4-1", "int4", "int4", fake.url, "int4", api_key="wrong")
        async with Watch((far,), registry, probe, every_seconds=0.02):
            status = await until(registry, lambda status: status.state is State.FAILED)
            assert "401" in status.reason
