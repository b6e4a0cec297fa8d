"""What belongs to the life of one inference request, from its arrival to its log line."""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from gateway.errors import GatewayError
from gateway.keys import Caller
from gateway.live_config import Route
from gateway.openai.request import InferenceRequest
from gateway.proxy.client_response import ClientResponse
from gateway.proxy.leases import Lease
from gateway.proxy.stats import RequestStats
from gateway.proxy.upstream.protocol import Sink
from gateway.routing.request import NO_REPLICAS
from gateway.routing.retry import Failure


class Observation(Protocol):
    """What a rollout records of one request."""

    def leased(self, lease: Lease) -> None:
        """A replica is about to be asked."""

    def observe(self, sink: Sink) -> Sink:
        """Return where the answer goes: to the client, maybe by way of an observer."""

    def ended(self, context: "RequestContext") -> None:
        """The request has ended, however it did."""


class RequestContext:
    """The parts of one request; as a context manager it runs its statistics, and ends its heartbeat.

    `inference` is set once the request is parsed, `route` by `use`. The rest is the history of its attempts: replicas
    that failed it (`tried`), their leases (`failed`) and `failures`, replicas that died of it, refusals, the last
    failure of a replica, the last error, and whether a retry after it is free. `observation` is set while a rollout of
    its alias runs.
    """

    __slots__ = (
        "attempts_before",
        "body_bytes",
        "caller",
        "deaths",
        "failed",
        "failure",
        "failures",
        "free_retry",
        "headers",
        "inference",
        "last_error",
        "observation",
        "refusals",
        "response",
        "route",
        "stats",
        "tried",
    )
    inference: InferenceRequest
    route: Route

    def __init__(
        self, headers: Mapping[bytes, bytes], caller: Caller, stats: RequestStats, response: ClientResponse
    ) -> None:
        self.headers = headers
        self.caller = caller
        self.stats = stats
        self.response = response
        self.attempts_before = self.body_bytes = self.deaths = self.refusals = 0
        self.tried = NO_REPLICAS
        self.failed: tuple[Lease, ...] = ()
        self.failures: tuple[Failure, ...] = ()
        self.free_retry = False
        self.failure: GatewayError | None = None
        self.last_error: GatewayError | None = None
        self.observation: Observation | None = None

    def __enter__(self) -> Self:
        self.stats.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.response.close()
        if self.observation is not None:
            self.observation.ended(self)
        self.stats.__exit__(kind, error, trace)

    def use(self, route: Route) -> None:
        """Set the route, and forget the attempts that were made by another one."""
        self.route = route
        self.stats.alias = route.target.name
        self.attempts_before = self.stats.attempts
        if self.last_error is not None:
            self.tried, self.deaths, self.refusals, self.failure, self.last_error = NO_REPLICAS, 0, 0, None, None
            self.failed, self.failures, self.free_retry = (), (), False
