"""What clients may call besides inference, as a FastAPI app; everything else is a 404 in OpenAI's shape.

Who asks has been looked at before a request comes here: see gateway.api.site.
"""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from config.variant import Variant
from gateway.errors import GatewayError, RequestError
from gateway.live_config import LiveConfig
from gateway.openai.endpoints import ENDPOINTS
from gateway.routing.catalog import Target
from gateway.routing.floors import permitted_rungs
from serving.registry import Registry

JSON = "application/json"


def client_app(live_config: LiveConfig, registry: Registry) -> FastAPI:
    """Build the app that clients talk to about models."""
    app = FastAPI(title="quantgate", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    created = int(time.time())

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """Those that the client's key may use and something may answer: aliases first, then the variants to pin."""
        catalog, caller = live_config.catalog, request.state.caller
        targets = map(catalog.resolve, filter(caller.allows, catalog.names()))
        offered = [
            (target, rungs) for target in targets if (rungs := target.filter_variants((caller.floor,), None).kept)
        ]
        models = [_model(target, rungs, registry, created) for target, rungs in offered]
        return _answer(request, {"object": "list", "data": models})

    @app.get("/v1/models/{model:path}")
    async def show_model(model: str, request: Request) -> Response:
        """One of them; FloorUnmet, as a request would get, if nothing may answer it."""
        caller = request.state.caller
        caller.check_model(model)
        target = live_config.catalog.resolve(model)
        return _answer(request, _model(target, permitted_rungs(target, (caller.floor,), None), registry, created))

    app.add_exception_handler(GatewayError, _refused)
    app.add_exception_handler(HTTPException, _not_routed)
    return app


def _model(target: Target, rungs: tuple[Variant, ...], registry: Registry, created: int) -> dict[str, Any]:
    """Describe a name the way OpenAI does, with what only we know beside it: who may answer."""
    names = {variant.name for variant in rungs}
    lengths = [
        status.replica.max_model_len_tokens
        for status in registry.snapshot()
        if status.replica.variant in names and status.replica.max_model_len_tokens
    ]
    model: dict[str, Any] = {"id": target.name, "object": "model", "created": created, "owned_by": "quantgate"}
    # Whichever rung answers, a prompt of this length fits.
    model |= {"max_model_len": min(lengths)} if lengths else {}
    return model | {"precisions": [variant.precision for variant in rungs]}


def _answer(request: Request, content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"x-request-id": request.headers["x-request-id"]})


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    headers["x-request-id"] = request.headers["x-request-id"]
    return Response(error.body(), error.status, headers, media_type=JSON)


async def _not_routed(request: Request, error: Exception) -> Response:
    """Unknown path or wrong method, told in a shape that SDKs can read."""
    assert isinstance(error, HTTPException)
    known = ", ".join([*(endpoint.path for endpoint in ENDPOINTS.values()), "/v1/models"])
    refusal = RequestError(
        f"{request.method} {request.url.path[:200]}: {error.detail}; known: {known}", code="not_found"
    )
    refusal.status = error.status_code
    response = await _refused(request, refusal)
    response.headers.update(error.headers or {})
    return response
