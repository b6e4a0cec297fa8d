"""The statistics of one request: who asked, which replica answered, and when; booked once, whatever happens."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gateway.observability.access_log import AccessRecord, LogSink
from gateway.observability.metrics import UNKNOWN, Metrics, ServedMetrics
from gateway.observability.trace_context import NOT_TRACED, Trace
from gateway.openai.usage import Usage
from gateway.routing.pick import Candidate

CLIENT_CLOSED_REQUEST = "499"  # nginx' code for a client that left before the answer was complete

# Finish reasons of vLLM and OpenAI, and ours for an answer without one; any other is logged as `other`.
FINISH_REASONS = frozenset(
    {"stop", "length", "tool_calls", "function_call", "content_filter", "repetition", "abort", "error", "none"}
)


def ignore_first_token() -> None:
    """Do nothing."""


class RequestStats:
    """Counts a request while the `with` block runs, then books it and writes its log line and span.

    `started`: the client has received a part of an answer. `complete`: the whole of a stream was written, so that a
    client that leaves has not missed anything. `finish` is the engine's finish reason.
    """

    # Defaults of the class, not of each object: setting all of them costs more than booking a request.
    caller: str = "none"
    alias: str = UNKNOWN
    candidate: Candidate | None = None
    attempts: int = 0
    code: str = "500"
    usage: Usage | None = None
    finish: str = "none"
    queued_seconds: float = 0.0
    started: bool = False
    complete: bool = False
    started_at: float = 0.0
    sent_at: float | None = None
    first_token_seconds: float | None = None
    token_events: int = 0
    last_event_at: float = 0.0
    _served: ServedMetrics | None = None
    _on_first_token: Callable[[], None] = staticmethod(ignore_first_token)

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

    def __enter__(self) -> Self:
        self.started_at = self.clock()
        self.metrics.in_flight.labels(self.endpoint).value += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.in_flight.labels(self.endpoint).value -= 1
        seconds, at = self.clock() - self.started_at, self.wall_clock()
        self._book(seconds, at)
        record = self._record(seconds)
        self.log(record, at)
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
        self._served = self.metrics.served(self.alias, variant.name, variant.precision)

    def sent(self) -> None:
        """Record that the request is sent to a replica; until then, waiting aside, the time is the gateway's own."""
        now = self.clock()
        if self.sent_at is None:
            own_seconds = now - self.started_at - self.queued_seconds
            self.metrics.overhead_seconds.observe_with_exemplar(own_seconds, self.request_id, self.wall_clock())
        self.sent_at = now

    def retried(self, code: str) -> None:
        """Record that an attempt failed with this code and another one follows."""
        self.metrics.retries.labels(self.alias, code).inc()

    def token(self) -> None:
        """Record an event of a stream that carries a token; called after `attempt` only."""
        now, served = self.clock(), self._served
        assert served is not None
        if self.token_events:
            served.inter_token.observe(now - self.last_event_at)
        else:
            self.first_token_seconds = now - self.started_at
            served.first_token.observe_with_exemplar(self.first_token_seconds, self.request_id, self.wall_clock())
            self._on_first_token()
        self.token_events += 1
        self.last_event_at = now

    @property
    def tokens(self) -> int:
        """All tokens that were read and generated; of an incomplete stream those that arrived."""
        usage = self.usage
        return self.token_events if usage is None else usage.prompt + usage.completion

    def lengths(self, *, streams: bool) -> tuple[int, int | None]:
        """Tokens of the prompt, 0 if the engine did not count them; and of the answer, None if unknown."""
        if self.usage is not None:
            return self.usage.prompt, self.usage.completion or None
        # A stream that never began is not a short answer.
        return 0, (self.token_events or None) if streams else None

    def _book(self, seconds: float, at: float) -> None:
        candidate, served, alias = self.candidate, self._served, self.alias
        if candidate is None or served is None:
            names, reason = (alias, "none", "none"), "none"
        else:
            variant, reason = candidate.variant, candidate.reason
            names = (alias, variant.name, variant.precision)
            served.request.observe_with_exemplar(seconds, self.request_id, at)
            if reason == "spill":
                self.metrics.spills.labels(alias, variant.name).inc()
            usage = self.usage
            if usage is None:
                served.completion_tokens.value += self.token_events
            else:
                served.prompt_tokens.value += usage.prompt
                served.completion_tokens.value += usage.completion
                served.reasoning_tokens.value += usage.reasoning
        self.metrics.outcome(names, self.endpoint, self.code, reason).value += 1
        if alias != UNKNOWN:
            # Requests that gave up waiting, too: the longest waits are theirs.
            self.metrics.queue_seconds.labels(alias).observe_with_exemplar(self.queued_seconds, self.request_id, at)

    def _record(self, seconds: float) -> AccessRecord:
        candidate, usage = self.candidate, self.usage
        prompt, completion = (0, self.token_events) if usage is None else (usage.prompt, usage.completion)
        return AccessRecord(
            request_id=self.request_id,
            key=self.caller,
            endpoint=self.endpoint,
            alias=self.alias,
            variant=candidate.variant.name if candidate else "none",
            precision=candidate.variant.precision if candidate else "none",
            replica=candidate.replica.id if candidate else "none",
            reason=candidate.reason if candidate else "none",
            code=self.code,
            attempts=self.attempts,
            queued_seconds=self.queued_seconds,
            first_token_seconds=self.first_token_seconds,
            seconds=seconds,
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=usage is None and completion > 0,
            finish=self.finish if self.finish in FINISH_REASONS else "other",
        )
