"""Replicas that speak vLLM's HTTP API, over pooled connections."""

from collections.abc import Awaitable
from dataclasses import dataclass, field

from gateway.proxy.upstream.connection import Connection
from gateway.proxy.upstream.pool import Pool
from gateway.proxy.upstream.protocol import UpstreamRequest
from gateway.routing.target import Timeouts
from serving.replica import Replica

MAX_HEADS = 10_000


@dataclass(frozen=True, slots=True)
class VllmUpstream:
    """Implements Upstream and Exchanges; of a client's headers only its trace context is sent on."""

    pool: Pool
    _heads: dict[tuple[str, str, str | None], bytes] = field(default_factory=dict)

    def open(self, request: UpstreamRequest, replica: Replica, timeouts: Timeouts) -> Awaitable[Connection]:
        """Send a request with the replica's model name and credential."""
        return self.pool.open(replica.url, self.encode(request, replica), timeouts, replica.tls)

    def heard_at(self, replica: Replica) -> float:
        """When the last byte of a response of a replica arrived (monotonic); -inf if none has."""
        return self.pool.heard_at(replica.url, replica.tls)

    def abandon(self, replica: Replica, silent_seconds: float) -> None:
        """End those exchanges with a replica that have received nothing for so long, with ReplicaHung."""
        self.pool.abandon(replica.url, replica.tls, silent_seconds)

    def encode(self, request: UpstreamRequest, replica: Replica) -> bytes:
        """Encode the HTTP request."""
        inference = request.inference
        body = inference.body_for(replica.served_name, request.token_ids, replica.max_model_len_tokens)
        return b"%bcontent-length: %d\r\nx-request-id: %b\r\n%b\r\n%b" % (
            self._head(inference.endpoint.path, replica),
            len(body),
            request.request_id.encode(),
            request.trace_headers,
            body,
        )

    def _head(self, path: str, replica: Replica) -> bytes:
        """The part of the head that is the same for all requests to a replica's path."""
        key = (path, replica.url, replica.api_key)
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= MAX_HEADS:
                self._heads.clear()  # replicas come and go; those that are there are encoded again
            head = self._heads[key] = post_head(path, replica, self.pool)
        return head


def post_head(path: str, replica: Replica, pool: Pool) -> bytes:
    """The request line and the headers that do not depend on the request."""
    credential = f"authorization: Bearer {replica.api_key}\r\n" if replica.api_key else ""
    return (
        f"POST {path} HTTP/1.1\r\n"
        f"host: {pool.address(replica.url).authority}\r\n"
        "content-type: application/json\r\n"
        f"{credential}"
    ).encode()
