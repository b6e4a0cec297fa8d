"""The gateway that clients are run against: one alias, before a fake."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.replica import Replica, State
from tests.fakes.running import running_fake
from tests.gateway.fleet import Fleet, deployment, running_gateway

MODEL = "qwq-32b"


@asynccontextmanager
async def serving(silence_seconds: float = 0.0) -> AsyncIterator[Fleet]:
    """Serve `MODEL`, silent for a while before every first token."""
    changes = {"variants": {"v": {"precision": "bf16"}}, "aliases": {MODEL: {"ladder": ["v"], "think": "none"}}}
    flags = ("--fake-first-token-seconds", str(silence_seconds)) if silence_seconds else ()
    async with running_fake(*flags) as fake, running_gateway(deployment(changes)) as fleet:
        replica = Replica("v-1", "v", "bf16", fake.url, "m1", max_model_len_tokens=32768, tools=True)
        fleet.registry.put(replica, State.READY)
        yield fleet
