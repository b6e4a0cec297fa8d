"""Asks each replica in its own way: servers of vLLM's API, and models of other providers."""

from collections.abc import Awaitable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from gateway.errors import UpstreamUnreachable
from gateway.proxy.upstream.protocol import Upstream, UpstreamReply, UpstreamRequest
from gateway.proxy.upstream.vllm import VllmUpstream
from gateway.routing.target import Timeouts
from serving.replica import Replica


@dataclass(frozen=True, slots=True)
class UpstreamByKind:
    """Implements Upstream and Exchanges; `external` is None in a process without external models."""

    vllm: VllmUpstream
    external: Upstream | None

    def open(
        self, request: UpstreamRequest, replica: Replica, timeouts: Timeouts
    ) -> Awaitable[AbstractContextManager[UpstreamReply]]:
        """Send a request."""
        if replica.external is None:
            return self.vllm.open(request, replica, timeouts)
        if self.external is None:
            raise UpstreamUnreachable("litellm is not loaded")
        return self.external.open(request, replica, timeouts)

    def heard_at(self, replica: Replica) -> float:
        """When the last byte of a response of a replica arrived (monotonic)."""
        return self.vllm.heard_at(replica)

    def abandon(self, replica: Replica, silent_seconds: float) -> None:
        """End exchanges that have received nothing for so long; those with providers have timeouts only."""
        if replica.external is None:
            self.vllm.abandon(replica, silent_seconds)
