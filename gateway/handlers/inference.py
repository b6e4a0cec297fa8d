"""One inference endpoint: reads a request, finds who may answer, relays the answer, and accounts for all of it."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from gateway.errors import (
    BodyTooLarge,
    Draining,
    FloorUnmet,
    GatewayError,
    HeadTooLarge,
    InvalidKey,
    NotAllowed,
    RateLimited,
    RequestError,
    RequestTooSlow,
    Unavailable,
    UnknownModel,
)
from gateway.http.request import Request
from gateway.http.response_writer import ClientDisconnected, ResponseWriter
from gateway.keys import Caller
from gateway.live_config import LiveConfig
from gateway.observability.access_log import LogSink
from gateway.observability.metrics import Metrics
from gateway.observability.trace_context import Tracing
from gateway.openai.endpoints import Endpoint
from gateway.openai.request import InferenceRequest, parse_request
from gateway.proxy.client_response import ClientResponse, RoutingHeaders
from gateway.proxy.exchange import Proxy
from gateway.proxy.stats import RequestStats
from gateway.quota import Quota

# The first that fits; others are told by their codes, those of the queue.
_REJECTIONS = (
    (RateLimited, "rate_limit"),
    (Draining, "draining"),
    (FloorUnmet, "floor"),
    (Unavailable, "no_replica"),
    ((BodyTooLarge, HeadTooLarge), "too_large"),
    (RequestTooSlow, "too_slow"),
    (NotAllowed, "not_allowed"),
    (InvalidKey, "invalid_key"),
    (UnknownModel, "unknown_model"),
    (RequestError, "invalid_request"),
)


@dataclass(frozen=True, slots=True)
class Observers:
    """Where a request's story goes: into metrics, the access log, and a trace."""

    metrics: Metrics
    tell: LogSink
    tracing: Tracing
    disclosures: RoutingHeaders = field(default_factory=RoutingHeaders)


@dataclass(frozen=True, slots=True)
class InferenceHandler:
    """Answers the requests of one endpoint, or says why not, in the words of its SDKs."""

    endpoint: Endpoint
    live_config: LiveConfig
    relay: Proxy
    quota: Quota
    telling: Observers

    async def answer(self, request: Request, caller: Caller, reply: ResponseWriter) -> None:
        """Answer one request; when its client leaves, or the gateway stops, this is cancelled."""
        told = self.telling
        trace = told.tracing.begin(self.endpoint.name, request.headers)
        account = RequestStats(told.metrics, told.tell, self.endpoint.name, request.request_id, trace=trace)
        account.caller = caller.name or "none"
        if request.headers.get(b"x-stainless-retry-count", b"0") != b"0":
            told.metrics.client_retries.inc()
        limits = partial(self.quota.headers, caller)
        with account, ClientResponse(self.endpoint, account, reply, told.disclosures, limits) as teller:
            try:
                if request.refusal is not None:
                    raise request.refusal
                await self._answer(request, caller, account, teller)
            except GatewayError as error:
                self._refused(error, account, teller)
            except ClientDisconnected:
                account.left()
                raise
            except asyncio.CancelledError:
                account.left()
                if not reply.client_disconnected:
                    self._refused(Draining("the gateway stops; ask again"), account, teller)
                raise

    async def _answer(self, request: Request, caller: Caller, account: RequestStats, teller: ClientResponse) -> None:
        limits = self.live_config.limits
        inference = parse_request(self.endpoint, request.body, request.headers, limits, caller.may, caller.max_tokens)
        account.body_bytes = len(request.body)
        request.body = b""  # From here on it is the parsed one that is kept.
        caller.check_model(inference.model)
        with self.quota.admit(caller, account.began_at) as admission:
            try:
                await self._relayed(inference, request.headers, caller, account, teller)
            finally:
                admission.charge(account.tokens, account.clock())

    async def _relayed(
        self,
        inference: InferenceRequest,
        headers: Mapping[bytes, bytes],
        caller: Caller,
        account: RequestStats,
        teller: ClientResponse,
    ) -> None:
        """Relay an answer; once more by another configuration, if the one that it began with lost its replicas."""
        while True:
            catalog = self.live_config.catalog
            target = catalog.resolve(inference.model)
            account.alias = target.name
            if inference.stream:
                teller.keep_alive(target.timeouts.heartbeat_seconds)
            waits = target.timeouts.queue_seconds
            wait_seconds = self.live_config.limits.queue_seconds if waits is None else waits
            try:
                await self.relay.answer(inference, headers, target, caller, account, teller, wait_seconds)
            except Unavailable:
                if account.started or catalog is self.live_config.catalog:
                    raise
            else:
                return

    def _refused(self, error: GatewayError, account: RequestStats, teller: ClientResponse) -> None:
        if isinstance(error, FloorUnmet):
            self.telling.metrics.floor_rejections.labels(account.alias).inc()
        if account.choice is None:
            self.telling.metrics.rejected(account.alias, rejection(error))
        account.code = error.code if account.started else str(error.status)
        teller.refuse(error)


def rejection(error: GatewayError) -> str:
    """Why a request was turned away before any replica saw it, as a label."""
    return next((word for kind, word in _REJECTIONS if isinstance(error, kind)), error.code)
