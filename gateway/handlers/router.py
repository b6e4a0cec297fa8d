"""The clients' port: inference endpoints by their raw path, everything else by the FastAPI app; all authenticated."""

import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from itertools import count

from gateway.errors import Draining, GatewayError, NotAllowed, RequestError
from gateway.handlers.inference import InferenceHandler
from gateway.http import asgi
from gateway.http.cors import Cors, is_preflight, preflight_headers
from gateway.http.hosts import AllowedHosts
from gateway.http.request import Request
from gateway.http.response_writer import ResponseWriter, header_lines
from gateway.keys import Caller
from gateway.live_config import LiveConfig
from gateway.openai.endpoints import expects_anthropic_errors
from gateway.quota import Quota

# Requests other than inference need no larger body.
SMALL_BODY_BYTES = 64 * 1024
# Load balancers and probes ask for these without a key, as they ask vLLM.
OPEN_PATHS = frozenset({b"/health", b"/ping"})
JSON = (b"content-type", b"application/json")
_WELL_FORMED_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class MethodNotAllowed(RequestError):
    """An inference endpoint accepts POST only."""

    status = 405
    code = "method_not_allowed"

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Name the allowed method, as RFC 9110, 15.5.6 requires."""
        return [(b"allow", b"POST")]


class RequestIds:
    """Request ids: the client's `x-request-id` if it is well-formed, otherwise a generated one.

    Generated ids are unique across processes: a random prefix per process, and a counter.
    """

    __slots__ = ("_numbers", "_prefix")

    def __init__(self) -> None:
        self._prefix = f"req-{secrets.token_hex(8)}-"
        self._numbers = count(1)

    def of(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the id of a request with these headers."""
        given = headers.get(b"x-request-id")
        if given is not None and _WELL_FORMED_ID.fullmatch(given):
            return given.decode()
        return f"{self._prefix}{next(self._numbers):x}"


@dataclass(slots=True)
class Router:
    """Implements RequestHandler; while it is `draining`, every request is refused with a hint to retry elsewhere."""

    endpoints: Mapping[bytes, InferenceHandler]  # by path
    app: asgi.App
    live_config: LiveConfig
    quota: Quota
    hosts: AllowedHosts | None = None  # names by which it may be addressed while no key is required; None: any
    clock: Callable[[], float] = time.time
    ids: RequestIds = field(default_factory=RequestIds)
    draining: bool = False

    def admit(self, request: Request) -> int:
        """Authenticate a request by its head; returns the longest body that it may have. GatewayError refuses it."""
        live_config = self.live_config
        endpoint = self.endpoints.get(request.path)
        if endpoint is None or request.method != b"POST":
            self._admit_other(request, endpoint)
            return SMALL_BODY_BYTES
        caller = self._authenticate(request, live_config)
        if caller.limited:
            request.slot = self.quota.start(caller)
        request.endpoint = endpoint
        return live_config.limits.body_bytes

    def handle(self, request: Request, response: ResponseWriter) -> Awaitable[None]:
        """Answer a request, or send its refusal."""
        request.request_id = self.ids.of(request.headers)
        if (cors := self.live_config.cors) is not None:
            response.extra_headers = cors.headers(request.headers.get(b"origin"))
            if is_preflight(request):
                return self._handle_preflight(cors, request, response)
        endpoint: InferenceHandler | None = request.endpoint or self.endpoints.get(request.path)
        return self._handle_other(request, response) if endpoint is None else endpoint.handle(request, response)

    def on_internal_error(self, request: Request, response: ResponseWriter) -> None:
        """Answer 500, unless the answer has begun."""
        if not response.started:
            error = GatewayError("the gateway failed; its log has the error under this x-request-id")
            self._refuse(request, response, error)

    def _authenticate(self, request: Request, live_config: LiveConfig) -> Caller:
        if self.draining:
            raise Draining("the gateway is about to stop; retry", retry_after_seconds=1)
        caller = request.caller = live_config.keys.authenticate(request.headers, self.clock())
        if (name := caller.name) is not None:
            request.owner = name
        elif self.hosts is not None:
            self.hosts.check(request.headers.get(b"host"))
        return caller

    def _admit_other(self, request: Request, endpoint: InferenceHandler | None) -> None:
        cors = self.live_config.cors
        if request.path in OPEN_PATHS or (cors is not None and is_preflight(request)):
            self._check_open(request)
            return
        self._authenticate(request, self.live_config)
        if endpoint is not None:
            raise MethodNotAllowed(f"{request.path.decode()}: Method Not Allowed; send POST")

    def _check_open(self, request: Request) -> None:
        """Check what needs no key."""
        if self.hosts is not None and self.live_config.keys.issued is None:
            self.hosts.check(request.headers.get(b"host"))
        if self.draining:
            raise Draining("the gateway is about to stop; retry", retry_after_seconds=1)

    async def _handle_other(self, request: Request, response: ResponseWriter) -> None:
        if request.refusal is not None:
            self._refuse(request, response, request.refusal)
        else:
            request.headers[b"x-request-id"] = request.request_id.encode()
            await asgi.serve(self.app, request, response)

    async def _handle_preflight(self, cors: Cors, request: Request, response: ResponseWriter) -> None:
        refusal = request.refusal
        if refusal is None and not cors.permits(request.headers[b"origin"]):
            origin = request.headers[b"origin"].decode("latin-1")[:100]
            refusal = NotAllowed(f"the origin {origin!r} is not in gateway.cors.origins", code="origin_not_allowed")
        if refusal is not None:
            self._refuse(request, response, refusal)
            return
        response.extra_headers += preflight_headers(request.headers)
        response.send(200, header_lines(((b"x-request-id", request.request_id.encode()),)), b"")

    def _refuse(self, request: Request, response: ResponseWriter, error: GatewayError) -> None:
        headers = (JSON, *error.headers(), (b"x-request-id", request.request_id.encode()))
        anthropic = expects_anthropic_errors(request.path.decode("latin-1"))
        body = error.anthropic_body() if anthropic else error.body()
        response.send(error.status, header_lines(headers), body)
