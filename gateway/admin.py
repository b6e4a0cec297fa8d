"""What operators and monitoring see, on a port of its own."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import SecretStr

from gateway.api.site import Site
from gateway.guard import Guard
from gateway.in_force import InForce
from gateway.metrics import Metrics
from gateway.metrics.exposition import exposition
from gateway.routing.catalog import Catalog
from serving.registry import Registry
from serving.replica import State

METRICS_TYPES: dict[str, Any] = {"text/plain": {}, "application/openmetrics-text": {}}


@dataclass(frozen=True, slots=True)
class Shown:
    """What the admin port shows."""

    in_force: InForce
    registry: Registry
    metrics: Metrics
    site: Site
    breakers: Callable[[], Mapping[str, str]]
    waiting: Callable[[], Mapping[str, int]]


def guarded(app: FastAPI, key: SecretStr | None) -> Guard:
    """Have an app answer nobody but who has the key."""
    return Guard(app, hashlib.sha256(key.get_secret_value().encode()).digest() if key else None)


def admin_app(shown: Shown) -> FastAPI:
    """Build the app of the admin port."""
    app = FastAPI(title="quantgate admin", docs_url=None, redoc_url=None, openapi_url="/admin/openapi.json")
    _add_probes(app, shown)

    @app.get("/admin/replicas")
    async def replicas() -> list[dict[str, Any]]:
        """Every replica with its state, reason, load and breaker."""
        breakers = shown.breakers()
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
        return dict(shown.waiting())

    @app.get("/metrics", response_class=Response, responses={200: {"content": METRICS_TYPES}})
    async def scraped(request: Request) -> Response:
        """Every series, in Prometheus' text format or in OpenMetrics."""
        told = await exposition(shown.metrics.registry, request.headers.get("accept", ""))
        return Response(told.body, headers={"content-type": told.content_type})

    return app


def _add_probes(app: FastAPI, shown: Shown) -> None:
    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs its event loop."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "No alias can be answered, or the gateway is about to stop."}})
    async def readyz() -> JSONResponse:
        """200 if any alias can be answered, else 503; tells for each alias which variants are ready."""
        aliases = ready_variants(shown.in_force.catalog, shown.registry)
        if shown.site.draining:
            return JSONResponse({"aliases": aliases, "draining": True}, 503)
        return JSONResponse({"aliases": aliases}, 200 if any(aliases.values()) else 503)


def ready_variants(catalog: Catalog, registry: Registry) -> dict[str, list[str]]:
    """For each alias, the variants that may answer it and have a ready replica; for lone variants themselves."""
    ready = {status.replica.variant for status in registry.snapshot() if status.state is State.READY}
    names = catalog.aliases or catalog.variants
    return {
        name: [variant.name for variant in catalog.resolve(name).permitted if variant.name in ready] for name in names
    }
