"""One request's story: who asked what, who answered, when; settled exactly once, whatever happens."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

from gateway.metrics import UNKNOWN, Metrics
from gateway.routing.ladder import Choice

log = logging.getLogger("gateway.access")

CLIENT_LEFT = "499"  # nginx' number for a client that went away before the answer was whole


class CompletionDetails(msgspec.Struct):
    """The part of `usage` that tells thinking apart."""

    reasoning_tokens: int | None = None


class Usage(msgspec.Struct):
    """Token counts as the engine reports them, in the words of each API."""

    prompt_tokens: int | None = 0
    completion_tokens: int | None = 0
    completion_tokens_details: CompletionDetails | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    output_tokens_details: CompletionDetails | None = None

    @property
    def prompt(self) -> int:
        """Tokens that were read."""
        return self.input_tokens or self.prompt_tokens or 0

    @property
    def completion(self) -> int:
        """Tokens that were generated, thinking included."""
        return self.output_tokens or self.completion_tokens or 0

    @property
    def reasoning(self) -> int:
        """Tokens of thinking."""
        details = self.output_tokens_details or self.completion_tokens_details
        return (details.reasoning_tokens if details else 0) or 0

    def beside(self, earlier: "Usage | None") -> "Usage":
        """Add what an earlier event said, and this one doesn't: Anthropic tells input first and output last."""
        if earlier is None:
            return self
        return msgspec.structs.replace(
            self,
            input_tokens=self.input_tokens or earlier.input_tokens,
            output_tokens=self.output_tokens or earlier.output_tokens,
        )


@dataclass(slots=True)
class Account:
    """Counts a request while the `with` block runs and books it at the end."""

    metrics: Metrics
    endpoint: str
    request_id: str
    clock: Callable[[], float] = time.monotonic
    alias: str = UNKNOWN
    choice: Choice | None = None
    attempts: int = 0
    code: str = "500"
    usage: Usage | None = None
    finish: str = ""
    body_bytes: int = 0
    trace_headers: str = ""
    queued_seconds: float = 0.0
    begun: bool = False
    told_all: bool = False
    began_at: float = 0.0
    read_at: float = 0.0
    sent_at: float | None = None
    first_token_at: float | None = None
    last_event_at: float = 0.0

    def __enter__(self) -> Self:
        self.began_at = self.read_at = self.clock()
        self.metrics.in_flight.labels(self.endpoint).inc()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.in_flight.labels(self.endpoint).dec()
        self._book(self.clock() - self.began_at)

    def left(self) -> None:
        """Note that the client went; one that has read the last event has had its answer."""
        self.code = "200" if self.told_all else CLIENT_LEFT

    def chose(self, choice: Choice) -> None:
        """Note which replica is tried now."""
        self.choice = choice
        self.attempts += 1

    def sent(self) -> None:
        """Note that the request goes out; what it took since it was here, without waiting, is our own overhead."""
        now = self.clock()
        if self.sent_at is None:
            self.metrics.overhead_seconds.observe(now - self.read_at - self.queued_seconds)
        self.sent_at = now

    def retried(self, code: str) -> None:
        """Note that an attempt failed and another one follows."""
        self.metrics.retries.labels(self.alias, code).inc()

    def token(self) -> None:
        """Note a streamed event that carries something."""
        now = self.clock()
        if self.first_token_at is None:
            self.first_token_at = now
            self.metrics.first_token_seconds.labels(*self._served).observe(now - self.began_at)
        else:
            self.metrics.inter_token_seconds.labels(*self._served).observe(now - self.last_event_at)
        self.last_event_at = now

    @property
    def _served(self) -> tuple[str, str, str]:
        if self.choice is None:
            return self.alias, "none", "none"
        return self.alias, self.choice.variant.name, self.choice.variant.precision

    def _book(self, seconds: float) -> None:
        reason = self.choice.reason if self.choice else "none"
        self.metrics.requests.labels(*self._served, self.endpoint, self.code, reason).inc()
        if self.alias != UNKNOWN:
            # Who gave up waiting, too: the longest waits are theirs.
            self.metrics.queue_seconds.labels(self.alias).observe(self.queued_seconds)
        if self.choice is not None:
            self.metrics.request_seconds.labels(*self._served).observe(seconds)
        prompt, completion = self._book_tokens()
        log.info(
            "request_id=%s endpoint=%s alias=%s variant=%s replica=%s reason=%s code=%s attempts=%d "
            "queued_seconds=%.3f seconds=%.3f prompt_tokens=%d completion_tokens=%d",
            *(self.request_id, self.endpoint, self.alias, self._served[1]),
            *(self.choice.replica.id if self.choice else "none", reason, self.code, self.attempts),
            *(self.queued_seconds, seconds, prompt, completion),
        )

    def _book_tokens(self) -> tuple[int, int]:
        if self.usage is None:
            return 0, 0
        kinds = {"prompt": self.usage.prompt, "completion": self.usage.completion, "reasoning": self.usage.reasoning}
        for kind, count in kinds.items():
            self.metrics.tokens.labels(*self._served, kind).inc(count)
        return kinds["prompt"], kinds["completion"]
