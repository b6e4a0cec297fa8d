"""The admin port: probes, metrics, and the state of replicas, queues and decisions."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import SecretStr

from gateway.handlers.admin_auth import AdminAuth
from gateway.handlers.rollouts import RolloutControl, add_rollouts
from gateway.handlers.router import Router
from gateway.handlers.status import add_status, schemas
from gateway.handlers.trial import add_trial
from gateway.handlers.ui import add_ui
from gateway.handlers.usage import add_usage
from gateway.http.hosts import AllowedHosts
from gateway.live_config import LiveConfig, ready_variants
from gateway.observability.metrics import Metrics
from gateway.observability.metrics.exposition import exposition
from gateway.observability.usage import UsageRecorder
from gateway.proxy.decision_log import MAX_DECISIONS, snapshot_now
from gateway.proxy.dispatcher import Dispatcher
from gateway.routing.explain import explain_recorded
from gateway.routing.snapshot import Snapshot
from gateway.status.source import StatusSource
from serving.registry import Registry

METRICS_TYPES: dict[str, Any] = {"text/plain": {}, "application/openmetrics-text": {}}
JSON_TYPE: dict[str, Any] = {"application/json": {}}


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What the admin port reads."""

    live_config: LiveConfig
    registry: Registry
    metrics: Metrics
    router: Router
    dispatcher: Dispatcher
    status: StatusSource
    rollouts: RolloutControl
    state_away: Callable[[], str | None] = lambda: None  # why the state database cannot be read
    usage: UsageRecorder | None = None
    kubernetes_away: Callable[[], str | None] = lambda: None  # why the API server cannot be read


def with_auth(app: FastAPI, key: SecretStr | None, hosts: AllowedHosts) -> AdminAuth:
    """Require a key for an app; None: no key, but one of the hosts' names."""
    if key is None:
        return AdminAuth(app, None, hosts)
    return AdminAuth(app, hashlib.sha256(key.get_secret_value().encode()).digest())


class _AdminApp(FastAPI):
    """Describes values of msgspec, too, which FastAPI does not know."""

    def openapi(self) -> dict[str, Any]:
        """The description of the endpoints."""
        document = super().openapi()
        document["components"]["schemas"].update(schemas())
        return document


def admin_app(context: AdminContext) -> FastAPI:
    """Build the app of the admin port."""
    app = _AdminApp(title="quantgate admin", docs_url=None, redoc_url=None, openapi_url="/admin/openapi.json")
    _add_probes(app, context)
    _add_routing(app, context)
    add_usage(app, context.usage, time.time)
    add_status(app, context.status, context.rollouts.refresh)
    add_rollouts(app, context.rollouts)
    add_trial(app, context.router)
    add_ui(app)

    @app.get("/admin/replicas")
    async def replicas() -> list[dict[str, Any]]:
        """Every replica with its state, reason, load and breaker; `tools`: it takes them (null: unknown)."""
        breakers = context.dispatcher.breaker_states()
        return [
            {
                "id": status.replica.id,
                "variant": status.replica.variant,
                "precision": status.replica.precision,
                "url": status.replica.url,
                "source": status.source,
                "state": status.state,
                "reason": status.reason,
                "tools": status.replica.tools,
                "in_flight": status.in_flight,
                "breaker": breakers.get(status.replica.id, "closed"),
            }
            for status in context.registry.snapshot()
        ]

    @app.get("/admin/queue")
    async def queue() -> dict[str, int]:
        """How many requests wait for a replica, by alias."""
        return dict(context.dispatcher.waiting())

    @app.get("/metrics", response_class=Response, responses={200: {"content": METRICS_TYPES}})
    async def metrics(request: Request) -> Response:
        """Every series, in Prometheus' text format or in OpenMetrics."""
        page = await exposition(context.metrics.registry, request.headers.get("accept", ""))
        return Response(page.body, headers={"content-type": page.content_type})

    return app


def _add_routing(app: FastAPI, context: AdminContext) -> None:
    dispatcher = context.dispatcher

    @app.get("/admin/routing", response_class=Response, responses={200: {"content": JSON_TYPE}})
    async def routing() -> Response:
        """The state that a request would be decided on now, for `quantgate route explain`."""
        placements = dispatcher.affinity.placements()
        return _json(
            snapshot_now(context.live_config, dispatcher.cluster, placements, context.registry, dispatcher.now())
        )

    @app.get("/admin/routing/{request_id}", response_class=Response, responses={200: {"content": JSON_TYPE}, 404: {}})
    async def decision(request_id: str) -> Response:
        """The state that one of the latest requests was decided on."""
        return _json(_recorded(dispatcher, request_id))

    @app.get(
        "/admin/routing/{request_id}/explanation",
        response_class=Response,
        responses={200: {"content": JSON_TYPE}, 404: {}},
    )
    async def explanation(request_id: str) -> Response:
        """The decision on one of the latest requests, as `quantgate route explain --request ID --json` explains it."""
        snapshot = _recorded(dispatcher, request_id)
        body = {"recorded": snapshot.recorded, "explanation": explain_recorded(snapshot)}
        return Response(msgspec.json.encode(body), headers={"content-type": "application/json"})


def _recorded(dispatcher: Dispatcher, request_id: str) -> Snapshot:
    record = dispatcher.decisions.find(request_id)
    if record is None:
        why = f"it was refused before one, or is not among the latest {MAX_DECISIONS} of this process"
        raise HTTPException(404, f"no decision on {request_id[:100]!r}: {why}")
    return record.snapshot(dispatcher.now())


def _json(snapshot: Snapshot) -> Response:
    return Response(snapshot.to_json(), headers={"content-type": "application/json"})


def _add_probes(app: FastAPI, context: AdminContext) -> None:
    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """200 while the process runs its event loop."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "No alias can be answered, or the gateway is about to stop."}})
    async def readyz() -> JSONResponse:
        """200 if any alias can be answered, else 503; lists the ready variants of each alias.

        A state database or an API server of Kubernetes that is away stops no request; `state` or `kubernetes` says so.
        """
        aliases = ready_variants(context.live_config.catalog, context.registry)
        body: dict[str, Any] = {"aliases": aliases}
        if away := context.state_away():
            body["state"] = f"the last revision of each alias stays in force: {away}"
        if away := context.kubernetes_away():
            body["kubernetes"] = f"pods stay as they were last seen: {away}"
        if context.router.draining:
            return JSONResponse({**body, "draining": True}, 503)
        return JSONResponse(body, 200 if any(aliases.values()) else 503)
