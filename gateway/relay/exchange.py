"""Choose, lease, ask, pass on: the life of one request between a client and a replica."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any
from urllib.parse import urlsplit

from config.variant import Variant
from gateway.api.inference import Inference
from gateway.api.sse import EventCutter, error_event
from gateway.errors import GatewayError, Unavailable, UpstreamDisconnected, UpstreamError
from gateway.relay.accounting import Account
from gateway.relay.connection import Connection
from gateway.relay.pool import Pool
from gateway.relay.replies import Transcript, carries_token, refusal, renamed
from gateway.relay.shapes import Manner, Shaping, shaped
from gateway.routing.catalog import Target
from gateway.routing.ladder import Choice, permitted_rungs, rank, worth_waiting
from serving.errors import NoSuchReplica
from serving.registry import Registry
from serving.replica import Replica

log = logging.getLogger(__name__)

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

ATTEMPTS = 3
ANSWER_LIMIT_BYTES = 256 * 2**20
ERROR_LIMIT_BYTES = 1 * 2**20


@dataclass(slots=True)
class Relay:
    """Answers requests from the replicas of a registry."""

    registry: Registry
    pool: Pool
    queue_seconds: float
    _turns: "count[int]" = field(default_factory=count)

    async def answer(self, inference: Inference, target: Target, account: Account, send: Send) -> None:
        """Pass one answer on; another replica is tried as long as the client has seen nothing of it."""
        if target.think == "none" and inference.endpoint.shapes_reasoning:
            inference = inference.without_thinking()
        rungs = permitted_rungs(target, inference.floor, inference.precisions)
        # One turn a request: if retries took turns too, two replicas would never change places.
        turn = next(self._turns)
        tried: frozenset[str] = frozenset()
        failure: GatewayError | None = None
        while True:
            choice = await self._choice(target, rungs, tried, turn, failure, account)
            account.chose(choice)
            try:
                with self.registry.lease(choice.replica.id) as replica:
                    await self._exchange(inference, target, replica, account, send)
            except (UpstreamError, Unavailable, NoSuchReplica) as error:
                failure = error if isinstance(error, GatewayError) else UpstreamError("a replica left")
                tried |= {choice.replica.id}
                log.warning(
                    "request_id=%s replica=%s attempt=%d failed: %r",
                    *(account.request_id, choice.replica.id, account.attempts, error.__cause__ or error),
                )
                if account.begun or account.attempts >= ATTEMPTS:
                    raise failure from error
                account.retried(failure.code)
            else:
                return

    async def _choice(
        self,
        target: Target,
        rungs: tuple[Variant, ...],
        tried: frozenset[str],
        turn: int,
        failure: GatewayError | None,
        account: Account,
    ) -> Choice:
        """The best replica there is; waits for one that is on its way, unless all that could answer have failed."""
        began = account.clock()
        try:
            async with asyncio.timeout(self.queue_seconds):
                while True:
                    snapshot = self.registry.snapshot()
                    ranked = rank(target, rungs, snapshot, tried, turn)
                    if ranked:
                        return ranked[0]
                    if failure is not None or not worth_waiting(rungs, snapshot):
                        raise failure or Unavailable(f"no replica of {target.name!r} is ready")
                    await self.registry.changed()
        except TimeoutError:
            raise Unavailable(f"no replica of {target.name!r} got ready in {self.queue_seconds:g} s") from None
        finally:
            account.queued_seconds += account.clock() - began

    async def _exchange(
        self, inference: Inference, target: Target, replica: Replica, account: Account, send: Send
    ) -> None:
        account.sent()
        manner = manner_of(inference, target, replica)
        request = request_bytes(inference, replica, account.request_id, token_ids=manner.hides_ids)
        async with self.pool.exchange(replica.url, request) as upstream:
            head = await upstream.head()
            if head.status != 200:
                raise refusal(head.status, await upstream.read(ERROR_LIMIT_BYTES))
            if head.streams != inference.stream:
                # The OpenAI SDK takes a whole answer to a streaming request for an empty stream.
                raise UpstreamError("a replica's answer is not in the asked form", code="upstream_invalid")
            if inference.stream:
                await _stream(inference, manner, upstream, account, send)
            else:
                await _whole(inference, manner, upstream, account, send)


def manner_of(inference: Inference, target: Target, replica: Replica) -> Manner:
    """Say how thinking is told; token ids are asked for only where they tell whether the model thinks."""
    token = replica.think_token if inference.endpoint.shapes_reasoning and target.think != "none" else None
    return Manner(target.reasoning, replica.think, token, token is not None and not inference.wants_token_ids)


async def _whole(inference: Inference, manner: Manner, upstream: Connection, account: Account, send: Send) -> None:
    shape = partial(shaped, manner=manner) if inference.endpoint.shapes_reasoning else dict
    body, account.usage = renamed(await upstream.read(ANSWER_LIMIT_BYTES), inference.model, shape)
    account.code = "200"
    await begin(send, account, 200, [(b"content-type", b"application/json"), _length(body)])
    await send({"type": "http.response.body", "body": body})


async def _stream(inference: Inference, manner: Manner, upstream: Connection, account: Account, send: Send) -> None:
    """Pass events on as they arrive, several at once only if they arrived at once."""
    transcript = Transcript(inference.model, inference.wants_usage)
    shaping = Shaping(manner) if inference.endpoint.shapes_reasoning else None
    cutter = EventCutter()
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    try:
        async for data in upstream.chunks():
            passed = [_noted(event, transcript, shaping, account) for event in cutter.feed(data)]
            if transcript.failure and not account.begun:
                # The client has seen nothing: it can still be told with a status, or answered from elsewhere.
                raise transcript.failure
            if body := b"".join(passed):
                if not account.begun:
                    await begin(send, account, 200, headers)
                await send({"type": "http.response.body", "body": body, "more_body": True})
            if transcript.finished and not transcript.failure:
                # SDKs hang up as soon as they have read the end.
                account.told_all = True
        if not transcript.finished and not transcript.failure:
            raise UpstreamDisconnected("a replica ended its stream in the middle")
    except UpstreamError as error:
        if not account.begun:
            raise
        if not transcript.finished:
            account.code = error.code
            event = error_event(error.message, error.type, error.code)
            await send({"type": "http.response.body", "body": event})
            return
    finally:
        account.usage = transcript.usage
    account.code = UpstreamError.code if transcript.failure else "200"
    await send({"type": "http.response.body", "body": b""})


def _noted(event: bytes, transcript: Transcript, shaping: Shaping | None, account: Account) -> bytes:
    passed = transcript.passed_on(event)
    if shaping is not None:
        passed = shaping.passed_on(passed)
    if carries_token(passed):
        account.token()
    return passed


async def begin(send: Send, account: Account, status: int, headers: Headers) -> None:
    """Send status and headers; from here on no other replica can be tried."""
    account.begun = True
    own = [(b"x-request-id", account.request_id.encode()), *_disclosure(account)]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *own]})


async def refuse(send: Send, account: Account, error: GatewayError) -> None:
    """Answer with an error of our own."""
    account.code = str(error.status)
    body = error.body()
    await begin(send, account, error.status, [(b"content-type", b"application/json"), _length(body), *error.headers()])
    await send({"type": "http.response.body", "body": body})


def _disclosure(account: Account) -> Headers:
    """Say who answers and why: nobody is sent to a quantized copy without being told."""
    choice = account.choice
    if choice is None:
        return []
    values = (choice.variant.name, choice.variant.precision, choice.replica.id, str(account.attempts), choice.reason)
    names = (b"variant", b"precision", b"replica", b"attempts", b"reason")
    return [(b"x-quantgate-" + name, value.encode()) for name, value in zip(names, values, strict=True)]


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(body)).encode()


def request_bytes(inference: Inference, replica: Replica, request_id: str, *, token_ids: bool = False) -> bytes:
    """Write the request that a replica gets; of the client's headers none goes along."""
    body = inference.body_for(replica.served_name, token_ids=token_ids, context_tokens=replica.max_model_len_tokens)
    credential = f"authorization: Bearer {replica.api_key}\r\n" if replica.api_key else ""
    head = (
        f"POST {inference.endpoint.path} HTTP/1.1\r\n"
        f"host: {urlsplit(replica.url).netloc}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {request_id}\r\n"
        f"{credential}\r\n"
    )
    return head.encode() + body
