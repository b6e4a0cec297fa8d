"""One inference endpoint: reads a request, finds who may answer, relays the answer, and accounts for all of it."""

import asyncio
import os
import re
from dataclasses import dataclass
from functools import partial

from gateway.api.endpoints import ENDPOINTS
from gateway.api.inference import Inference, parse_inference
from gateway.errors import BodyTooLarge, FloorUnmet, GatewayError, Unavailable
from gateway.in_force import InForce
from gateway.keys import Caller
from gateway.metrics import Metrics
from gateway.quota import Quota
from gateway.relay.accounting import Account
from gateway.relay.exchange import Relay
from gateway.relay.teller import Teller

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class InferenceEndpoint:
    """Answers the requests of one endpoint, or says why not, in the words of its SDKs."""

    endpoint: Endpoint
    in_force: InForce
    relay: Relay
    quota: Quota
    metrics: Metrics

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        headers = dict(scope["headers"])
        with Account(self.metrics, self.name, request_id(scope)) as account:
            try:
                if request.refusal is not None:
                    raise request.refusal
                await self._answer(request, caller, account, teller)
            except GatewayError as error:
                self._refused(error, account, teller)
            except ClientLeft:
                account.left()
                raise
            except asyncio.CancelledError:
                account.left()
                if not reply.client_left:
                    self._refused(Draining("the gateway stops; ask again"), account, teller)
                raise

    async def _answer(self, headers: dict[bytes, bytes], account: Account, receive: Receive, send: Send) -> None:
        self.in_force.keys.authenticate(
            {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        )
        limits = self.in_force.limits
        body = await read_body(receive, limits.body_bytes)
        account.read()
        inference = parse_inference(ENDPOINTS[self.name], body, headers, limits)
        await unless_client_leaves(self._relayed(inference, account, send), receive)

    async def _relayed(self, inference: Inference, caller: Caller, account: Account, teller: Teller) -> None:
        """Relay an answer; once more by another configuration, if the one that it began with lost its replicas."""
        while True:
            catalog = self.in_force.catalog
            target = catalog.resolve(inference.model)
            account.alias = target.name
            if inference.stream:
                teller.keep_alive(target.timeouts.heartbeat_seconds)
            waits = target.timeouts.queue_seconds
            wait_seconds = self.in_force.limits.queue_seconds if waits is None else waits
            try:
                await self.relay.answer(inference, target, caller, account, teller, wait_seconds)
            except Unavailable:
                if account.begun or catalog is self.in_force.catalog:
                    raise
            else:
                return

    def _refused(self, error: GatewayError, account: Account, teller: Teller) -> None:
        if isinstance(error, FloorUnmet):
            self.metrics.floor_rejections.labels(account.alias).inc()
        account.code = error.code if account.begun else str(error.status)
        teller.refuse(error)


def request_id(request: Request) -> str:
    """The id of a request, the same whoever asks: the client's own if it is a sane one, otherwise one made here."""
    known: str | None = scope.get("quantgate.request_id")
    if known is None:
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        known = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope["quantgate.request_id"] = known
    return known


async def read_body(receive: Receive, limit_bytes: int) -> bytes:
    """Read a request's body, counting what really comes."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit_bytes:
            raise BodyTooLarge(f"the body is longer than {limit_bytes} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_client_leaves(answer: Coroutine[Any, Any, None], receive: Receive) -> None:
    """Run an answer to its end, or cancel it when the client goes; whatever it raises comes out unwrapped."""
    exchange = asyncio.create_task(answer, name="exchange")
    departure = asyncio.create_task(_departure(receive), name="departure")
    try:
        await asyncio.wait({exchange, departure}, return_when=asyncio.FIRST_COMPLETED)
        if not exchange.done():
            raise ClientLeft
        await exchange
    finally:
        for task in (exchange, departure):
            task.cancel()
        await asyncio.gather(exchange, departure, return_exceptions=True)


async def _departure(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
