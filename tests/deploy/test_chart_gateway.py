"""A gateway runs with what the chart renders: it takes a new ConfigMap, and finds the pods of a variant."""

import asyncio
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.deploy.chart import NAMESPACE, Chart
from tests.deploy.test_chart_config import SECRETS, quantgate
from tests.fakes.kubernetes.running import running_cluster
from tests.fakes.running import DEADLINE_SECONDS, HOST, ROOT, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO
from tests.gateway.test_workers import free_ports


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gateway runs here: its ports, its writable directory, and its volume with the configuration."""

    client: int
    admin: int
    home: Path
    volume: Path

    def here(self, text: str) -> str:
        """Replace the addresses and paths of a pod in quantgate.yaml."""
        places = {
            "0.0.0.0:8000": f"{HOST}:{self.client}",
            "0.0.0.0:8001": f"{HOST}:{self.admin}",
            "/var/lib/quantgate": str(self.home),
        }
        for in_pod, here in places.items():
            assert in_pod in text
            text = text.replace(in_pod, here)
        return text

    def mount(self, version: str, files: Mapping[str, str]) -> None:
        """Write the volume as the kubelet does: files are links through `..data`, which one rename turns over."""
        (self.volume / version).mkdir(parents=True)
        for name, text in files.items():
            (self.volume / version / name).write_text(text)
            if not (self.volume / name).is_symlink():
                (self.volume / name).symlink_to(Path("..data", name))
        data = self.volume / "..data"
        before = data.readlink() if data.is_symlink() else None
        (self.volume / "..data_tmp").symlink_to(version)
        (self.volume / "..data_tmp").rename(data)
        if before is not None:
            shutil.rmtree(self.volume / before)


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway that runs, and a client."""

    place: Place
    process: Process
    http: httpx.AsyncClient

    async def ready(self) -> bool:
        """Whether an alias can be answered."""
        with suppress(httpx.TransportError):
            return (await self.http.get(f"http://{HOST}:{self.place.admin}/readyz")).status_code == 200
        return False

    async def status(self, model: str, key: str) -> int:
        """The status of a request."""
        address = f"http://{HOST}:{self.place.client}{CHAT}"
        headers = {"authorization": f"Bearer {key}"}
        return (await self.http.post(address, json={**HELLO, "model": model}, headers=headers)).status_code


def place_in(folder: Path) -> Place:
    """A place for one gateway."""
    client, admin = free_ports(2)
    (folder / "home").mkdir()
    return Place(client, admin, folder / "home", folder / "etc")


@asynccontextmanager
async def gateway(place: Place) -> AsyncIterator[Running]:
    """Run `quantgate gateway` as the container does; it gets SIGTERM at the end, and ends well."""
    command = (sys.executable, "-m", "quantgate", "gateway", str(place.volume / "quantgate.yaml"))
    environment = {**os.environ, **SECRETS, "QUANTGATE_HOME": str(place.home), "HOME": str(place.home)}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stderr=DEVNULL)
    try:
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as http:
            yield Running(place, process, http)
            assert process.returncode is None
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            await process.wait()
    assert process.returncode == 0


async def test_a_gateway_takes_a_new_config_map(chart: Chart, tmp_path: Path) -> None:
    """The links stay, `..data` changes: an alias and a key that are new are there, and nothing was restarted."""
    place, keys = place_in(tmp_path), tmp_path / "keys.yaml"
    first = create_key(keys, "team-a")
    before = keys.read_text()
    second = create_key(keys, "team-b")
    async with running_fake(served="hi") as fake:

        def text(*aliases: str) -> str:
            changes = {
                "variants": None,
                "config.variants": {"hi": {"precision": "bf16"}},
                "config.replicas": [{"variant": "hi", "url": fake.url}],
                "config.aliases": {alias: {"ladder": ["hi"]} for alias in aliases},
            }
            return place.here(chart.rendered(changes=changes).config_text())

        place.mount("..2026_01", {"quantgate.yaml": text("smol"), "keys.yaml": before})
        async with gateway(place) as running:

            async def statuses() -> list[int]:
                asked = (("smol", first), ("big", first), ("smol", second))
                return [await running.status(model, key) for model, key in asked]

            async def taken() -> bool:
                return await statuses() == [200, 200, 200]

            await eventually(running.ready)
            assert await statuses() == [200, 404, 401]
            place.mount("..2026_02", {"quantgate.yaml": text("smol", "big"), "keys.yaml": keys.read_text()})
            await eventually(taken)


async def test_a_gateway_finds_the_pods(chart: Chart, tmp_path: Path) -> None:
    """By the name and the port of the Service that the chart creates, with its labels on the slices."""
    place, keys = place_in(tmp_path), tmp_path / "keys.yaml"
    key = create_key(keys, "team-a")
    async with running_cluster() as cluster, running_fake(served="qwq-int4") as fake:
        access = {"server": cluster.url, "token_file": str(cluster.token_file)}
        changes: dict[str, Any] = {
            "models.mountInGateway": False,
            "variants.qwq-int4.precision": "int4",
            "config.gateway": {"kubernetes": access},
        }
        rendered = chart.rendered(changes=changes)
        (entry,) = rendered.config()["replicas"]
        service = rendered.of("Service")[entry["kubernetes"]["service"]]["metadata"]
        # The fake cluster has one namespace.
        text = place.here(rendered.config_text()).replace(f"namespace: {NAMESPACE}", "namespace: default")
        place.mount("..2026_01", {"quantgate.yaml": text, "keys.yaml": keys.read_text()})
        async with gateway(place) as running:
            await cluster.add_workload(service["name"], 1, [(HOST, fake.port)], labels=service["labels"])
            await eventually(running.ready)
            assert await running.status("qwq-32b", key) == 200
            (asked,) = fake.requests(CHAT)[-1:]
            assert asked["path"] == CHAT


def create_key(keys: Path, name: str) -> str:
    """Create an API key."""
    return quantgate("keys", "create", name, "--file", keys).stdout.strip()
