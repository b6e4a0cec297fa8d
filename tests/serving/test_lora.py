"""LoRA adapters: replicas that serve them beside their variant."""

import dataclasses
from pathlib import Path

from config.lora import Lora
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Launch, Replica, State
from serving.watch import Watch
from tests.fakes.running import running_fake
from tests.serving.supervised import SLOW, launch, ready, supervised, supervising, until

ADAPTERS = (Lora("math", Path("/adapters/math"), 8), Lora("law", Path("/adapters/law"), 20))


def with_adapters(launched: Launch) -> Launch:
    """A launch whose variant has two adapters."""
    return dataclasses.replace(launched, variant=dataclasses.replace(launched.variant, loras=ADAPTERS))


async def test_a_replica_serves_its_adapters(tmp_path: Path) -> None:
    """It is a replica of its variant and of both adapters, each with a model name of its own; the load is one."""
    async with supervised(tmp_path, with_adapters(launch(tmp_path))) as registry:
        replica = (await ready(registry)).replica
        assert replica.adapters == ("math", "law")
        assert {name: each.served_name for name, (each,) in registry.ready.items()} == {
            "int4": "int4-1",
            "int4-math": "math",
            "int4-law": "law",
        }
        assert {each.id for (each,) in registry.ready.values()} == {"int4-1"}
        async with Probe() as probe:
            assert await probe.token_ids(replica.with_adapter("math"), "a") == (97,)


async def test_a_replica_without_its_adapter_has_failed(tmp_path: Path) -> None:
    """What it says it serves must be what it was started for: here its own arguments replace the adapters."""
    other = with_adapters(launch(tmp_path, "int4", "--lora-modules", "math=/adapters/other", "law=/adapters/law"))
    async with supervising(tmp_path, other, backoff=SLOW) as supervisor:
        status = await until(supervisor.registry, lambda status: status.state is State.FAILED)
        assert "serves another directory, /adapters/other, as the LoRA adapter math of /adapters/math" in status.reason


async def test_adapters_of_an_external_replica() -> None:
    """It answers the configured adapters that it lists; one that it lacks does not keep it from serving the rest."""
    registry = Registry()
    flags = ("--enable-lora", "--lora-modules", "math=/elsewhere", "more=/more")
    async with running_fake(*flags, served="something") as fake, Probe() as probe:
        far = Replica("int4-url-1", "int4", "int4", fake.url, "int4", adapters=("math", "law"))
        async with Watch((far,), registry, probe, every_seconds=0.02):
            assert (await ready(registry, "int4-url-1")).replica.adapters == ("math",)
            assert registry.ready.keys() == {"int4", "int4-math"}
            assert far.variants == {"int4", "int4-math", "int4-law"}


async def test_other_adapters_are_another_launch(tmp_path: Path) -> None:
    """A replica whose adapters have changed is replaced."""
    first = with_adapters(launch(tmp_path))
    async with supervising(tmp_path, first) as supervisor:
        await ready(supervisor.registry)
        fewer = dataclasses.replace(first, variant=dataclasses.replace(first.variant, loras=ADAPTERS[:1]))
        await supervisor.update((fewer,))
        (replica,) = supervisor.registry.ready["int4"]
        assert (replica.id, replica.adapters) == ("int4-1b", ("math",))
