"""A steady load of conversations over HTTP, and what each of them saw."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

MAX_TOKENS = 16
SAMPLING = {"max_tokens": MAX_TOKENS, "temperature": 0.5}
DEADLINE_SECONDS = 120.0
PLACES = ("France", "Italy", "Japan", "Spain", "Egypt", "Peru", "Kenya", "Norway", "Greece", "Cuba", "India", "Chile")
# Where the arm's own variant has no replica in reach, another one answers: that is no move.
ELSEWHERE = ("spill", "fallback")

HEADINGS = ("rollout", "ended", "exit code", "seconds", "conversations", "saw it", "requests/s", "failed", "moved")


@dataclass(frozen=True, slots=True)
class Row:
    """What a rollout came to; of conversations after `start`, the variant answered `saw`."""

    name: str
    ended: str
    code: int
    seconds: float
    conversations: int
    saw: int
    requests_per_second: float
    failed: int
    moved: int

    def cells(self) -> list[str]:
        """The row as Markdown cells."""
        saw = f"{self.saw} ({self.saw / max(self.conversations, 1):.1%})"
        counts = [str(self.failed), str(self.moved)]
        times = f"{self.seconds:.0f}"
        rate = f"{self.requests_per_second:.1f}"
        return [self.name, self.ended, str(self.code), times, str(self.conversations), saw, rate, *counts]


@dataclass(slots=True)
class Talk:
    """One conversation: when it began, who answered, and how many requests it made."""

    began_at: float
    variants: set[str] = field(default_factory=set)
    requests: int = 0


@dataclass(slots=True)
class Load:
    """So many users at a time, each with one conversation after the other, of two or three streamed turns.

    Every second conversation is named by `x-session-id`; the others are known by their opening. `pause_seconds` is
    between two turns.
    """

    url: str
    alias: str
    users: int
    pause_seconds: float = 0.0
    talks: list[Talk] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Load"]:
        """Keep it up while the `async with` block runs; the last answers are waited for."""
        ending = asyncio.Event()
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_SECONDS, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as users,
        ):
            for _ in range(self.users):
                users.create_task(self._user(client, ending))
            try:
                yield self
            finally:
                ending.set()

    def since(self, moment: float) -> list[Talk]:
        """The conversations that began after a moment (monotonic) and were answered."""
        return [talk for talk in self.talks if talk.began_at >= moment and talk.requests]

    def saw(self, variant: str, since: float = 0.0) -> int:
        """How many conversations a variant answered."""
        return sum(variant in talk.variants for talk in self.since(since))

    @property
    def moved(self) -> int:
        """How many conversations were answered by more than one variant."""
        return sum(len(talk.variants) > 1 for talk in self.talks)

    async def _user(self, client: httpx.AsyncClient, ending: asyncio.Event) -> None:
        while not ending.is_set():
            number = len(self.talks)
            self.talks.append(talk := Talk(time.monotonic()))
            messages: list[dict[str, str]] = []
            headers = {"x-session-id": f"talk-{number}"} if number % 2 else {}
            for turn in range(2 + number // 2 % 2):
                messages.append({"role": "user", "content": question(number, turn)})
                answer = await self._ask(client, talk, messages, headers)
                if answer is None or ending.is_set():
                    break
                messages.append({"role": "assistant", "content": answer})
                await asyncio.sleep(self.pause_seconds)

    async def _ask(
        self, client: httpx.AsyncClient, talk: Talk, messages: list[dict[str, str]], headers: dict[str, str]
    ) -> str | None:
        """Ask one turn; None if it failed, and why is in `failed`."""
        body: dict[str, Any] = {"model": self.alias, "messages": messages, "stream": True, **SAMPLING}
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body, headers=headers) as reply:
                text = (await reply.aread()).decode()
        except httpx.HTTPError as error:
            self.failed.append(repr(error))
            return None
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        if reply.status_code != httpx.codes.OK or events[-1:] != ["[DONE]"] or '{"error"' in text:
            self.failed.append(f"{reply.status_code}: {text[-200:]}")
            return None
        talk.requests += 1
        if reply.headers.get("x-quantgate-reason") not in ELSEWHERE:
            talk.variants.add(reply.headers.get("x-quantgate-variant", ""))
        choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
        return "".join(choice["delta"].get("content") or "" for choice in choices)


def question(number: int, turn: int) -> str:
    """A short question that no other conversation opens with."""
    place = PLACES[(number + turn) % len(PLACES)]
    return f"Guest {number} asks: what is the capital of {place}? One short sentence." if not turn else f"And {place}?"
