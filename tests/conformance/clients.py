"""The SDKs and frameworks that speak to the gateway in these tests, each in a process with its own version."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.running import ROOT

# `deploy/install.py test` puts the others beside the environment's own.
CLIENTS = ROOT / ".venv" / "clients"
NEWEST = "newest"
OPENAI = ("openai-1.109.1", "openai-2.54.0", NEWEST)
ANTHROPIC = ("anthropic-0.75.0", NEWEST)
PROGRAM = Path(__file__).with_name("program.py")
DEADLINE_SECONDS = 60


async def called(client: str, url: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Have one version of a client make some calls; skips the test where it isn't installed."""
    folder = CLIENTS / client
    if client != NEWEST and not folder.is_dir():
        pytest.skip(f"{client} is not installed; python3 deploy/install.py test does it")
    path = {} if client == NEWEST else {"PYTHONPATH": str(folder)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(PROGRAM)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith(("COVERAGE", "PYTHON"))} | path,
    )
    job = json.dumps({"url": url, "calls": calls}).encode()
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            printed, complained = await process.communicate(job)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, complained.decode()
    results: list[dict[str, Any]] = json.loads(printed)
    return results


def text_of(chunks: list[dict[str, Any]]) -> str:
    """What a chat stream said, as an application puts it together."""
    return "".join(choice["delta"]["content"] or "" for chunk in chunks for choice in chunk["choices"] or ())
