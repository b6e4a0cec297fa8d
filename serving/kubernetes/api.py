"""Requests to the API server of Kubernetes: list, watch, get and patch, with typed errors.

Lists are read in pages, and watches are lines of JSON, both as Kubernetes documents them
(https://kubernetes.io/docs/reference/using-api/api-concepts/). The service account's token rotates, so it is read again
every minute, and when the server refuses it.
"""

import asyncio
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar

import httpx
import msgspec

from serving.errors import (
    ApiConflict,
    ApiExpired,
    ApiForbidden,
    ApiNotFound,
    ApiRejected,
    ApiServerAway,
    ApiServerFailed,
    ApiThrottled,
    ApiUnauthorized,
    KubernetesError,
)
from serving.kubernetes.access import ClusterAccess

Verb = Literal["get", "list", "watch", "patch", "create"]
Kind = TypeVar("Kind")

TIMEOUT_SECONDS = 10.0
TOKEN_SECONDS = 60.0
PAGE_OBJECTS = 500
WATCH_SECONDS = 290
# The server sends a bookmark about once a minute; a connection without one for longer is taken for dead.
SILENCE_SECONDS = 120.0
MAX_LINE_BYTES = 64 * 2**20
# Whatever the server says, nothing waits longer before it asks again.
LONGEST_RETRY_AFTER_SECONDS = 300.0
# Characters that a header can have; an empty header is none.
TOKEN = re.compile(r"[\x21-\x7e]+")
# What the decoder raises for content that is no JSON, no UTF-8, or nested too deeply.
UNREADABLE = (ValueError, RecursionError)


@dataclass(frozen=True, slots=True)
class Resource:
    """The objects of one kind in a namespace, such as `endpointslices` of the group `discovery.k8s.io`."""

    group: str
    version: str
    plural: str
    namespace: str

    def path(self, name: str = "", subresource: str = "") -> str:
        """Return the path of all objects, of one, or of a subresource of one, such as `scale`."""
        parts = ("apis", self.group, self.version, "namespaces", self.namespace, self.plural, name, subresource)
        return "/" + "/".join(part for part in parts if part)

    def granted(self, subresource: str = "") -> str:
        """Name what a role must have a rule for."""
        kind = f"{self.plural}/{subresource}" if subresource else self.plural
        return f"{kind} of {self.group} in the namespace {self.namespace}"


class ListMeta(msgspec.Struct, frozen=True, rename="camel"):
    """Version of a list, and where its next page begins."""

    resource_version: str = ""
    continue_: str | None = msgspec.field(default=None, name="continue")


class _Page(msgspec.Struct, frozen=True):
    metadata: ListMeta
    items: tuple[msgspec.Raw, ...] | None = None


class _Line(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


class _Status(msgspec.Struct, frozen=True):
    """Why a request failed, as the server says it."""

    message: str = ""
    reason: str = ""
    code: int = 0


@dataclass(frozen=True, slots=True)
class Listed(Generic[Kind]):
    """All objects at one version; a watch continues from there."""

    items: tuple[Kind, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Event(Generic[Kind]):
    """A change of one object, or of the version alone; `object` is None for a BOOKMARK."""

    type: str
    version: str
    object: Kind | None


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    resource_version: str = ""


class _Versioned(msgspec.Struct, frozen=True):
    metadata: _Meta


@dataclass(slots=True)
class KubernetesApi:
    """A client of one API server while the `async with` block runs. Every call may raise KubernetesError.

    A watch that is silent for `silence_seconds` has ended.
    """

    access: ClusterAccess
    timeout_seconds: float = TIMEOUT_SECONDS
    token_seconds: float = TOKEN_SECONDS
    silence_seconds: float = SILENCE_SECONDS
    clock: Callable[[], float] = time.monotonic
    _client: httpx.AsyncClient | None = None
    _token: str = field(default="", repr=False)
    _token_read_at: float = float("-inf")

    async def __aenter__(self) -> Self:
        """Open the client; nothing is sent yet. OptionError: the CA file is not usable."""
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.AsyncClient(
            base_url=self.access.server,
            verify=self.access.context(),
            timeout=self.timeout_seconds,
            limits=limits,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections, watches included."""
        if self._client is not None:
            await self._client.aclose()

    async def list(
        self, resource: Resource, kind: type[Kind], selector: str = "", page_objects: int = PAGE_OBJECTS
    ) -> Listed[Kind]:
        """Return all objects with the labels of `selector`, as `kind`, a msgspec type.

        ApiExpired: the server has forgotten the first page before the last was read, twice.
        """
        query = {"limit": str(page_objects)} | ({"labelSelector": selector} if selector else {})
        try:
            return await self._list(resource, kind, query)
        except ApiExpired:
            return await self._list(resource, kind, query)

    async def _list(self, resource: Resource, kind: type[Kind], query: Mapping[str, str]) -> Listed[Kind]:
        items: list[Kind] = []
        position: dict[str, str] = {}
        while True:
            reply = await self._send("list", resource, "GET", resource.path(), params={**query, **position})
            page = self._decoded(reply.content, _Page)
            items += [self._decoded(item, kind) for item in page.items or ()]
            if not page.metadata.continue_:
                return Listed(tuple(items), page.metadata.resource_version)
            position = {"continue": page.metadata.continue_}

    @asynccontextmanager
    async def watch(
        self,
        resource: Resource,
        kind: type[Kind],
        version: str,
        selector: str = "",
        timeout_seconds: int = WATCH_SECONDS,
    ) -> AsyncIterator[AsyncIterator[Event[Kind]]]:
        """Open a watch: every change after `version`, until the server ends it, usually after `timeout_seconds`.

        ApiExpired: the server has forgotten that version. A line that is cut off is not a change: it ends the watch.
        """
        query = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true"}
        query |= {"timeoutSeconds": str(timeout_seconds)} | ({"labelSelector": selector} if selector else {})
        timeout = httpx.Timeout(self.timeout_seconds, read=self.silence_seconds)
        assert self._client is not None
        request = self._client.build_request(
            "GET", resource.path(), params=query, headers=self._headers(), timeout=timeout
        )
        with self._translated():
            async with asyncio.timeout(self.timeout_seconds):
                reply = await self._client.send(request, stream=True)
        async with aclosing(reply):
            if not reply.is_success:
                with self._translated():
                    await reply.aread()
                self._check(reply, "watch", resource)
            async with aclosing(self._events(reply, kind, resource)) as events:
                yield events

    async def _events(
        self, reply: httpx.Response, kind: type[Kind], resource: Resource
    ) -> AsyncGenerator[Event[Kind], None]:
        with self._translated():
            async for line in _lines(reply):
                yield self._event(line, kind, resource)

    async def get(self, resource: Resource, name: str, kind: type[Kind], subresource: str = "") -> Kind:
        """Return one object, or a subresource of it."""
        reply = await self._send("get", resource, "GET", resource.path(name, subresource), subresource)
        return self._decoded(reply.content, kind)

    async def patch(
        self, resource: Resource, name: str, kind: type[Kind], body: Mapping[str, Any], subresource: str = ""
    ) -> Kind:
        """Change the fields in `body` (RFC 7396) and return the object.

        ApiConflict: `body` has a `metadata.resourceVersion`, and the object another one.
        """
        reply = await self._send(
            "patch",
            resource,
            "PATCH",
            resource.path(name, subresource),
            subresource,
            content=msgspec.json.encode(body),
            headers={"content-type": "application/merge-patch+json"},
        )
        return self._decoded(reply.content, kind)

    async def _send(
        self, verb: Verb, resource: Resource, method: str, path: str, subresource: str = "", **request: Any
    ) -> httpx.Response:
        """Send a request; once more if the token has changed since it was read."""
        assert self._client is not None
        headers = request.pop("headers", {})
        with self._translated():
            reply = await self._client.request(method, path, headers=headers | self._headers(), **request)
            if reply.status_code == httpx.codes.UNAUTHORIZED and self._token_has_changed():
                reply = await self._client.request(method, path, headers=headers | self._headers(), **request)
        self._check(reply, verb, resource, subresource)
        return reply

    def _headers(self) -> dict[str, str]:
        if self.access.token_file is None:
            return {}
        if self.clock() - self._token_read_at >= self.token_seconds:
            self._read_token()
        return {"authorization": f"Bearer {self._token}"}

    def _token_has_changed(self) -> bool:
        before = self._token
        if self.access.token_file is not None:
            self._read_token()
        return self._token != before

    def _read_token(self) -> None:
        file = self.access.token_file
        assert file is not None
        try:
            token = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ApiUnauthorized(f"{file} with the token for {self.access.server} can't be read: {error}") from error
        if not TOKEN.fullmatch(token):
            raise ApiUnauthorized(f"{file} for {self.access.server} has no token, or not only a token")
        self._token = token
        self._token_read_at = self.clock()

    def _check(self, reply: httpx.Response, verb: Verb, resource: Resource, subresource: str = "") -> None:
        """Raise what an answer stands for that is not a success. A refused token is read again before its next use."""
        if reply.status_code == httpx.codes.UNAUTHORIZED:
            self._token_read_at = float("-inf")
        if not reply.is_success:
            what = f"{verb} {resource.granted(subresource)}"
            raise error_of(reply.status_code, f"{self.access.server}: {what}", _message(reply), reply.headers)

    def _event(self, line: bytes, kind: type[Kind], resource: Resource) -> Event[Kind]:
        read = self._decoded(line, _Line)
        if read.type == "ERROR":
            status = self._decoded(read.object, _Status)
            where = f"{self.access.server}: watch {resource.granted()}"
            raise error_of(status.code, where, status.message or status.reason, {})
        version = self._decoded(read.object, _Versioned).metadata.resource_version
        return Event(read.type, version, None if read.type == "BOOKMARK" else self._decoded(read.object, kind))

    def _decoded(self, content: bytes | msgspec.Raw, kind: type[Kind]) -> Kind:
        try:
            return msgspec.json.decode(content, type=kind)
        except UNREADABLE as error:
            raise ApiServerAway(f"{self.access.server}: answered something that is not Kubernetes': {error}") from error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise ApiServerAway(f"{self.access.server}: {what}") from error


def error_of(status: int, where: str, message: str, headers: Mapping[str, str]) -> KubernetesError:
    """Return the error that a status stands for; `where` names server, verb and resource."""
    said = f"{where}: {status} {message}".rstrip()
    match status:
        case 401:
            return ApiUnauthorized(f"{said}; the token is refused")
        case 403:
            return ApiForbidden(f"{said}; add the verb on that resource to the role of the service account")
        case 404:
            return ApiNotFound(said)
        case 409:
            return ApiConflict(said)
        case 410:
            return ApiExpired(said)
        case 429:
            return ApiThrottled(said, _retry_after_seconds(headers))
        case _ if status >= 500 or status == httpx.codes.REQUEST_TIMEOUT:
            return ApiServerFailed(said)
        case _ if status >= 400:
            return ApiRejected(said)
    return ApiServerAway(said)


def _retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After (RFC 9110) in seconds, and limit it; the API server sends no dates."""
    value = headers.get("retry-after", "")
    return min(float(value), LONGEST_RETRY_AFTER_SECONDS) if value.isascii() and value.isdigit() else None


def _message(reply: httpx.Response) -> str:
    """Return what the server says about an error, or the beginning of its answer."""
    try:
        return msgspec.json.decode(reply.content, type=_Status).message
    except UNREADABLE:
        return reply.text[:200]


async def _lines(reply: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the complete lines of an answer; what is after the last line break is incomplete."""
    rest = b""
    async for piece in reply.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in filter(None, lines):
            yield line
        if len(rest) > MAX_LINE_BYTES:
            raise httpx.DecodingError(f"a line is longer than {MAX_LINE_BYTES} bytes")
