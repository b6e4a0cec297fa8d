"""What operators and monitoring see, on a port of its own."""

import hashlib
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import SecretStr

from gateway.handlers.admin_auth import AdminAuth
from gateway.handlers.router import Router
from gateway.live_config import LiveConfig
from gateway.observability.metrics import Metrics
from gateway.observability.metrics.exposition import exposition
from gateway.proxy.decision_log import MAX_DECISIONS
from gateway.proxy.dispatcher import Dispatcher
from gateway.proxy.snapshot import state_now, state_then
from gateway.routing.catalog import Catalog
from gateway.routing.snapshot import State
from serving.registry import Registry
from serving.replica import State as Life

METRICS_TYPES: dict[str, Any] = {"text/plain": {}, "application/openmetrics-text": {}}
JSON_TYPE: dict[str, Any] = {"application/json": {}}


@dataclass(frozen=True, slots=True)
class AdminContext:
    """What the admin port shows."""

    live_config: LiveConfig
    registry: Registry
    metrics: Metrics
    site: Router
    dispatch: Dispatcher


def with_auth(app: FastAPI, key: SecretStr | None) -> AdminAuth:
    """Have an app answer nobody but who has the key."""
    return AdminAuth(app, hashlib.sha256(key.get_secret_value().encode()).digest() if key else None)


def admin_app(shown: AdminContext) -> FastAPI:
    """Build the app of the admin port."""
    app = FastAPI(title="quantgate admin", docs_url=None, redoc_url=None, openapi_url="/admin/openapi.json")
    _add_probes(app, shown)

    @app.get("/admin/replicas")
    async def replicas() -> list[dict[str, Any]]:
        """Every replica with its state, reason, load and breaker."""
        breakers = shown.dispatch.breaker_states()
        return [
            {
                "id": status.replica.id,
                "variant": status.replica.variant,
                "precision": status.replica.precision,
                "url": status.replica.url,
                "state": status.state,
                "reason": status.reason,
                "in_flight": status.in_flight,
                "breaker": breakers.get(status.replica.id, "closed"),
            }
            for status in shown.registry.snapshot()
        ]

    @app.get("/admin/queue")
    async def queue() -> dict[str, int]:
        """How many requests wait for a replica, by alias."""
        return dict(shown.dispatch.waiting())

    @app.get("/admin/routing", response_class=Response, responses={200: {"content": JSON_TYPE}})
    async def routing() -> Response:
        """Everything that a request would be decided on now, for `quantgate route explain`."""
        return _recorded(state_now(shown.live_config, shown.dispatch, shown.registry))

    @app.get("/admin/routing/{request_id}", response_class=Response, responses={200: {"content": JSON_TYPE}, 404: {}})
    async def decision(request_id: str) -> Response:
        """What one of the latest requests was decided on."""
        made = shown.dispatch.decisions.find(request_id)
        if made is None:
            raise HTTPException(
                404, f"nothing is kept of {request_id[:100]!r}; the latest {MAX_DECISIONS} requests here are"
            )
        return _recorded(state_then(made, shown.dispatch.now()))

    @app.get("/metrics", response_class=Response, responses={200: {"content": METRICS_TYPES}})
    async def scraped(request: Request) -> Response:
        """Every series, in Prometheus' text format or in OpenMetrics."""
        told = await exposition(shown.metrics.registry, request.headers.get("accept", ""))
        return Response(told.body, headers={"content-type": told.content_type})

    return app


def _recorded(state: State) -> Response:
    return Response(state.to_json(), headers={"content-type": "application/json"})


def _add_probes(app: FastAPI, shown: AdminContext) -> None:
    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs its event loop."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "No alias can be answered, or the gateway is about to stop."}})
    async def readyz() -> JSONResponse:
        """200 if any alias can be answered, else 503; tells for each alias which variants are ready."""
        aliases = ready_variants(shown.live_config.catalog, shown.registry)
        if shown.site.draining:
            return JSONResponse({"aliases": aliases, "draining": True}, 503)
        return JSONResponse({"aliases": aliases}, 200 if any(aliases.values()) else 503)


def ready_variants(catalog: Catalog, registry: Registry) -> dict[str, list[str]]:
    """For each alias, the variants that may answer it and have a ready replica; for lone variants themselves."""
    ready = {status.replica.variant for status in registry.snapshot() if status.state is Life.READY}
    names = catalog.aliases or catalog.variants
    return {
        name: [variant.name for variant in catalog.resolve(name).permitted if variant.name in ready] for name in names
    }
