"""`/admin/status`: everything that an operator sees of this process, once."""

from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response

from gateway.status.source import StatusSource

JSON_TYPE: dict[str, Any] = {"application/json": {}}


def add_status(app: FastAPI, source: StatusSource) -> None:
    """Add the endpoint to the app of the admin port."""

    @app.get("/admin/status", response_class=Response, responses={200: {"content": JSON_TYPE}})
    async def status() -> Response:
        """Aliases, variants, replicas, traffic, rollouts and errors of this process; gateway/status/values.py."""
        return Response(
            source.read().to_json(), headers={"content-type": "application/json", "cache-control": "no-store"}
        )
