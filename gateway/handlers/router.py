"""Who answers what: inference endpoints by their raw path, everything else by the FastAPI app; nobody without a key."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.errors import Draining, GatewayError, RequestError
from gateway.handlers.inference import InferenceHandler
from gateway.http import asgi
from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter, header_lines
from gateway.keys import ANONYMOUS
from gateway.live_config import LiveConfig
from gateway.openai.request_ids import RequestIds

# What isn't inference has no body that is worth more.
SMALL_BODY_BYTES = 64 * 1024
JSON = (b"content-type", b"application/json")


class MethodNotAllowed(RequestError):
    """An inference endpoint takes POST only."""

    status = 405
    code = "method_not_allowed"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Say what it takes, as RFC 9110 asks."""
        return [(b"allow", b"POST")]


@dataclass(slots=True)
class Router:
    """Answers the requests of the clients' port; while it is `draining`, with a hint to go elsewhere."""

    endpoints: Mapping[bytes, InferenceHandler]  # by path
    app: asgi.App
    live_config: LiveConfig
    clock: Callable[[], float] = time.time
    ids: RequestIds = field(default_factory=RequestIds)
    draining: bool = False

    def admit(self, request: Request) -> int:
        """Look at a head: the longest body that it may have; GatewayError refuses it."""
        if self.draining:
            raise Draining("the gateway is about to stop; ask again", retry_after_seconds=1)
        request.caller = self.live_config.keys.authenticate(request.headers, self.clock())
        endpoint = self.endpoints.get(request.path)
        if endpoint is None:
            return SMALL_BODY_BYTES
        if request.method != b"POST":
            raise MethodNotAllowed(f"{request.path.decode()}: Method Not Allowed; send POST")
        return self.live_config.limits.body_bytes

    async def handle(self, request: Request, reply: ResponseWriter) -> None:
        """Answer, or tell the request's refusal."""
        request.request_id = self.ids.of(request.headers)
        endpoint = self.endpoints.get(request.path)
        if endpoint is not None:
            await endpoint.answer(request, request.caller or ANONYMOUS, reply)
        elif request.refusal is not None:
            self._refuse(request, reply, request.refusal)
        else:
            request.headers[b"x-request-id"] = request.request_id.encode()
            await asgi.serve(self.app, request, reply)

    def on_internal_error(self, request: Request, reply: ResponseWriter) -> None:
        """Tell a client that the gateway itself has failed."""
        if not reply.started:
            error = GatewayError("the gateway failed; its log tells more under this x-request-id")
            self._refuse(request, reply, error)

    def _refuse(self, request: Request, reply: ResponseWriter, error: GatewayError) -> None:
        headers = (JSON, *error.headers(), (b"x-request-id", request.request_id.encode()))
        reply.send(error.status, header_lines(headers), error.body())
