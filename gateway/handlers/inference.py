"""One inference endpoint: parse a request, resolve its model, have it answered, and book all of it."""

import asyncio
from dataclasses import dataclass, field
from functools import partial

from gateway.errors import Draining, FloorUnmet, GatewayError, Unavailable
from gateway.http.request import Request
from gateway.http.response_writer import ClientDisconnected, ResponseWriter
from gateway.keys import ANONYMOUS, Caller
from gateway.live_config import LiveConfig
from gateway.observability.access_log import LogSink
from gateway.observability.metrics import Metrics
from gateway.observability.trace_context import Tracing
from gateway.openai.endpoints import Endpoint
from gateway.openai.request import parse_request
from gateway.proxy.client_response import ClientResponse, RoutingHeaders
from gateway.proxy.context import RequestContext
from gateway.proxy.exchange import Proxy
from gateway.proxy.stats import RequestStats
from gateway.quota import Quota
from gateway.rollout.arms import Rollouts
from gateway.status.recent_errors import RecentErrors


@dataclass(frozen=True, slots=True)
class Observers:
    """Where the statistics of requests go."""

    metrics: Metrics
    log: LogSink
    tracing: Tracing
    routing_headers: RoutingHeaders = field(default_factory=RoutingHeaders)
    errors: RecentErrors = field(default_factory=RecentErrors)


@dataclass(frozen=True, slots=True)
class InferenceHandler:
    """Answers the requests of one endpoint, with errors in the shape of its SDKs."""

    endpoint: Endpoint
    live_config: LiveConfig
    proxy: Proxy
    quota: Quota
    observers: Observers
    rollouts: Rollouts

    async def handle(self, request: Request, response: ResponseWriter) -> None:
        """Answer one request; cancelled when its client leaves, or when the gateway stops."""
        context = self._context(request, request.caller or ANONYMOUS, response)
        stats = context.stats
        with context:
            try:
                if request.refusal is not None:
                    raise request.refusal
                self._parse(request, context)
                counts = self.quota.admit(context.caller, stats.started_at)
                try:
                    await self._serve(context)
                finally:
                    if counts is not None:
                        counts.charge(stats.tokens, stats.clock())
            except GatewayError as error:
                self._refuse(error, context)
            except ClientDisconnected:
                stats.client_disconnected()
                raise
            except asyncio.CancelledError:
                stats.client_disconnected()
                if not response.client_disconnected:
                    self._refuse(Draining("the gateway stops; retry"), context)
                raise

    def _context(self, request: Request, caller: Caller, writer: ResponseWriter) -> RequestContext:
        observers, headers = self.observers, request.headers
        trace = observers.tracing.begin(self.endpoint.name, headers)
        stats = RequestStats(observers.metrics, observers.log, self.endpoint.name, request.request_id, trace=trace)
        stats.caller = caller.name or "none"
        if headers.get(b"x-stainless-retry-count", b"0") != b"0":
            observers.metrics.client_retries.inc()
        limits = partial(self.quota.headers, caller) if caller.rate_limited else None
        response = ClientResponse(self.endpoint, stats, writer, observers.routing_headers, limits)
        return RequestContext(headers, caller, stats, response)

    def _parse(self, request: Request, context: RequestContext) -> None:
        caller, live_config = context.caller, self.live_config
        inference = parse_request(
            self.endpoint,
            request.body,
            request.headers,
            live_config.limits,
            caller.may,
            caller.max_tokens,
            live_config.media_domains,
        )
        caller.check_model(inference.model)
        context.inference, context.body_bytes = inference, len(request.body)
        context.stats.stream = inference.stream
        request.body = b""  # the parsed one is kept from here on

    async def _serve(self, context: RequestContext) -> None:
        """Have a request answered; once more if a reload replaced the configuration that it began with."""
        while True:
            catalog = self.live_config.catalog
            self._resolve(context)
            try:
                await self.proxy.serve(context)
            except Unavailable:
                if context.stats.started or catalog is self.live_config.catalog:
                    raise
            else:
                return

    def _resolve(self, context: RequestContext) -> None:
        inference = context.inference
        route = self.live_config.route(context.caller, inference.model)
        if self.rollouts.active is not None:
            route = self.rollouts.draw(route, context)
        context.use(route)
        if inference.stream:
            context.response.keep_alive(route.target.timeouts.heartbeat_seconds)

    def _refuse(self, error: GatewayError, context: RequestContext) -> None:
        stats, metrics = context.stats, self.observers.metrics
        if isinstance(error, FloorUnmet):
            metrics.floor_rejections.labels(stats.alias).inc()
        if stats.candidate is None:
            metrics.rejected(stats.alias, error.metric_reason)
        stats.code = error.code if stats.started else str(error.status)
        replica = "none" if stats.candidate is None else stats.candidate.replica.id
        self.observers.errors.add(stats.alias, stats.code, replica, stats.request_id, str(error))
        context.response.refuse(error)
