"""One watch: the changes of a resource as JSON lines, and the faults of such a stream.

| fault        | what the stream does                                                              |
| ------------ | --------------------------------------------------------------------------------- |
| `cut`        | closes the connection without an end                                               |
| `end`        | ends as after `timeoutSeconds`                                                     |
| `half_line`  | writes half of a MODIFIED event, then closes the connection                        |
| `duplicate`  | writes its last event again                                                        |
| `bookmark`   | writes a BOOKMARK with the version of now, if the client wants bookmarks           |
| `expire`     | writes an ERROR event whose Status says 410, then ends                             |
| `error`      | writes an ERROR event whose Status says 500, then ends                             |
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.fakes.http_server import Reply
from tests.fakes.kubernetes.failures import ApiFailure, expired
from tests.fakes.kubernetes.faults import Faults
from tests.fakes.kubernetes.store import Change, Queue, Store, StreamFault, has_labels


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What a client watches."""

    resource: str
    namespace: str | None
    labels: Mapping[str, str]
    kind: str
    api_version: str
    version: int | None  # None: everything that exists comes first, as ADDED
    bookmarks: bool
    timeout_seconds: float


class Watch:
    """Writes the events of one watch until it times out, ends by a fault, or the client leaves."""

    def __init__(self, request: WatchRequest, store: Store, faults: Faults, reply: Reply) -> None:
        self._request = request
        self._store = store
        self._faults = faults
        self._reply = reply
        self._last: bytes = b""

    async def run(self) -> None:
        """Write the stream. ApiFailure 410 before its head if the version is too old."""
        request, store = self._request, self._store
        too_old = request.version is not None and request.version < store.compacted
        if too_old and not self._faults.expire_by_event:
            raise expired(request.version or 0, store.compacted)
        await self._reply.start_stream("application/json", {})
        if too_old:
            await self._write("ERROR", expired(request.version or 0, store.compacted).status())
            await self._reply.end_stream()
            return
        with store.subscribed() as queue:
            for change in self._earlier():
                await self._write_change(change)
            await self._follow(queue)

    def _earlier(self) -> list[Change]:
        request = self._request
        if request.version is not None:
            return self._store.since(request.version)
        existing = self._store.matching(request.resource, request.namespace, request.labels)
        return [Change(key, 0, None, each) for key, each in existing.items()]

    async def _follow(self, queue: Queue) -> None:
        async for each in _until(queue, self._request.timeout_seconds):
            if isinstance(each, Change):
                await self._write_change(each)
            elif await self._misbehave(each):
                return
        await self._bookmark()
        await self._faults.silence()
        await self._reply.end_stream()

    async def _write_change(self, change: Change) -> None:
        request = self._request
        if change.key.resource != request.resource or request.namespace not in (None, change.key.namespace):
            return
        before, after = has_labels(change.before, request.labels), has_labels(change.after, request.labels)
        if after:
            await self._write("MODIFIED" if before else "ADDED", change.after)
        elif before:
            assert change.before is not None
            # As the API server does: the last state, with the version of the deletion.
            metadata = {**change.before["metadata"], "resourceVersion": str(change.version)}
            await self._write("DELETED", {**change.before, "metadata": metadata})

    async def _misbehave(self, fault: StreamFault) -> bool:
        """Do what a fault says; whether the stream is over."""
        await self._faults.silence()
        match fault.action:
            case "duplicate" if self._last:
                await self._reply.write(self._last)
            case "bookmark":
                await self._bookmark()
            case "end":
                await self._reply.end_stream()
                return True
            case "cut":
                self._reply.drop()
                return True
            case "half_line":
                await self._reply.write(b'{"type":"MODIFIED","object":{"metadata":{"name":"')
                self._reply.drop()
                return True
            case "expire" | "error":
                code, message = (410, "too old resource version") if fault.action == "expire" else (500, "etcd is away")
                await self._write("ERROR", ApiFailure(code, message).status())
                await self._reply.end_stream()
                return True
        return False

    async def _bookmark(self) -> None:
        if self._request.bookmarks:
            metadata = {"resourceVersion": str(self._store.version), "creationTimestamp": None}
            kind = {"kind": self._request.kind, "apiVersion": self._request.api_version}
            await self._faults.silence()
            await self._reply.write(_line("BOOKMARK", {**kind, "metadata": metadata}))

    async def _write(self, kind: str, document: Any) -> None:
        await self._faults.silence()
        line = _line(kind, document)
        if kind != "ERROR":
            self._last = line
        await self._reply.write(line)


async def _until(queue: Queue, seconds: float) -> AsyncIterator[Change | StreamFault]:
    """Give what comes, until the time is over."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                found = await queue.get()
        except TimeoutError:
            return
        yield found


def _line(kind: str, document: Any) -> bytes:
    return json.dumps({"type": kind, "object": document}, separators=(",", ":")).encode() + b"\n"
