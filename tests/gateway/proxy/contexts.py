"""The parts of one request without a server: statistics, and a response whose bytes a test can read."""

from collections.abc import Mapping

from config.schema import NO_FLOOR
from config.variant import QualityMeasures, Variant
from gateway.http.response_writer import DateHeader, ResponseWriter
from gateway.keys import Caller
from gateway.live_config import Route
from gateway.observability.access_log import AccessRecord
from gateway.observability.metrics import Metrics
from gateway.openai.request import InferenceRequest
from gateway.proxy.client_response import ClientResponse, RoutingHeaders
from gateway.proxy.context import RequestContext
from gateway.proxy.stats import RequestStats
from gateway.routing.latency import ReplicaMetrics, estimate_latency
from gateway.routing.pick import Candidate
from gateway.routing.target import Target
from serving.replica import Replica

HI = Variant("hi", "bf16", QualityMeasures("measured", 0.0, 1.0, 1.0))
LO = Variant("lo", "int4", QualityMeasures("measured", 0.05, 0.92, 1.05))
SMOL = Target("smol", (HI, LO), NO_FLOOR, pinned=False)
REPLICA = Replica("hi-1", "hi", "bf16", "http://hi-1", "m1")
CANDIDATE = Candidate(estimate_latency(ReplicaMetrics(REPLICA)), HI, "preferred")
METRICS = Metrics()  # of tests that look at no metric: making one takes milliseconds


class RecordingTransport:
    """Implements WriteTransport: keeps what is written, and how much that was at each `drain`."""

    def __init__(self) -> None:
        self.write_paused = False
        self.disconnected = False
        self.written = bytearray()
        self.drained: list[int] = []

    def write(self, data: bytes) -> None:
        """Keep bytes."""
        self.written += data

    async def drain(self) -> None:
        """Return at once."""
        self.drained.append(len(self.written))


def ignore(record: AccessRecord, at_seconds: float) -> None:
    """Drop a line of the access log."""


def request_stats(metrics: Metrics = METRICS, request_id: str = "r-1") -> RequestStats:
    """The statistics of a request that goes to REPLICA, without a log."""
    stats = RequestStats(metrics, ignore, "chat.completions", request_id)
    stats.alias = SMOL.name
    stats.attempt(CANDIDATE)
    return stats


def client_response(inference: InferenceRequest, stats: RequestStats, transport: RecordingTransport) -> ClientResponse:
    """The response to a client that reads from a transport."""
    writer = ResponseWriter(transport, DateHeader(), keep_alive=True, supports_chunked=True, omit_body=False)
    return ClientResponse(inference.endpoint, stats, writer, RoutingHeaders(), None)


def request_context(
    inference: InferenceRequest, caller: Caller, headers: Mapping[bytes, bytes], target: Target = SMOL
) -> RequestContext:
    """The context of a request that is parsed, and whose route is known."""
    stats = request_stats()
    context = RequestContext(headers, caller, stats, client_response(inference, stats, RecordingTransport()))
    context.inference = inference
    rungs = target.filter((caller.floor,), None).permitted
    context.use(Route(caller, target, rungs, 30.0))
    return context
