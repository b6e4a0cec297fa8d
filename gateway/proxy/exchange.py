"""Choose, lease, ask, pass on: the life of one request between a client and a replica."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from config.schema import TimeoutSettings
from gateway.errors import (
    GatewayError,
    ReplicaFull,
    UpstreamDisconnected,
    UpstreamError,
)
from gateway.keys import Caller
from gateway.openai.reasoning import ReasoningFormat, ReasoningRewriter, has_reasoning, rewrite_reasoning
from gateway.openai.request import InferenceRequest
from gateway.openai.response import (
    error_from_response,
    finish_reason,
    parse_response,
    retry_after_seconds,
    rewrite_response,
)
from gateway.openai.sse import EventSplitter
from gateway.openai.stream import StreamFilter, stream_filter
from gateway.proxy.client_response import ClientResponse
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.leases import Lease, Want
from gateway.proxy.routing_features import asked, prompt_of
from gateway.proxy.stats import RequestStats
from gateway.proxy.upstream.connection import Connection
from gateway.proxy.upstream.pool import Pool
from gateway.proxy.upstream.timer import Timeouts
from gateway.routing.catalog import Target
from gateway.routing.floors import permitted_rungs
from serving.replica import Replica

log = logging.getLogger(__name__)

ANSWER_LIMIT_BYTES = 256 * 2**20
ERROR_LIMIT_BYTES = 1 * 2**20
# A request that finds replica after replica full goes back into the line so often; it has its deadline, too.
FULL_LIMIT = 16


@dataclass(slots=True)
class Attempts:
    """What one request has been through so far."""

    tried: frozenset[str] = frozenset()
    begun: int = 0
    deaths: int = 0
    full: int = 0
    failure: GatewayError | None = None
    again_after: GatewayError | None = None  # what ended the last attempt, until another one begins


@dataclass(frozen=True, slots=True)
class Proxy:
    """Answers requests from replicas: another one is tried as long as the client has seen nothing of an answer."""

    dispatch: Dispatcher
    pool: Pool

    async def answer(
        self,
        inference: InferenceRequest,
        headers: Mapping[bytes, bytes],
        target: Target,
        caller: Caller,
        account: RequestStats,
        teller: ClientResponse,
        wait_seconds: float,
    ) -> None:
        """Pass one answer on; GatewayError if there is none."""
        want = self._want(inference, headers, target, caller, account)
        if target.think == "none" and inference.endpoint.rewrites_reasoning:
            inference = inference.without_thinking()
        attempts = Attempts()
        while True:
            waiting_since = account.clock()
            try:
                lease = await self.dispatch.lease(
                    want,
                    wait_seconds=max(wait_seconds - account.queued_seconds, 0),
                    tried=attempts.tried,
                    failure=attempts.failure,
                )
            finally:
                account.queued_seconds += account.clock() - waiting_since
            with lease:
                account.chose(lease.choice, lease.began)
                if attempts.again_after is not None:
                    self._tried_again(attempts.again_after, account)
                    attempts.again_after = None
                try:
                    await self._exchange(inference, target, lease.choice.replica, account, teller)
                except GatewayError as error:
                    self._judge(error, lease, attempts, account)
                else:
                    lease.succeeded()
                    return
                finally:
                    lease.prompt_tokens, lease.answer_tokens = account.lengths(streams=inference.stream)

    def _want(
        self,
        inference: InferenceRequest,
        headers: Mapping[bytes, bytes],
        target: Target,
        caller: Caller,
        account: RequestStats,
    ) -> Want:
        """Sum up what the request is to routing."""
        floors = (caller.floor, inference.floor)
        rungs = permitted_rungs(target, floors, inference.precisions)
        bytes_per_token = self.dispatch.memory.bytes_per_token(target.name)
        prompt, with_blocks = prompt_of(inference), self.dispatch.has_choice(rungs)
        ask = asked(inference, prompt, headers, caller.name, bytes_per_token, with_blocks=with_blocks)
        return Want(
            target,
            rungs,
            # One turn a request: if retries took turns too, two replicas would never change places.
            self.dispatch.arrived(),
            ask,
            caller.name or "",
            account.request_id,
            inference.stream,
            account.body_bytes,
            prompt.text_bytes,
            floors,
            inference.precisions,
        )

    def _judge(self, error: GatewayError, lease: Lease, attempts: Attempts, account: RequestStats) -> None:
        """Say what an error means for the replica, and raise it unless the request is tried again."""
        replica_id = lease.choice.replica.id
        attempts.begun += 1
        if isinstance(error, ReplicaFull):
            lease.refused(error.held_seconds)
            attempts.full += 1
            if account.started or attempts.full >= FULL_LIMIT:
                raise error
            attempts.again_after = error
            return
        if not isinstance(error, UpstreamError):
            # The client's own fault: the replica did what it should.
            lease.succeeded()
            raise error
        lease.failed()
        log.warning(
            "request_id=%s replica=%s attempt=%d failed: %r",
            *(account.request_id, replica_id, account.attempts, error.__cause__ or error),
        )
        attempts.deaths += isinstance(error, UpstreamDisconnected) and replica_id not in attempts.tried
        attempts.tried |= {replica_id}
        attempts.failure = error
        if account.started:
            raise error
        if why := self.dispatch.why_not_again(attempts.deaths, attempts.begun):
            account.metrics.retries_refused.labels(account.alias, why).inc()
            raise error
        attempts.again_after = error

    def _tried_again(self, after: GatewayError, account: RequestStats) -> None:
        account.retried(after.code)
        if isinstance(after, UpstreamError):
            self.dispatch.retried()

    async def _exchange(
        self,
        inference: InferenceRequest,
        target: Target,
        replica: Replica,
        account: RequestStats,
        teller: ClientResponse,
    ) -> None:
        account.sent()
        manner = reasoning_format(inference, target, replica)
        request = encode_request(inference, replica, account, self.pool, token_ids=manner.hides_token_ids)
        deadlines, connect_seconds = reply_timeouts(target.timeouts, stream=inference.stream)
        async with self.pool.exchange(replica.url, request, deadlines, connect_seconds, replica.tls) as upstream:
            head = await upstream.head()
            if head.status != 200:
                raise error_from_response(
                    head.status, await upstream.read(ERROR_LIMIT_BYTES), retry_after_seconds(head.headers)
                )
            if head.streams != inference.stream:
                # The OpenAI SDK takes a whole answer to a streaming request for an empty stream.
                raise UpstreamError("a replica's answer is not in the asked form", code="upstream_invalid")
            if inference.stream:
                await _stream(inference, manner, upstream, account, teller)
            else:
                await _whole(inference, manner, upstream, account, teller)


def reasoning_format(inference: InferenceRequest, target: Target, replica: Replica) -> ReasoningFormat:
    """Say how thinking is told; token ids are asked for only where they tell whether the model thinks."""
    shaped_here = inference.endpoint.rewrites_reasoning and target.think != "none"
    token = replica.think_token if shaped_here else None
    return ReasoningFormat(target.reasoning, replica.think, token, token is not None and not inference.wants_token_ids)


def reply_timeouts(timeouts: TimeoutSettings, *, stream: bool) -> tuple[Timeouts, float]:
    """How long a replica may take: a whole answer comes at its end, so only the total says anything about it."""
    total_seconds = timeouts.total_seconds or math.inf
    if not stream:
        return Timeouts(total_seconds, total_seconds, total_seconds), timeouts.connect_seconds
    first_byte_seconds, idle_seconds = timeouts.first_byte_seconds or math.inf, timeouts.idle_seconds or math.inf
    return Timeouts(first_byte_seconds, idle_seconds, total_seconds), timeouts.connect_seconds


async def _whole(
    inference: InferenceRequest,
    manner: ReasoningFormat,
    upstream: Connection,
    account: RequestStats,
    teller: ClientResponse,
) -> None:
    answer = await upstream.read(ANSWER_LIMIT_BYTES)
    shape = (
        partial(rewrite_reasoning, manner=manner)
        if inference.endpoint.rewrites_reasoning and has_reasoning(answer, manner)
        else None
    )
    fields = parse_response(answer)
    if inference.endpoint.generates:
        account.finish = finish_reason(fields)
    body, account.usage = rewrite_response(fields, inference.model, shape)
    account.code = "200"
    teller.whole(body)


async def _stream(
    inference: InferenceRequest,
    manner: ReasoningFormat,
    upstream: Connection,
    account: RequestStats,
    teller: ClientResponse,
) -> None:
    """Pass events on as they arrive, several at once only if they arrived at once."""
    transcript = stream_filter(inference.endpoint, inference.model, wants_usage=inference.wants_usage)
    shaping = ReasoningRewriter(manner) if inference.endpoint.rewrites_reasoning else None
    passing = StreamPipeline(transcript, shaping, account, teller)
    try:
        while not await upstream.flow(passing.pour):
            await teller.drain()
    except UpstreamError:
        if transcript.failure is not None or not transcript.finished:
            raise
    finally:
        account.usage, account.finish = transcript.usage, transcript.finish or "none"
    if not transcript.finished:
        raise UpstreamDisconnected("a replica ended its stream in the middle")
    account.code = "200"
    teller.end()


class StreamPipeline:
    """What becomes of a stream's bytes on their way to the client, in the step in which they arrive."""

    __slots__ = ("_account", "_cutter", "_shaping", "_teller", "_transcript")

    def __init__(
        self, transcript: StreamFilter, shaping: ReasoningRewriter | None, account: RequestStats, teller: ClientResponse
    ) -> None:
        self._transcript = transcript
        self._shaping = shaping
        self._account = account
        self._teller = teller
        self._cutter = EventSplitter()

    def pour(self, data: bytes) -> bool:
        """Pass on what is whole by now; False if the client can't take more. Raises what the stream says went wrong."""
        events = self._cutter.feed(data)
        passed = self._told(events[0]) if len(events) == 1 else b"".join([self._told(event) for event in events])
        transcript = self._transcript
        if transcript.failure is not None:
            # The error itself is told by whoever judges it: with a status, as long as nothing went out.
            raise transcript.failure
        if transcript.finished:
            # SDKs hang up as soon as they have read the end.
            self._account.told_all = True
        if passed:
            self._teller.event(passed)
        return not self._teller.write_paused

    def _told(self, event: bytes) -> bytes:
        if self._shaping is not None and not (event := self._shaping.apply(event)):
            return b""
        passed = self._transcript.apply(event)
        if self._transcript.tokens:
            self._account.token()
        return passed


def encode_request(
    inference: InferenceRequest, replica: Replica, account: RequestStats, pool: Pool, *, token_ids: bool = False
) -> bytes:
    """Write the request that a replica gets; of the client's headers only its trace context goes along."""
    body = inference.body_for(replica.served_name, token_ids=token_ids, context_tokens=replica.max_model_len_tokens)
    credential = f"authorization: Bearer {replica.api_key}\r\n" if replica.api_key else ""
    head = (
        f"POST {inference.endpoint.path} HTTP/1.1\r\n"
        f"host: {pool.address(replica.url).authority}\r\n"
        "content-type: application/json\r\n"
        f"content-length: {len(body)}\r\n"
        f"x-request-id: {account.request_id}\r\n"
        f"{credential}"
    )
    trace = b"".join([b"%b: %b\r\n" % header for header in account.trace.headers])
    return b"%b%b\r\n%b" % (head.encode(), trace, body)
