"""Steady load on a gateway, for tests that change what is behind it."""

import asyncio
from dataclasses import dataclass, field

import httpx

from tests.gateway.fleet import HELLO

CLIENTS = 8


@dataclass(slots=True)
class Load:
    """Clients that send requests without a pause, unary and streaming; counts answers by replica."""

    client: httpx.AsyncClient
    answers: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Send requests until `stop` is set."""
        await asyncio.gather(*(self._ask(number) for number in range(CLIENTS)))

    async def _ask(self, number: int) -> None:
        while not self.stop.is_set():
            stream = bool(number % 2)
            answer = await self.client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
            whole = answer.status_code == 200 and (not stream or answer.text.endswith("data: [DONE]\n\n"))
            if not whole or '"error"' in answer.text:
                self.broken.append(answer.text)
            replica = answer.headers.get("x-quantgate-replica", "none")
            self.answers[replica] = self.answers.get(replica, 0) + 1
