"""A changed configuration is applied under load."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from config.schema import AliasSettings, Floor
from config.variant import PARENT_QUALITY, QualityMeasures, Variant
from gateway.deployment import read_deployment
from gateway.live_config import unserved_aliases
from gateway.process import everything, gateway_alone
from gateway.routing.target import Catalog
from serving.registry import Registry
from serving.replica import Replica, State
from serving.state.database import Owner, StateDatabase
from serving.state.link import Link
from serving.state.publisher import Publisher
from tests.fakes.running import eventually, running_fake
from tests.gateway.fleet import HELLO, clients
from tests.gateway.load import CLIENTS, Load
from tests.serving.supervised import fake_machine, model_directory, noted_sessions

REQUESTS = 200


def write(folder: Path, replicas: list[dict[str, Any]], ladder: list[str], **gateway: Any) -> Path:
    """Write a configuration as an editor does: replace the file."""
    names = ("old", "new")
    document = {
        "gateway": {
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
            "state": f"sqlite:///{folder}/state.db",
            **gateway,
        },
        "variants": {name: {"path": str(model_directory(folder / name))} for name in names},
        "replicas": [{"drain_seconds": 10, **replica} for replica in replicas],
        "aliases": {"smol": {"ladder": ladder}},
    }
    path, draft = folder / "quantgate.yaml", folder / "draft"
    draft.write_text(yaml.safe_dump(document))
    draft.replace(path)
    return path


@asynccontextmanager
async def running(folder: Path, path: Path) -> AsyncIterator[tuple[Registry, httpx.AsyncClient, httpx.AsyncClient]]:
    """Run `quantgate up` on fakes."""
    registry = Registry()
    async with (
        everything(read_deployment(path), fake_machine(folder), registry, folder, path) as addresses,
        clients(addresses) as (client, admin),
    ):
        yield registry, client, admin


def ready(registry: Registry) -> set[str]:
    """The ids of the ready replicas."""
    return {each.replica.id for each in registry.snapshot() if each.state is State.READY}


async def test_rolling_replacement_breaks_no_request(tmp_path: Path) -> None:
    """Two replicas are replaced, one after the other, under steady load: no request fails."""
    old = {"variant": "old", "count": 2, "args": ["--fake-tokens-per-second", "200"]}
    path = write(tmp_path, [old], ["old"])
    async with running(tmp_path, path) as (registry, client, _):
        await eventually(lambda: ready(registry) == {"old-1", "old-2"})
        load = Load(client)
        running_load = asyncio.create_task(load.run())
        await eventually(lambda: sum(load.answers.values()) > CLIENTS)
        write(tmp_path, [{**old, "max_num_seqs": 64}], ["old"])
        async with asyncio.timeout(60):
            while not {"old-1b", "old-2b"} <= load.answers.keys() or sum(load.answers.values()) < REQUESTS:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        load.stop.set()
        await running_load
        assert load.broken == []
        assert set(load.answers) == {"old-1", "old-2", "old-1b", "old-2b"}
        await eventually(lambda: len(noted_sessions(tmp_path)) == 2)
    assert noted_sessions(tmp_path) == set()


async def test_another_variant_behind_the_alias(tmp_path: Path) -> None:
    """The new ladder is used from when its replica is ready; no request fails."""
    path = write(tmp_path, [{"variant": "old"}], ["old"])
    async with running(tmp_path, path) as (registry, client, admin):
        await eventually(lambda: ready(registry) == {"old-1"})
        load = Load(client)
        running_load = asyncio.create_task(load.run())
        await eventually(lambda: load.answers)
        write(tmp_path, [{"variant": "new"}], ["new"])
        await eventually(lambda: load.answers.get("new-1", 0) > CLIENTS)
        load.stop.set()
        await running_load
        assert load.broken == []
        await eventually(lambda: ready(registry) == {"new-1"} and len(registry.snapshot()) == 1)
        assert (await admin.get("/readyz")).json() == {"aliases": {"smol": ["new"]}}
        assert 'quantgate_config_reloads_total{outcome="applied"} 1.0' in (await admin.get("/metrics")).text


async def test_an_invalid_file_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The refusal is logged and counted, the configuration stays, and the next valid file is applied."""
    path = write(tmp_path, [{"variant": "old"}], ["old"])
    async with running(tmp_path, path) as (registry, client, admin):
        await eventually(lambda: ready(registry) == {"old-1"})
        path.write_text(path.read_text().replace("ladder", "lader"))
        await eventually(lambda: "unknown key" in caplog.text)
        assert (await client.post("/v1/chat/completions", json=HELLO)).status_code == 200
        assert 'quantgate_config_reloads_total{outcome="refused"} 1.0' in (await admin.get("/metrics")).text
        write(tmp_path, [{"variant": "old"}], ["old"], limits={"body_bytes": 10})
        async with asyncio.timeout(10):
            while (await client.post("/v1/chat/completions", json=HELLO)).status_code != 413:
                pass


async def test_gateway_alone_follows_its_file(tmp_path: Path) -> None:
    """External replicas come and go with the file; an alias keeps its ladder until the new one has a replica."""
    async with running_fake() as first, running_fake() as second:
        path = write(tmp_path, [{"variant": "old", "url": first.url, "drain_seconds": 120}], ["old"])
        async with (
            gateway_alone(read_deployment(path), path) as addresses,
            clients(addresses) as (client, _),
        ):
            await answer_comes_from(client, "old")
            load = Load(client)
            running_load = asyncio.create_task(load.run())
            write(tmp_path, [{"variant": "new", "url": second.url, "drain_seconds": 120}], ["new"])
            await answer_comes_from(client, "new")
            load.stop.set()
            await running_load
            assert load.broken == []


async def answer_comes_from(client: httpx.AsyncClient, variant: str) -> None:
    """Wait until a variant answers."""
    async with asyncio.timeout(10):
        while True:
            answer = await client.post("/v1/chat/completions", json=HELLO)
            if answer.headers.get("x-quantgate-variant") == variant:
                return
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "before,after,ready_variants,unserved",
    [
        (["a"], ["b"], {"a"}, ["smol"]),
        (["a"], ["b"], {"a", "b"}, []),
        (["a"], ["b", "a"], {"a"}, []),
        (["a"], ["b"], set(), []),  # nothing is served before
        (["a"], None, {"a"}, []),  # the alias is removed
    ],
)
def test_unserved_aliases(
    before: list[str], after: list[str] | None, ready_variants: set[str], unserved: list[str]
) -> None:
    """An alias that is served before, and would not be afterwards."""

    def catalog(ladder: list[str] | None) -> Catalog:
        aliases = {} if ladder is None else {"smol": AliasSettings(ladder=tuple(ladder))}
        return Catalog(aliases, {name: Variant(name, "bf16", PARENT_QUALITY) for name in ladder or ()})

    assert unserved_aliases(catalog(before), catalog(after), ready_variants, ready_variants) == unserved


def test_unserved_aliases_with_a_floor() -> None:
    """Ready variants that miss the floor do not serve an alias, neither before nor afterwards."""
    variants = {
        "a": Variant("a", "bf16", PARENT_QUALITY),
        "b": Variant("b", "int4", QualityMeasures("unknown")),
    }

    def catalog(name: str) -> Catalog:
        return Catalog({"smol": AliasSettings(ladder=(name,), floor=Floor(kl_mean=0.1))}, variants)

    assert unserved_aliases(catalog("a"), catalog("a"), {"a"}, set()) == ["smol"]  # another replica of it is to come
    assert unserved_aliases(catalog("b"), catalog("a"), {"b"}, {"b"}) == []
    assert unserved_aliases(catalog("a"), catalog("b"), {"a", "b"}, {"a", "b"}) == ["smol"]


def external_settings(url: str) -> dict[str, Any]:
    """A `url:` replica of the variant `new`; other values of `drain_seconds` than the default need an own replica."""
    return {"variant": "new", "url": url, "drain_seconds": 120}


async def _sources(admin: httpx.AsyncClient) -> dict[str, str]:
    return {entry["id"]: entry["source"] for entry in (await admin.get("/admin/replicas")).json()}


async def _until_sources(admin: httpx.AsyncClient, expected: dict[str, str]) -> None:
    async with asyncio.timeout(10):
        while await _sources(admin) != expected:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_reload_leaves_replicas_of_other_sources_alone(tmp_path: Path) -> None:
    """A reload adds and removes `url:` replicas; those of the supervisor and of any other source stay."""
    own = {"variant": "old"}
    async with running_fake() as external, running_fake() as discovered:
        path = write(tmp_path, [own, external_settings(external.url)], ["old", "new"])
        async with running(tmp_path, path) as (registry, client, admin):
            registry.source("kubernetes").put(Replica("old-pod-1", "old", "bf16", discovered.url, "m1"), State.READY)
            await eventually(lambda: ready(registry) == {"old-1", "new-url-1", "old-pod-1"})
            assert await _sources(admin) == {
                "old-1": "supervisor",
                "new-url-1": "configuration",
                "old-pod-1": "kubernetes",
            }
            write(tmp_path, [own], ["old"])
            await eventually(lambda: len(registry.snapshot()) == 2)
            assert await _sources(admin) == {"old-1": "supervisor", "old-pod-1": "kubernetes"}
            assert ready(registry) == {"old-1", "old-pod-1"}
            await asyncio.gather(*(client.post("/v1/chat/completions", json=HELLO) for _ in range(CLIENTS)))
            assert discovered.requests("/v1/chat/completions")
            registry.source("kubernetes").keep_only(())
            assert await _sources(admin) == {"old-1": "supervisor"}


async def test_reload_of_a_gateway_leaves_published_replicas_alone(tmp_path: Path) -> None:
    """Without replicas of its own, a gateway keeps those of the state database when a `url:` replica is removed."""
    async with running_fake() as external, running_fake() as published:
        path = write(tmp_path, [external_settings(external.url)], ["old", "new"])
        link = Link(StateDatabase.at(f"sqlite:///{tmp_path}/state.db"))
        async with (
            Publisher(Owner("other", socket.gethostname(), 1), Registry(), link) as publisher,
            gateway_alone(read_deployment(path), path) as addresses,
            clients(addresses) as (client, admin),
        ):
            publisher.registry.put(Replica("old-1", "old", "bf16", published.url, "m1"), State.READY)
            await answer_comes_from(client, "old")
            await _until_sources(admin, {"new-url-1": "configuration", "old-1": "state database"})
            write(tmp_path, [], ["old", "new"])
            await _until_sources(admin, {"old-1": "state database"})
            await answer_comes_from(client, "old")
            publisher.registry.remove("old-1")
            await _until_sources(admin, {})
