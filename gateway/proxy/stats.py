"""One request's story: who asked what, who answered, when; settled exactly once, whatever happens."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from gateway.observability.access_log import AccessRecord, LogSink
from gateway.observability.metrics import UNKNOWN, Metrics, ServedMetrics
from gateway.observability.trace_context import NOT_TRACED, Trace
from gateway.openai.usage import Usage
from gateway.routing.pick import Choice

CLIENT_CLOSED_REQUEST = "499"  # nginx' number for a client that went away before the answer was whole

# vLLM's and OpenAI's words for why an answer ended, and ours for one that didn't; any other is told as `other`.
FINISH_REASONS = frozenset(
    {"stop", "length", "tool_calls", "function_call", "content_filter", "repetition", "abort", "error", "none"}
)


def nobody_waits() -> None:
    """Nobody wants to know."""


class RequestStats:
    """Counts a request while the `with` block runs, and books and tells it at the end.

    `caller` is the name of its key, `finish` the engine's word for why the answer ended.
    """

    # Defaults of the class, not of each object: to set them all anew costs more than to book a request.
    caller: str = "none"
    alias: str = UNKNOWN
    choice: Choice | None = None
    attempts: int = 0
    code: str = "500"
    usage: Usage | None = None
    finish: str = "none"
    body_bytes: int = 0
    queued_seconds: float = 0.0
    started: bool = False
    told_all: bool = False
    began_at: float = 0.0
    sent_at: float | None = None
    first_token_seconds: float | None = None
    token_events: int = 0
    last_event_at: float = 0.0
    _served: ServedMetrics | None = None
    _on_first_token: Callable[[], None] = staticmethod(nobody_waits)

    def __init__(
        self,
        metrics: Metrics,
        tell: LogSink,
        endpoint: str,
        request_id: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        trace: Trace = NOT_TRACED,
    ) -> None:
        self.metrics = metrics
        self.tell = tell
        self.endpoint = endpoint
        self.request_id = request_id
        self.clock = clock
        self.wall_clock = wall_clock
        self.trace = trace

    def __enter__(self) -> Self:
        self.began_at = self.clock()
        self.metrics.in_flight.labels(self.endpoint).value += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.in_flight.labels(self.endpoint).value -= 1
        seconds, at = self.clock() - self.began_at, self.wall_clock()
        self._book(seconds, at)
        entry = self._entry(seconds)
        self.tell(entry, at)
        self.trace.end(entry)

    def left(self) -> None:
        """Note that the client went; one that has read the last event has had its answer."""
        self.code = "200" if self.told_all else CLIENT_CLOSED_REQUEST

    def chose(self, choice: Choice, on_first_token: Callable[[], None] = nobody_waits) -> None:
        """Note which replica is tried now; whoever wants to know is told of its first token."""
        self.choice = choice
        self._on_first_token = on_first_token
        self.attempts += 1
        self._served = self.metrics.served(self.alias, choice.variant.name, choice.variant.precision)

    def sent(self) -> None:
        """Note that the request goes out; what it took since it was here, without waiting, is our own overhead."""
        now = self.clock()
        if self.sent_at is None:
            own = now - self.began_at - self.queued_seconds
            self.metrics.overhead_seconds.observe_with_exemplar(own, self.request_id, self.wall_clock())
        self.sent_at = now

    def retried(self, code: str) -> None:
        """Note that an attempt failed and another one follows."""
        self.metrics.retries.labels(self.alias, code).inc()

    def token(self) -> None:
        """Note a streamed event that carries something; somebody must have been chosen to say it."""
        now, served = self.clock(), self._served
        assert served is not None
        if self.token_events:
            served.inter_token.observe(now - self.last_event_at)
        else:
            self.first_token_seconds = now - self.began_at
            served.first_token.observe_with_exemplar(self.first_token_seconds, self.request_id, self.wall_clock())
            self._on_first_token()
        self.token_events += 1
        self.last_event_at = now

    def _book(self, seconds: float, at: float) -> None:
        choice, served = self.choice, self._served
        if choice is None or served is None:
            names, reason = (self.alias, "none", "none"), "none"
        else:
            names, reason = (self.alias, choice.variant.name, choice.variant.precision), choice.reason
            served.request.observe_with_exemplar(seconds, self.request_id, at)
            if reason == "spill":
                self.metrics.spills.labels(self.alias, choice.variant.name).inc()
            prompt, completion, reasoning = self._tokens()
            served.prompt_tokens.value += prompt
            served.completion_tokens.value += completion
            served.reasoning_tokens.value += reasoning
        self.metrics.outcome(names, self.endpoint, self.code, reason).value += 1
        if self.alias != UNKNOWN:
            # Who gave up waiting, too: the longest waits are theirs.
            self.metrics.queue_seconds.labels(self.alias).observe_with_exemplar(
                self.queued_seconds, self.request_id, at
            )

    @property
    def tokens(self) -> int:
        """All that were read and generated; of a stream cut short what came of it."""
        prompt, completion, _ = self._tokens()
        return prompt + completion

    def lengths(self, *, streams: bool) -> tuple[int, int | None]:
        """Tokens of the prompt as the engine counted them, 0 if it didn't; and of the answer, None if nobody knows."""
        if self.usage is not None:
            return self.usage.prompt, self.usage.completion or None
        # None of a stream that never began, whoever ended it: that is no short answer.
        return 0, (self.token_events or None) if streams else None

    def _tokens(self) -> tuple[int, int, int]:
        """Prompt, completion and reasoning; of a stream cut short what came of it, an event for a token."""
        if self.usage is None:
            return 0, self.token_events, 0
        return self.usage.prompt, self.usage.completion, self.usage.reasoning

    def _entry(self, seconds: float) -> AccessRecord:
        choice = self.choice
        prompt, completion, _ = self._tokens()
        return AccessRecord(
            request_id=self.request_id,
            key=self.caller,
            endpoint=self.endpoint,
            alias=self.alias,
            variant=choice.variant.name if choice else "none",
            precision=choice.variant.precision if choice else "none",
            replica=choice.replica.id if choice else "none",
            reason=choice.reason if choice else "none",
            code=self.code,
            attempts=self.attempts,
            queued_seconds=self.queued_seconds,
            first_token_seconds=self.first_token_seconds,
            seconds=seconds,
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=self.usage is None and completion > 0,
            finish=self.finish if self.finish in FINISH_REASONS else "other",
        )
