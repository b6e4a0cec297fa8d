"""`/admin/status`: everything that an operator sees of this process, once or as a stream."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, HTTPException
from fastapi.responses import Response, StreamingResponse

from gateway.status.source import StatusSource
from gateway.status.values import Status

SCHEMAS = "#/components/schemas/{name}"
JSON_TYPE: dict[str, Any] = {"application/json": {"schema": {"$ref": SCHEMAS.format(name=Status.__name__)}}}
NO_STORE = {"cache-control": "no-store"}
# A proxy such as nginx passes each event on at once then.
UNBUFFERED = {"x-accel-buffering": "no"}
EVENT_SECONDS = 1.0
MAX_STREAMS = 32


@dataclass(slots=True, eq=False)
class StatusStreams:
    """Sends the status every EVENT_SECONDS to at most MAX_STREAMS readers, until the gateway drains.

    `refresh` is awaited before each.
    """

    source: StatusSource
    refresh: Callable[[], Awaitable[None]]
    open: int = 0

    async def events(self) -> AsyncIterator[bytes]:
        """The events of one stream."""
        self.open += 1
        try:
            while not self.source.draining():
                await self.refresh()
                yield b"data: %b\n\n" % self.source.shared_json()
                await asyncio.sleep(EVENT_SECONDS)
            yield b"event: end\ndata: draining\n\n"
        finally:
            self.open -= 1


def add_status(app: FastAPI, source: StatusSource, refresh: Callable[[], Awaitable[None]]) -> None:
    """Add the endpoints to the app of the admin port; `refresh` reads what is not in memory."""
    streams = StatusStreams(source, refresh)

    @app.get("/admin/status", response_class=Response, responses={200: {"content": JSON_TYPE}})
    async def status() -> Response:
        """Aliases, variants, replicas, traffic, rollouts and errors of this process; gateway/status/values.py."""
        await refresh()
        return Response(source.read().to_json(), headers={"content-type": "application/json", **NO_STORE})

    # Not in the schema: a reader of that expects an end.
    @app.get("/admin/status/stream", include_in_schema=False)
    async def stream() -> Response:
        """The status each second as server-sent events; the event `end` closes it when the gateway drains."""
        if source.draining() or streams.open >= MAX_STREAMS:
            why = "the gateway is about to stop" if source.draining() else f"{MAX_STREAMS} streams are open"
            raise HTTPException(503, f"{why}; retry", headers={"retry-after": "1"})
        return StreamingResponse(
            streams.events(), headers={"content-type": "text/event-stream", **NO_STORE, **UNBUFFERED}
        )


def schemas() -> dict[str, Any]:
    """The JSON schemas of a status and its parts, by name, for the OpenAPI document."""
    _, components = msgspec.json.schema_components((Status,), ref_template=SCHEMAS)
    return components
