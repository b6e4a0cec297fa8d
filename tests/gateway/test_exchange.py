"""One request between a client and its replicas: what passes, what is retried, what is told."""

import pytest

from tests.fakes.running import FakeReplica
from tests.gateway.fleet import Fleet

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_smoke(fleet: Fleet, fake: FakeReplica) -> None:
    """x"""
    with fleet.replicas(("hi", fake.url)):
        answer = await fleet.ask()
        print(answer.headers, answer.text)
        assert answer.status_code == 200
