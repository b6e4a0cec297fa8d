"""The statistics of one request: who asked, which replica answered, and when; booked once, whatever happens."""

import time
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import Self

from gateway.observability.access_log import AccessRecord, LogSink
from gateway.observability.metrics import UNKNOWN, Gauge, Metrics, ServedMetrics
from gateway.observability.trace_context import NOT_TRACED, Trace
from gateway.openai.usage import Usage
from gateway.routing.pick import Candidate

CLIENT_CLOSED_REQUEST = "499"  # nginx' code for a client that left before the answer was complete

# Finish reasons as they are logged, by what the APIs call them: those of vLLM and OpenAI's chats as they are, ours for
# an answer without one, and what Anthropic's stop reasons and the states of a response mean. Any other is `other`.
_CHAT_REASONS = ("stop", "length", "tool_calls", "function_call", "content_filter", "repetition", "abort", "error")
FINISH_REASONS: Mapping[str, str] = MappingProxyType(
    {
        **{reason: reason for reason in (*_CHAT_REASONS, "none")},
        "end_turn": "stop",
        "stop_sequence": "stop",
        "pause_turn": "stop",
        "max_tokens": "length",
        "model_context_window_exceeded": "length",
        "tool_use": "tool_calls",
        "refusal": "content_filter",
        "completed": "stop",
        "incomplete": "length",
    }
)


def ignore_first_token() -> None:
    """Do nothing."""


class RequestStats:
    """Counts a request while the `with` block runs, then books it and writes its log line and span.

    `started`: the client has received a part of an answer. `complete`: the whole of a stream was written, so that a
    client that leaves has not missed anything. `finish` is the engine's finish reason. `stream`: the client asked for
    one. `external_cost_usd`: what a provider outside charges for the answer.
    """

    __slots__ = (
        "_counted",
        "_counts",
        "_in_flight",
        "_inter_token",
        "_on_first_token",
        "_served",
        "alias",
        "attempts",
        "caller",
        "candidate",
        "clock",
        "code",
        "complete",
        "endpoint",
        "external_cost_usd",
        "finish",
        "first_token_seconds",
        "last_event_at",
        "log",
        "metrics",
        "queued_seconds",
        "request_id",
        "sent_at",
        "started",
        "started_at",
        "stream",
        "token_events",
        "trace",
        "usage",
        "wall_clock",
    )

    def __init__(
        self,
        metrics: Metrics,
        log: LogSink,
        endpoint: str,
        request_id: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        trace: Trace = NOT_TRACED,
    ) -> None:
        self.metrics = metrics
        self.log = log
        self.endpoint = endpoint
        self.request_id = request_id
        self.clock = clock
        self.wall_clock = wall_clock
        self.trace = trace
        self.caller, self.alias, self.code, self.finish = "none", UNKNOWN, "500", "none"
        self.candidate: Candidate | None = None
        self.usage: Usage | None = None
        self.attempts = self.token_events = 0
        self.started = self.complete = self.stream = False
        self.external_cost_usd = 0.0
        self.started_at = self.queued_seconds = self.last_event_at = 0.0
        self.sent_at: float | None = None
        self.first_token_seconds: float | None = None
        self._served: ServedMetrics | None = None
        self._in_flight: Gauge | None = None
        self._on_first_token: Callable[[], None] = ignore_first_token
        self._counted: Usage | None = None
        self._counts = 0, 0, 0

    def __enter__(self) -> Self:
        self.started_at = self.clock()
        self._in_flight = in_flight = self.metrics.in_flight.labels(self.endpoint)
        in_flight.value += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._in_flight is not None
        self._in_flight.value -= 1
        record, at_seconds = self._book(), self.wall_clock()
        self.log(record, at_seconds)
        self.trace.end(record)

    def client_disconnected(self) -> None:
        """Record that the client left."""
        self.code = "200" if self.complete else CLIENT_CLOSED_REQUEST

    def attempt(self, candidate: Candidate, on_first_token: Callable[[], None] = ignore_first_token) -> None:
        """Record which replica is asked now; `on_first_token` is called when its first token arrives."""
        variant = candidate.variant
        self.candidate = candidate
        self._on_first_token = on_first_token
        self.attempts += 1
        self._served = served = self.metrics.served(self.alias, variant.name, variant.precision)
        self._inter_token = served.inter_token

    def sent(self) -> None:
        """Record that the request is sent to a replica; until then, waiting aside, the time is the gateway's own."""
        now = self.clock()
        if self.sent_at is None:
            own_seconds = now - self.started_at - self.queued_seconds
            self.metrics.overhead_seconds.observe_with_exemplar(own_seconds, self.request_id, self.wall_clock())
        self.sent_at = now

    def add_cost(self, usd: float) -> None:
        """Record what an external model costs for an attempt, in the step in which it ends."""
        self.external_cost_usd += usd
        if usd and self.candidate is not None:
            self.metrics.external_cost_usd.labels(self.alias, self.candidate.variant.name).inc(usd)

    def retried(self, code: str) -> None:
        """Record that an attempt failed with this code and another one follows."""
        self.metrics.retries.labels(self.alias, code).inc()

    def token(self) -> None:
        """Record an event of a stream that carries a token; called after `attempt` only."""
        now, served = self.clock(), self._served
        if self.token_events:
            self._inter_token.observe(now - self.last_event_at)
        else:
            assert served is not None
            self.first_token_seconds = now - self.started_at
            served.first_token.observe_with_exemplar(self.first_token_seconds, self.request_id, self.wall_clock())
            self._on_first_token()
        self.token_events += 1
        self.last_event_at = now

    @property
    def tokens(self) -> int:
        """All tokens that were read and generated; of an incomplete stream those that arrived."""
        prompt, completion, _ = self._token_counts()
        return prompt + completion

    def lengths(self, streams: bool) -> tuple[int, int | None]:
        """Tokens of the prompt, 0 if the engine did not count them; and of the answer, None if unknown."""
        if self.usage is not None:
            prompt, completion, _ = self._token_counts()
            return prompt, completion or None
        # A stream that never began is not a short answer.
        return 0, (self.token_events or None) if streams else None

    def _token_counts(self) -> tuple[int, int, int]:
        """Prompt, completion and reasoning tokens; without usage, the events that arrived."""
        usage = self.usage
        if usage is None:
            return 0, self.token_events, 0
        if self._counted is not usage:
            self._counted, self._counts = usage, (usage.prompt, usage.completion, usage.reasoning)
        return self._counts

    def _book(self) -> AccessRecord:
        """Count the request in all metrics, and describe it."""
        metrics, alias, endpoint, code = self.metrics, self.alias, self.endpoint, self.code
        request_id, candidate, served = self.request_id, self.candidate, self._served
        seconds, at_seconds = self.clock() - self.started_at, self.wall_clock()
        prompt, completion, reasoning = self._token_counts()
        if candidate is None or served is None:
            variant = precision = replica = reason = "none"
        else:
            variant, precision = candidate.variant.name, candidate.variant.precision
            replica, reason = candidate.replica.id, candidate.reason
            served.request.observe_with_exemplar(seconds, request_id, at_seconds)
            served.queue.observe_with_exemplar(self.queued_seconds, request_id, at_seconds)
            served.prompt_tokens.value += prompt
            served.completion_tokens.value += completion
            served.reasoning_tokens.value += reasoning
            if reason == "spill":
                metrics.spills.labels(alias, variant).inc()
        metrics.requests.labels(alias, variant, precision, endpoint, code, reason).value += 1
        if served is None and alias != UNKNOWN:
            # Requests that gave up waiting, too: the longest waits are theirs.
            metrics.queue_seconds.labels(alias).observe_with_exemplar(self.queued_seconds, request_id, at_seconds)
        if metrics.per_key:
            metrics.completed_by(self.caller, code, prompt, completion)
        finish = FINISH_REASONS.get(self.finish, "other")
        estimated = self.usage is None and completion > 0
        return AccessRecord(
            *(request_id, self.caller, endpoint, alias, variant, precision, replica, reason, code, self.attempts),
            *(self.queued_seconds, self.first_token_seconds, seconds, prompt, completion, estimated, finish),
            *(self.stream, reasoning, self.external_cost_usd),
        )
