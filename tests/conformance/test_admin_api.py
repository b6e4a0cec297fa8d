"""The operators' port against its own description: nothing that can be sent to it makes it fail."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from serving.replica import Replica, State
from tests.conformance.clients import CLIENTS
from tests.gateway.fleet import deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHECKS = "not_a_server_error,content_type_conformance,response_headers_conformance,response_schema_conformance"
SEED = "7"


async def test_the_admin_api(tmp_path: Path) -> None:
    """Schemathesis makes valid and invalid calls of every operation that the port says it has."""
    folder = CLIENTS / "schemathesis"
    if not folder.is_dir():
        pytest.skip("schemathesis is not installed; python3 deploy/install.py test does it")
    async with running_gateway(deployment()) as fleet:
        described = await fleet.admin.get("/admin/openapi.json")
        (tmp_path / "openapi.json").write_text(described.text, encoding="utf-8")
        fleet.registry.put(Replica("r", "hi", "bf16", "http://127.0.0.1:1", "m1"), State.READY)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", str(tmp_path / "openapi.json")),
            *("--url", f"http://{fleet.served.addresses.admin}", "--checks", CHECKS, "--max-examples", "20"),
            *("--seed", SEED, "--no-color", "--suppress-health-check", "all"),
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()[-3000:]
