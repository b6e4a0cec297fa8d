"""A gateway as a process: litellm is loaded only where a model needs it, and then says and sends nothing by itself."""

import asyncio
import os
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.fakes.running import HOST, PATIENCE_SECONDS, ROOT, FakeReplica, eventually
from tests.gateway.external.test_answers import asking
from tests.gateway.fleet import CHAT

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(frozen=True, slots=True)
class Running:
    """A gateway's process, with its addresses."""

    process: Process
    client: str
    admin: str
    stderr: Path

    async def stopped(self) -> tuple[bytes, str]:
        """End it; what it wrote to stdout and stderr."""
        self.process.terminate()
        async with asyncio.timeout(PATIENCE_SECONDS):
            out, _ = await self.process.communicate()
        return out, self.stderr.read_text(encoding="utf-8")


def listening(count: int) -> list[int]:
    """Free ports."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@asynccontextmanager
async def gateway_process(folder: Path, tables: dict[str, Any], **environment: str) -> AsyncIterator[Running]:
    """`quantgate gateway` that reports its imports on stderr; alive on entry."""
    client, admin = listening(2)
    config, stderr = folder / "quantgate.yaml", folder / "stderr"
    config.write_text(yaml.safe_dump({"gateway": {"listen": f"{HOST}:{client}", "admin": f"{HOST}:{admin}"}, **tables}))
    with stderr.open("wb") as written:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-X", "importtime", "-m", "quantgate", "gateway", str(config)),
            cwd=ROOT,
            env={**os.environ, "HOME": str(folder), "QUANTGATE_HOME": str(folder / "home"), **environment},
            stdout=PIPE,
            stderr=written,
        )
    running = Running(process, f"http://{HOST}:{client}", f"http://{HOST}:{admin}", stderr)
    try:
        await eventually(lambda: alive(running), 2 * PATIENCE_SECONDS)
        yield running
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def alive(running: Running) -> bool:
    """Whether a process answers."""
    assert running.process.returncode is None, running.stderr.read_text(encoding="utf-8")[-2000:]
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            return (await client.get(f"{running.admin}/livez")).status_code == 200
        except httpx.TransportError:
            return False


def imported(stderr: str) -> set[str]:
    """The top-level packages of an import report."""
    lines = [line for line in stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


async def test_without_external_models_litellm_is_not_loaded(tmp_path: Path) -> None:
    """Nor anything else of that extra."""
    tables = {
        "variants": {"hi": {"precision": "bf16"}},
        "replicas": [{"variant": "hi", "url": "http://127.0.0.1:9"}],
        "aliases": {"smol": {"ladder": ["hi"]}},
    }
    async with gateway_process(tmp_path, tables) as running:
        out, errors = await running.stopped()
    assert out == b""
    packages = imported(errors)
    assert "fastapi" in packages
    assert packages.isdisjoint({"litellm", "openai", "boto3", "botocore", "aiohttp", "tiktoken", "tokenizers"})


async def test_litellm_says_and_sends_nothing_by_itself(tmp_path: Path, provider: FakeReplica) -> None:
    """Nothing on stdout, no request but ours, and no secret in a log.

    Whatever would go to the network goes to a proxy, which counts connections.
    """
    connections = 0

    def count(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    model = {"external": "openai/gpt-4.1", "base_url": f"{provider.url}/v1", "api_key": "${env:PROVIDER_KEY}"}
    tables = {"variants": {"gpt": model}, "aliases": {"smol": {"ladder": ["gpt"]}}}
    async with await asyncio.start_server(count, HOST, 0) as proxy:
        address = f"http://{HOST}:{proxy.sockets[0].getsockname()[1]}"
        proxied = {"HTTPS_PROXY": address, "HTTP_PROXY": address, "NO_PROXY": HOST}
        async with gateway_process(tmp_path, tables, PROVIDER_KEY="sk-of-the-test", **proxied) as running:
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS) as client:
                for body in (asking("smol", "hello"), asking("smol", "hello", stream=True), asking("smol", "fail 401")):
                    await client.post(f"{running.client}{CHAT}", json=body)
            out, errors = await running.stopped()
    assert out == b""
    assert connections == 0
    assert running.process.returncode == 0
    assert "litellm" in imported(errors)
    said = [line for line in errors.splitlines() if not line.startswith("import time:")]
    assert not any("sk-of-the-test" in line for line in said)
    assert [line for line in said if "Traceback" in line or "github.com" in line or "Task" in line] == []
    assert provider.requests("/v1/chat/completions")[-1]["headers"]["authorization"] == "Bearer sk-of-the-test"
