"""The proxy: lease a replica, send the request, pass the answer on; or try another replica.

Another replica is tried as long as the client has received no part of an answer. Who owns what: README.md beside this.
"""

import logging
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from gateway.errors import (
    EngineError,
    GatewayError,
    ReplicaFull,
    ReplicaHung,
    UpstreamDisconnected,
    UpstreamError,
    UpstreamTimeout,
)
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
from gateway.openai.stream import StreamFilter, expected_choices, stream_filter
from gateway.proxy.context import RequestContext
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.leases import Lease
from gateway.proxy.routing_features import Unsupported, permitted_rungs, routing_request, supports_all
from gateway.proxy.stats import RequestStats
from gateway.proxy.upstream.protocol import Sink, Upstream, UpstreamReply, UpstreamRequest
from gateway.routing.request import RoutingRequest
from gateway.routing.retry import Failure, request_is_at_fault
from gateway.routing.target import Target
from serving.replica import Replica

log = logging.getLogger(__name__)

MAX_ANSWER_BYTES = 256 * 2**20
MAX_ERROR_BYTES = 1 * 2**20
# A request that finds one replica after the other full is queued again so often; its deadline limits it, too.
MAX_REFUSALS = 16


@dataclass(frozen=True, slots=True)
class Proxy:
    """Answers requests from replicas; `unsupported` says why an external model can't answer one as asked."""

    dispatcher: Dispatcher
    upstream: Upstream
    unsupported: Unsupported = supports_all

    async def serve(self, context: RequestContext) -> None:
        """Answer one request; GatewayError if no replica does."""
        dispatcher, stats, target, inference = self.dispatcher, context.stats, context.route.target, context.inference
        rungs = permitted_rungs(context, self.unsupported)
        # One turn per request: if retries took turns, too, two replicas would never alternate.
        turn, with_blocks = dispatcher.next_turn(), dispatcher.has_choice(rungs)
        spilling_seconds = dispatcher.spilled_lately_seconds(target.name) if dispatcher.cluster.gates else None
        request = routing_request(context, rungs, turn, dispatcher.affinity, with_blocks, spilling_seconds)
        if request.tools:
            dispatcher.require_tools(target, rungs)
        if target.think == "none":
            inference = inference.without_thinking()
        try:
            while True:
                wait_seconds = context.route.queue_seconds - stats.queued_seconds
                lease = dispatcher.try_lease(request, wait_seconds) or await self._wait(request, context, wait_seconds)
                with lease:
                    stats.attempt(lease.candidate, lease.in_flight.first_token)
                    sink: Sink = context.response
                    if context.observation is not None:
                        context.observation.leased(lease)
                        sink = context.observation.observe(sink)
                    if context.last_error is not None:
                        self._count_retry(context.last_error, context)
                    try:
                        await self._exchange(inference, target, lease.replica, stats, sink)
                    except GatewayError as error:
                        self._after_failure(error, lease, context)
                    else:
                        lease.succeeded()
                        return
                    finally:
                        lease.prompt_tokens, lease.answer_tokens = stats.lengths(inference.stream)
                request = dispatcher.affinity.refreshed(request, context.tried)
        except EngineError as error:
            self._raise_last(error, context)

    async def _wait(self, request: RoutingRequest, context: RequestContext, wait_seconds: float) -> Lease:
        """Wait in the queue for a replica; a request that a replica has failed does not wait."""
        if context.failure is not None:
            raise context.failure
        clock = context.stats.clock
        waiting_since = clock()
        try:
            return await self.dispatcher.wait(request, max(wait_seconds, 0.0))
        finally:
            context.stats.queued_seconds += clock() - waiting_since

    async def _exchange(
        self, inference: InferenceRequest, target: Target, replica: Replica, stats: RequestStats, sink: Sink
    ) -> None:
        stats.sent()
        reasoning = reasoning_format(inference, target, replica)
        trace = b"".join([b"%b: %b\r\n" % header for header in stats.trace.headers]) if stats.trace.headers else b""
        request = UpstreamRequest(inference, stats.request_id, trace, reasoning.hides_token_ids, stats.add_cost)
        timeouts = target.stream_timeouts if inference.stream else target.unary_timeouts
        with await self.upstream.open(request, replica, timeouts) as reply:
            if reply.status != 200:
                body = await reply.read(MAX_ERROR_BYTES)
                raise error_from_response(reply.status, body, retry_after_seconds(reply.headers))
            if reply.streams != inference.stream:
                # The OpenAI SDK takes a whole answer to a streaming request for an empty stream.
                raise UpstreamError("a replica's answer is not in the requested form", code="upstream_invalid")
            if inference.stream:
                await stream_answer(inference, reasoning, reply, stats, sink)
            else:
                await send_answer(inference, reasoning, reply, stats, sink)

    def _after_failure(self, error: GatewayError, lease: Lease, context: RequestContext) -> None:
        """Decide what an error means for the replica; raises it unless the request is tried again."""
        stats = context.stats
        if isinstance(error, ReplicaFull):
            lease.refused(error.backoff_seconds)
            context.refusals += 1
            if stats.started or context.refusals >= MAX_REFUSALS:
                raise error
            context.last_error = error
            return
        if not isinstance(error, UpstreamError):
            # The client's own error: the replica did what it should.
            lease.succeeded()
            raise error
        lease.failed(timed_out=isinstance(error, UpstreamTimeout))
        replica_id = lease.replica.id
        log.warning(
            "request_id=%s replica=%s attempt=%d failed: %r",
            *(stats.request_id, replica_id, stats.attempts, error.__cause__ or error),
        )
        context.deaths += isinstance(error, UpstreamDisconnected) and replica_id not in context.tried
        context.tried |= {replica_id}
        context.last_error = error
        moves = isinstance(error, ReplicaHung)
        if not moves or stats.started:
            context.failure = error  # one that moves may wait for another replica
        if stats.started:
            raise error
        context.failed = (*context.failed, lease)
        context.failures = (*context.failures, _failure_of(error, lease, stats))
        # The budget keeps retries from multiplying load. A replica that hangs does nothing for them, and one that is
        # known to fail gets no more of it than if it were left out.
        context.free_retry = moves or self.dispatcher.was_suspect(lease)
        attempts = stats.attempts - context.attempts_before
        if why := self.dispatcher.retries.refusal(context.deaths, attempts, free=context.free_retry):
            stats.metrics.retries_refused.labels(stats.alias, why).inc()
            raise error

    def _raise_last(self, error: EngineError, context: RequestContext) -> NoReturn:
        """Raise the error of a request whose leases have ended; if it is at fault itself, replicas are forgiven."""
        if context.stats.started or not request_is_at_fault(context.failures):
            raise error
        self.dispatcher.forgive(context.failed)
        raise error.of_request(len(context.failed)) from error

    def _count_retry(self, after: GatewayError, context: RequestContext) -> None:
        context.stats.retried(after.code)
        if isinstance(after, UpstreamError) and not context.free_retry:
            self.dispatcher.retries.spend()


def _failure_of(error: UpstreamError, lease: Lease, stats: RequestStats) -> Failure:
    status = error.engine_status if isinstance(error, EngineError) else None
    sent_at = stats.clock() if stats.sent_at is None else stats.sent_at
    return Failure(lease.replica.id, status, stats.clock() - sent_at)


def reasoning_format(inference: InferenceRequest, target: Target, replica: Replica) -> ReasoningFormat:
    """Choose the format of reasoning; token ids are requested only where they show whether the model thinks."""
    rewrites = inference.endpoint.rewrites_reasoning and target.think != "none"
    token = replica.think_token if rewrites else None
    return ReasoningFormat(target.reasoning, replica.think, token, token is not None and not inference.wants_token_ids)


async def send_answer(
    inference: InferenceRequest, reasoning: ReasoningFormat, reply: UpstreamReply, stats: RequestStats, sink: Sink
) -> None:
    """Pass a whole answer on."""
    body = await reply.read(MAX_ANSWER_BYTES)
    rewrites = inference.endpoint.rewrites_reasoning and has_reasoning(body, reasoning)
    fields = parse_response(body)
    if inference.endpoint.generates:
        stats.finish = finish_reason(fields)
    rewrite = partial(rewrite_reasoning, reasoning_format=reasoning) if rewrites else None
    body, stats.usage = rewrite_response(fields, inference.model, rewrite)
    stats.code = "200"
    sink.send(body)


async def stream_answer(
    inference: InferenceRequest, reasoning: ReasoningFormat, reply: UpstreamReply, stats: RequestStats, sink: Sink
) -> None:
    """Pass events on as they arrive, several at once only if they arrived at once."""
    events = stream_filter(
        inference.endpoint,
        inference.model,
        wants_usage=inference.wants_usage,
        choices=expected_choices(inference),
        response_id=sink.begin(),
    )
    rewriter = ReasoningRewriter(reasoning) if inference.endpoint.rewrites_reasoning else None
    pipeline = StreamPipeline(events, rewriter, stats, sink)
    try:
        while not await reply.flow(pipeline.feed):
            await sink.drain()
    except UpstreamError:
        if events.failure is not None or not events.finished:
            raise
    finally:
        stats.usage, stats.finish = events.usage, events.finish or "none"
    if not events.finished:
        raise UpstreamDisconnected("a replica ended its stream before the answer was complete")
    stats.code = "200"
    sink.end()


class StreamPipeline:
    """Rewrites the bytes of a stream on their way to the sink, in the step in which they arrive."""

    __slots__ = ("_filter", "_rewriter", "_sink", "_splitter", "_stats")

    def __init__(
        self, events: StreamFilter, rewriter: ReasoningRewriter | None, stats: RequestStats, sink: Sink
    ) -> None:
        self._filter = events
        self._rewriter = rewriter
        self._stats = stats
        self._sink = sink
        self._splitter = EventSplitter()

    def feed(self, data: bytes) -> bool:
        """Pass on the events that are complete; False if the sink is full. Raises the error that the stream reports."""
        events = self._splitter.feed(data)
        out = self._apply(events[0]) if len(events) == 1 else b"".join([self._apply(event) for event in events])
        if not self._filter.flowing:
            out = self._before_or_after_content(out)
        if out:
            self._sink.write(out)
        return not self._sink.write_paused

    def _before_or_after_content(self, out: bytes) -> bytes:
        """Hold openers back, note the end of the stream, and raise the error that it reports."""
        stream = self._filter
        if stream.failure is not None:
            # The handler writes it: as a status if nothing was sent yet.
            raise stream.failure
        if stream.finished:
            # SDKs close the connection as soon as they have read the end.
            self._stats.complete = True
            return out
        if out:
            self._sink.hold(out)
        return b""

    def _apply(self, event: bytes) -> bytes:
        if self._rewriter is not None and not (event := self._rewriter.apply(event)):
            return b""
        out = self._filter.apply(event)
        if self._filter.tokens:
            self._stats.token()
        return out
