"""What clients may call besides inference, as a FastAPI app; any other path is a 404 in OpenAI's shape.

The caller has been authenticated before a request arrives here, but for health checks: see gateway.handlers.router.
"""

import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from config.variant import Variant
from gateway.errors import GatewayError, RequestError
from gateway.live_config import LiveConfig, ready_variants
from gateway.observability.metrics.metrics import own_version
from gateway.openai.endpoints import ENDPOINTS, expects_anthropic_errors
from gateway.routing.target import Target
from serving.registry import Registry

JSON = "application/json"


def client_app(live_config: LiveConfig, registry: Registry) -> FastAPI:
    """Build the app that lists models, and answers what tools for vLLM ask: health, ping and version."""
    app = FastAPI(title="quantgate", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    created = int(time.time())

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        """Models that the key permits and some variant may answer: aliases first, then the variants to pin."""
        catalog, caller = live_config.catalog, request.state.caller
        targets = map(catalog.resolve, filter(caller.allows, catalog.names()))
        offered = [(target, rungs) for target in targets if (rungs := target.filter((caller.floor,), None).permitted)]
        models = [_model(target, rungs, registry, created) for target, rungs in offered]
        return _answer(request, {"object": "list", "data": models})

    @app.get("/v1/models/{model:path}")
    async def show_model(model: str, request: Request) -> Response:
        """One model; FloorUnmet, as for an inference request, if no variant may answer it."""
        caller = request.state.caller
        caller.check_model(model)
        target = live_config.catalog.resolve(model)
        return _answer(request, _model(target, target.permitted_rungs((caller.floor,), None), registry, created))

    @app.get("/health")
    @app.api_route("/ping", methods=["GET", "POST"])
    async def health() -> Response:
        """200 if any alias can be answered, else 503: like vLLM's, which does not listen before it can answer."""
        return Response(status_code=200 if any(ready_variants(live_config.catalog, registry).values()) else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Version of quantgate."""
        return {"version": own_version()}

    app.add_exception_handler(GatewayError, _refuse)
    app.add_exception_handler(HTTPException, _refuse_route)
    return app


def _model(target: Target, rungs: tuple[Variant, ...], registry: Registry, created: int) -> dict[str, Any]:
    """Describe a model as vLLM does, with our own fields beside it: the precisions.

    `root` is the best variant that may answer, not its directory: paths are no business of clients. The context has the
    names of vLLM (`max_model_len`) and of OpenRouter (`context_length`).
    """
    variants = {rung.name: rung.precision for rung in rungs}
    lengths = [
        status.replica.max_model_len_tokens
        for status in registry.snapshot()
        if not variants.keys().isdisjoint(status.replica.variants) and status.replica.max_model_len_tokens
    ]
    model: dict[str, Any] = {"id": target.name, "object": "model", "created": created, "owned_by": "quantgate"}
    model |= {"root": next(iter(variants)), "parent": None, "permission": [_permission(target.name, created)]}
    # A prompt of this length fits, whichever rung answers.
    model |= {"max_model_len": min(lengths), "context_length": min(lengths)} if lengths else {}
    return model | {"precisions": list(variants.values())}


def _permission(model: str, created: int) -> dict[str, Any]:
    """OpenAI's former permission object, which vLLM still sends and some tools read."""
    allowed = ("allow_sampling", "allow_logprobs", "allow_view")
    denied = ("allow_create_engine", "allow_search_indices", "allow_fine_tuning", "is_blocking")
    permission: dict[str, Any] = {"id": f"modelperm-{model}", "object": "model_permission", "created": created}
    permission |= dict.fromkeys(allowed, True) | dict.fromkeys(denied, False)
    return permission | {"organization": "*", "group": None}


def _answer(request: Request, content: dict[str, Any]) -> Response:
    return JSONResponse(content, headers={"x-request-id": request.headers["x-request-id"]})


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    headers = {name.decode(): value.decode() for name, value in error.headers()}
    headers["x-request-id"] = request.headers["x-request-id"]
    body = error.anthropic_body() if expects_anthropic_errors(request.url.path) else error.body()
    return Response(body, error.status, headers, media_type=JSON)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """Answer an unknown path or a wrong method in a shape that SDKs can read."""
    assert isinstance(error, HTTPException)
    known = ", ".join([*(endpoint.path for endpoint in ENDPOINTS.values()), "/v1/models", "/health"])
    refusal = RequestError(
        f"{request.method} {request.url.path[:200]}: {error.detail}; known: {known}", code="not_found"
    )
    refusal.status = error.status_code
    response = await _refuse(request, refusal)
    response.headers.update(error.headers or {})
    return response
