"""A load tracker of two replicas, with the registry's counts and a clock that a test moves."""

from collections.abc import Mapping
from typing import Self

from gateway.proxy.load.replica_load import InFlight
from gateway.proxy.load.tracker import LoadTracker
from gateway.routing.engine_metrics import EngineMetrics
from gateway.routing.latency import LatencyEstimate, ReplicaMetrics
from gateway.routing.speed import SpeedProfile
from serving.replica import Replica

# 25 ms per token for up to 4 requests at once, which get 160 tokens a second together; 1 ms per token of a prompt.
SPEED = SpeedProfile((0.025,) * 4, (40.0, 80.0, 120.0, 160.0), 0.001, 4, answer_tokens=80.0, kv_capacity_tokens=10_000)
MEASURED: Mapping[str, SpeedProfile] = {"hi": SPEED}
ONE, TWO = (Replica(f"hi-{number}", "hi", "bf16", f"http://hi-{number}", "m1", max_in_flight=1000) for number in (1, 2))


class LoadHarness:
    """Tracks the load of ONE and TWO; requests are counted as the registry counts them."""

    def __init__(self, speeds: Mapping[str, SpeedProfile] = MEASURED) -> None:
        self.now = 100.0
        self.in_flight: dict[str, int] = {}
        self.load = LoadTracker(self.in_flight, speeds, lambda: self.now)
        self.keep_only(ONE, TWO)

    def keep_only(self, *replicas: Replica) -> None:
        """Have these replicas be ready, and no others."""
        self.load.keep_only({"hi": replicas} if replicas else {})

    def after(self, seconds: float) -> Self:
        """Advance the clock."""
        self.now += seconds
        return self

    def estimate(self, replica: Replica = ONE) -> LatencyEstimate:
        """The latency estimate of a replica."""
        return next(each for each in self.load.estimates("hi") if each.id == replica.id)

    def metrics(self, replica: Replica = ONE) -> ReplicaMetrics:
        """What is known of a replica."""
        return next(each for each in self.load.replica_metrics("hi") if each.replica.id == replica.id)

    def unread_tokens(self, replica: Replica = ONE) -> float:
        """The tokens that a replica has to read, derived from the seconds that its estimate has for them."""
        estimate = self.estimate(replica)
        return estimate.ahead_seconds / estimate.token_seconds

    def send(
        self, tokens: float = 100.0, *, cached: float = 0.0, streams: bool = True, replica: Replica = ONE
    ) -> InFlight:
        """Send a request."""
        estimate = self.estimate(replica)
        self.in_flight[replica.id] = self.in_flight.get(replica.id, 0) + 1
        return self.load.send(estimate, tokens, cached, streams=streams)

    def end(self, request: InFlight, answer_tokens: int | None = 80, replica: Replica = ONE) -> None:
        """End a request."""
        self.load.end(request, answer_tokens)
        self.in_flight[replica.id] -= 1
        if not self.in_flight[replica.id]:
            del self.in_flight[replica.id]

    def poll(
        self,
        running: float | None = 0.0,
        waiting: float | None = 0.0,
        generated_tokens: float | None = None,
        *,
        replica: Replica = ONE,
        polled_at: float | None = None,
    ) -> None:
        """Apply a poll that arrives now; it was sent now, too, unless the test says when."""
        poll = EngineMetrics(self.now, running, waiting, generated_tokens=generated_tokens)
        self.load.polled(replica.id, self.now if polled_at is None else polled_at, poll)

    def answer(self, seconds: float, first_token_seconds: float, tokens: int = 80) -> None:
        """Answer one request of 100 tokens."""
        request = self.send()
        self.after(first_token_seconds)
        request.first_token()
        self.after(seconds - first_token_seconds)
        self.end(request, tokens)

    def answer_with_polls(self, replica: Replica, first_token_seconds: float, tokens_per_second: float) -> None:
        """Answer one request of 100 tokens in 5 seconds, with a poll in each."""
        self.poll(1, generated_tokens=0, replica=replica)
        request = self.send(replica=replica)
        self.after(first_token_seconds)
        request.first_token()
        for second in range(5):
            self.poll(1, generated_tokens=second * tokens_per_second, replica=replica)
            self.after(1)
        self.end(request, replica=replica)
        self.poll(generated_tokens=0, replica=replica)
