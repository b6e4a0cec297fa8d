"""Who answers what: inference endpoints by their raw path, everything else by the FastAPI app; nobody without a key."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from gateway.api.endpoint import InferenceEndpoint
from gateway.api.request_ids import RequestIds
from gateway.errors import Draining, GatewayError, RequestError
from gateway.front import asgi
from gateway.front.reply import Reply, rendered
from gateway.front.request import Request
from gateway.in_force import InForce
from gateway.keys import ANONYMOUS

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
class Site:
    """Answers the requests of the clients' port; while it is `draining`, with a hint to go elsewhere."""

    endpoints: Mapping[bytes, InferenceEndpoint]  # by path
    app: asgi.App
    in_force: InForce
    clock: Callable[[], float] = time.time
    ids: RequestIds = field(default_factory=RequestIds)
    draining: bool = False

    def admit(self, request: Request) -> int:
        """Look at a head: the longest body that it may have; GatewayError refuses it."""
        if self.draining:
            raise Draining("the gateway is about to stop; ask again", retry_after_seconds=1)
        request.caller = self.in_force.keys.authenticate(request.headers, self.clock())
        endpoint = self.endpoints.get(request.path)
        if endpoint is None:
            return SMALL_BODY_BYTES
        if request.method != b"POST":
            raise MethodNotAllowed(f"{request.path.decode()}: Method Not Allowed; send POST")
        return self.in_force.limits.body_bytes

    async def answer(self, request: Request, reply: Reply) -> None:
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

    def failed(self, request: Request, reply: Reply) -> None:
        """Tell a client that the gateway itself has failed."""
        if not reply.begun:
            error = GatewayError("the gateway failed; its log tells more under this x-request-id")
            self._refuse(request, reply, error)

    def _refuse(self, request: Request, reply: Reply, error: GatewayError) -> None:
        headers = (JSON, *error.headers(), (b"x-request-id", request.request_id.encode()))
        reply.whole(error.status, rendered(headers), error.body())
