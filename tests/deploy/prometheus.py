"""A real Prometheus, as Debian installs it, with the configuration and the rules of deploy/prometheus."""

import asyncio
import os
import shutil
import tempfile
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.deploy.promql import PROMETHEUS, RULES
from tests.fakes.running import DEADLINE_SECONDS, HOST, eventually
from tests.gateway.test_workers import free_ports

Series = list[dict[str, Any]]


def program(name: str) -> str | None:
    """The path of `prometheus` or `promtool`."""
    return shutil.which(name)


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A Prometheus that runs."""

    client: httpx.AsyncClient

    async def query(self, expression: str) -> Series:
        """The series of a query now; AssertionError if it is refused."""
        return await self._result("query", query=expression)

    async def query_range(self, expression: str, start: float, end: float, step: float) -> Series:
        """The series of a query over a time."""
        return await self._result("query_range", query=expression, start=start, end=end, step=step)

    async def alerts(self) -> dict[str, str]:
        """The state of each alert that is pending or firing, by name."""
        response = await self.client.get("/api/v1/alerts")
        return {alert["labels"]["alertname"]: alert["state"] for alert in response.json()["data"]["alerts"]}

    async def _result(self, path: str, **form: Any) -> Series:
        response = await self.client.post(f"/api/v1/{path}", data=form)
        assert response.status_code == 200, response.text
        data = response.json()["data"]
        found: Series = [{"metric": {}, "value": data["result"]}] if data["resultType"] == "scalar" else data["result"]
        return found


@asynccontextmanager
async def running_prometheus(
    executable: str, targets: Mapping[str, Sequence[str]], scrape_seconds: int = 1
) -> AsyncIterator[Prometheus]:
    """Run it on a free port; `targets` are host:port by job. Rules are evaluated as often as it scrapes."""
    address = f"{HOST}:{free_ports(1)[0]}"
    with tempfile.TemporaryDirectory(prefix="prometheus-") as name:
        folder = Path(name)
        config = folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(configuration(targets, scrape_seconds)))
        with (folder / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(executable, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
                *(f"--web.listen-address={address}", "--query.lookback-delta=15s"),
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "GOMAXPROCS": "1"},
            )
        try:
            async with httpx.AsyncClient(
                base_url=f"http://{address}", timeout=DEADLINE_SECONDS, trust_env=False
            ) as client:
                await eventually(lambda: _ready(client))
                yield Prometheus(client)
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def configuration(targets: Mapping[str, Sequence[str]], scrape_seconds: int) -> dict[str, Any]:
    """The configuration of deploy/prometheus with other targets, in a hurry."""
    document: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    jobs = [
        {"job_name": job["job_name"], "static_configs": [{"targets": list(targets[job["job_name"]])}]}
        for job in document["scrape_configs"]
    ]
    return {
        "global": {"scrape_interval": f"{scrape_seconds}s", "evaluation_interval": f"{scrape_seconds}s"},
        "rule_files": [str(path) for path in RULES],
        "scrape_configs": jobs,
    }


async def _ready(client: httpx.AsyncClient) -> bool:
    with suppress(httpx.TransportError):
        return (await client.get("/-/ready")).status_code == 200
    return False
