"""A closed-loop load ramp over HTTP: each user sends the next request as soon as the last answer has ended."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from gateway.routing.explain import Explanation, explain_recorded
from gateway.routing.snapshot import read_snapshot

ANSWER_TOKENS = 24
LOOK_SECONDS = 0.1
TOPICS = ("rivers", "tea", "glass", "birds", "chess", "snow", "bread", "maps", "wool", "bees", "iron")


@dataclass(frozen=True, slots=True)
class Stage:
    """A number of users, for some seconds."""

    users: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Route:
    """Which replica answered, and why; the fields are those of the `x-quantgate-*` headers."""

    variant: str
    precision: str
    replica: str
    reason: str


NO_ROUTE = Route("", "", "", "")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; times are monotonic, `first_at` is None if no token came.

    `route` is NO_ROUTE if the first token took so long that the stream began with a heartbeat: then the headers were
    sent before a replica had answered.
    """

    id: str
    users: int
    asked_at: float
    first_at: float | None
    status: int
    route: Route


@dataclass(slots=True, eq=False)
class Users:
    """Streams from an alias for `wanted` users at a time, and records each request in `asked`."""

    client: httpx.AsyncClient
    alias: str
    name: str
    headers: Mapping[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    wanted: int = 0
    _numbers: int = 0

    async def ramp(self, stages: Sequence[Stage], enough: Callable[[], bool] = lambda: False) -> None:
        """Run all stages, or until `enough`; returns when the last answer has ended."""
        async with asyncio.TaskGroup() as users:
            for stage in stages:
                here, self.wanted = self.wanted, stage.users
                for number in range(here, stage.users):
                    users.create_task(self._user(number))
                until = time.monotonic() + stage.seconds
                while time.monotonic() < until and not enough():  # noqa: ASYNC110 - answers are looked at
                    await asyncio.sleep(LOOK_SECONDS)
            self.wanted = 0

    async def ask(self) -> Asked:
        """Send one request and read its answer."""
        self._numbers += 1
        request_id, asked_at, users = f"{self.name}-{self._numbers}", time.monotonic(), self.wanted
        headers = {**self.headers, "x-request-id": request_id}
        body = question(self.alias, self._numbers)
        first_at = None
        async with self.client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if first_at is None and line.startswith("data: {"):
                    first_at = time.monotonic()
        route = Route(*(answer.headers.get(f"x-quantgate-{field}", "") for field in Route.__slots__))
        asked = Asked(request_id, users, asked_at, first_at, answer.status_code, route)
        self.asked.append(asked)
        return asked

    async def _user(self, number: int) -> None:
        while number < self.wanted:
            await self.ask()


def question(alias: str, number: int) -> dict[str, Any]:
    """A prompt of some 90 tokens with a beginning of its own: no prefix of it is cached."""
    words = [TOPICS[(number * step + number // step) % len(TOPICS)] for step in range(1, 13)]
    content = f"{number}. Tell a story of {', then of '.join(words)}. It should be short and end well."
    return {
        "model": alias,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": ANSWER_TOKENS,
        "ignore_eos": True,
        "stream": True,
    }


async def explanation_of(admin: httpx.AsyncClient, request_id: str) -> Explanation:
    """What `quantgate route explain --request` says of a request."""
    response = await admin.get(f"/admin/routing/{request_id}")
    return explain_recorded(read_snapshot(response.raise_for_status().content, request_id))


def explained(explanation: Explanation) -> Route:
    """Which replica should have answered, by an explanation."""
    chosen = explanation.chosen
    return Route(chosen.variant, chosen.precision, chosen.replica, chosen.reason) if chosen else NO_ROUTE
