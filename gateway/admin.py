"""What operators and monitoring see, on a port of its own."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from gateway.in_force import InForce
from gateway.metrics import Metrics
from gateway.metrics.exposition import exposition
from gateway.routing.catalog import Catalog
from serving.registry import Registry
from serving.replica import State


def admin_app(in_force: InForce, registry: Registry, metrics: Metrics) -> FastAPI:
    """Build the app of the admin port."""
    app = FastAPI(title="quantgate admin", docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/livez")
    async def livez() -> dict[str, str]:
        """The process runs its event loop."""
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        """200 if any alias can be answered, else 503; tells for each alias which variants are ready."""
        aliases = ready_variants(in_force.catalog, registry)
        return JSONResponse({"aliases": aliases}, 200 if any(aliases.values()) else 503)

    @app.get("/admin/replicas")
    async def replicas() -> list[dict[str, Any]]:
        """Every replica with its state, reason and load."""
        return [
            {
                "id": status.replica.id,
                "variant": status.replica.variant,
                "precision": status.replica.precision,
                "url": status.replica.url,
                "state": status.state,
                "reason": status.reason,
                "in_flight": status.in_flight,
            }
            for status in registry.snapshot()
        ]

    @app.get("/metrics")
    async def scraped(request: Request) -> Response:
        """Every series, in Prometheus' text format or in OpenMetrics."""
        told = await exposition(metrics.registry, request.headers.get("accept", ""))
        return Response(told.body, headers={"content-type": told.content_type})

    return app


def ready_variants(catalog: Catalog, registry: Registry) -> dict[str, list[str]]:
    """For each alias, the variants of its ladder that have a ready replica; for lone variants themselves."""
    ready = {status.replica.variant for status in registry.snapshot() if status.state is State.READY}
    names = catalog.aliases or catalog.variants
    return {name: [variant.name for variant in catalog.resolve(name).rungs if variant.name in ready] for name in names}
