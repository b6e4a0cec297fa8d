"""Clients of a router: every turn a request on a connection of its own, and when what came of it."""

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import httptools

from tests.benchmarks.overhead.loads import PATH, Contender
from tests.benchmarks.routing.profiles import Fleet
from tests.benchmarks.routing.runs import Outcome, Refusal, Scenario
from tests.benchmarks.routing.texts import Message, messages_of
from tests.benchmarks.routing.workloads import Conversation, Turn

DRAIN_SECONDS = 60.0
_TOKEN = re.compile(rb'"content":"([^"]+)"')
_REPLICA = re.compile(rb'"system_fingerprint":"([^"]+)"')


@dataclass(slots=True)
class Answer:
    """One answer; times are the loop's, `first_at` is of the first token."""

    status: int = 0
    retry_after_seconds: float | None = None
    first_at: float | None = None
    ended_at: float | None = None
    body: bytearray = field(default_factory=bytearray)

    @property
    def whole(self) -> bool:
        """Tell whether it is an answer, and all of it."""
        return self.status == 200 and self.ended_at is not None and self.body.endswith(b"data: [DONE]\n\n")

    @property
    def text(self) -> str:
        """What it says."""
        return b"".join(_TOKEN.findall(self.body)).decode()

    @property
    def replica(self) -> str:
        """Who answered; empty if nobody did."""
        found = _REPLICA.search(self.body)
        return found[1].decode() if found else ""


class _Exchange(asyncio.Protocol):
    """One connection for one request."""

    def __init__(self, request: bytes) -> None:
        self._loop = asyncio.get_running_loop()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self.answer = Answer()
        self.over: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"retry-after":
            self.answer.retry_after_seconds = float(value)

    def on_body(self, body: bytes) -> None:
        self.answer.body += body
        if self.answer.first_at is None and _TOKEN.search(self.answer.body):
            self.answer.first_at = self._loop.time()

    def on_message_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()
        self.answer.ended_at = self._loop.time()
        if not self.over.done():
            self.over.set_result(None)


async def ask(contender: Contender, turn: Turn, messages: Sequence[Message], *, named: bool = True) -> Answer:
    """Ask one turn, with the name of its conversation or without; an answer without a status is a failure."""
    asked = {
        "model": contender.model,
        "messages": messages,
        "seed": turn.answer_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = json.dumps(asked, separators=(",", ":")).encode()
    session = f"x-session-id: {turn.session}\r\n" if named else ""
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: {contender.host}:{contender.port}\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer {contender.key}\r\n{session}connection: close\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    exchange = _Exchange(head.encode() + body)
    try:
        transport, _ = await loop.create_connection(lambda: exchange, contender.host, contender.port)
    except OSError:
        return exchange.answer
    try:
        await exchange.over
    finally:
        transport.abort()
    return exchange.answer


class Crowd:
    """Has every conversation of a scenario; `late_seconds` is how late this program itself was to ask.

    `named`: it tells the router which conversation a turn is of.
    """

    def __init__(self, scenario: Scenario, contender: Contender, *, named: bool) -> None:
        self._scenario, self._contender, self._named = scenario, contender, named
        self._loop = asyncio.get_running_loop()
        self._began_at = self._loop.time()
        self.outcomes: list[Outcome] = []
        self.late_seconds: list[float] = []

    async def talk(self) -> None:
        """Talk until nobody asks any more, and what was asked is answered, or has had time enough."""
        tasks = [asyncio.create_task(self._converse(each)) for each in self._scenario.conversations]
        _, left = await asyncio.wait(tasks, timeout=self._scenario.seconds + DRAIN_SECONDS)
        for task in left:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
                raise result

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._loop.time() - self._began_at

    async def _converse(self, conversation: Conversation) -> None:
        due, said = conversation.at_seconds, list[Message]()
        for turn in conversation.turns:
            if due > self._scenario.seconds:
                return
            await asyncio.sleep(due - self.now)
            self.late_seconds.append(self.now - due)
            outcome = Outcome(turn, self.now)
            self.outcomes.append(outcome)
            messages = messages_of(turn, said)
            text = await self._answered(outcome, messages)
            said = [*messages, {"role": "assistant", "content": text}]
            due = self.now + turn.think_seconds

    async def _answered(self, outcome: Outcome, messages: Sequence[Message]) -> str:
        """Ask until there is an answer, or it was refused too often; returns what it says."""
        while True:
            outcome.sent_at, outcome.tries = self.now, outcome.tries + 1
            answer = await ask(self._contender, outcome.turn, messages, named=self._named)
            if answer.first_at is not None:
                note(outcome, answer, self._scenario.fleet, self._began_at)
                return answer.text
            if answer.retry_after_seconds is None or len(outcome.refusals) + 1 >= self._scenario.most_asks:
                outcome.failed = True
                return ""
            outcome.refusals.append(Refusal(self.now, answer.retry_after_seconds))
            await asyncio.sleep(answer.retry_after_seconds)


def note(outcome: Outcome, answer: Answer, fleet: Fleet, began_at: float) -> None:
    """Write an answer down as the outcome of a turn."""
    member = fleet.named(answer.replica)
    outcome.replica, outcome.precision, outcome.agreement = member.id, member.precision, member.agreement
    assert answer.first_at is not None
    outcome.first_at = answer.first_at - began_at
    if answer.whole and answer.ended_at is not None:
        outcome.ended_at = answer.ended_at - began_at
    else:
        outcome.failed = True
