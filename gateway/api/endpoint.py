"""One inference endpoint as a plain ASGI app: the exchange lives inside it, so a client that leaves ends it."""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from typing import Any

from gateway.access_log import Tell
from gateway.api.inference import Inference, parse_inference
from gateway.errors import BodyTooLarge, FloorUnmet, GatewayError, RequestError, Unavailable
from gateway.in_force import InForce
from gateway.metrics import Metrics
from gateway.relay.accounting import CLIENT_LEFT, Account
from gateway.relay.exchange import Relay, Send, refuse
from gateway.tracing import Tracing

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ClientLeft(Exception):
    """The client closed its connection; nobody is there to be told anything."""


@dataclass(frozen=True, slots=True)
class InferenceEndpoint:
    """Reads a request, finds who may answer, and relays the answer."""

    name: str
    in_force: InForce
    relay: Relay
    metrics: Metrics
    tell: Tell
    tracing: Tracing

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        trace = self.tracing.begin(self.name, dict(scope["headers"]))
        with Account(self.metrics, self.tell, self.name, request_id(scope), trace=trace) as account:
            try:
                await self._answer(headers, account, receive, send)
            except ClientLeft:
                account.code = "200" if account.told_all else CLIENT_LEFT
            except GatewayError as error:
                if isinstance(error, FloorUnmet):
                    self.metrics.floor_rejections.labels(account.alias).inc()
                await refuse(send, account, error)

    async def _answer(self, headers: dict[str, str], account: Account, receive: Receive, send: Send) -> None:
        account.caller = self.in_force.keys.authenticate(headers) or "none"
        limits = self.in_force.limits
        body = await read_body(headers, receive, limits.body_bytes)
        account.read()
        inference = parse_inference(self.name, body, headers, limits)
        await unless_client_leaves(self._relayed(inference, account, send), receive)

    async def _relayed(self, inference: Inference, account: Account, send: Send) -> None:
        """Relay an answer; once more by another configuration, if the one that it began with lost its replicas."""
        while True:
            catalog = self.in_force.catalog
            target = catalog.resolve(inference.model)
            account.alias = target.name
            try:
                await self.relay.answer(inference, target, account, send)
            except Unavailable:
                if account.begun or catalog is self.in_force.catalog:
                    raise
            else:
                return


def request_id(scope: Message) -> str:
    """The id of a request, the same whoever asks: the client's own if it is a sane one, otherwise one made here."""
    known: str | None = scope.get("quantgate.request_id")
    if known is None:
        given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")
        known = given if REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope["quantgate.request_id"] = known
    return known


async def read_body(headers: dict[str, str], receive: Receive, limit_bytes: int) -> bytes:
    """Read a request's body, counting what really comes; RequestError unless it is declared as JSON."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(f"content-type is {kind or 'missing'!r}; send application/json")
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
