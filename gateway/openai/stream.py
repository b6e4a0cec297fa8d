"""Follows a stream event by event: what the client gets for each, and how the stream ends.

Two grammars: OpenAI's chunks (chat, completions), which end with a finish reason and `[DONE]`, and named events
(responses, messages), whose last one says that all is told. A stream that ends otherwise has failed.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gateway.errors import NO_JSON, GatewayError, UpstreamDisconnected, UpstreamError
from gateway.openai.endpoints import Endpoint
from gateway.openai.response import embedded_status, error_from_response
from gateway.openai.sse import DONE, error_event, event_data, event_name, is_comment
from gateway.openai.usage import Usage

Fields = dict[str, msgspec.Raw]

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_NULL = msgspec.Raw(b"null")


class _Chunk(msgspec.Struct):
    usage: Usage | None = None
    choices: list[msgspec.Raw] | None = None
    system_fingerprint: msgspec.Raw = _NULL


class _ErrorEvent(msgspec.Struct):
    error: Any = None


# `model` stands before `choices`, so its first occurrence is the right one; text can't hold it unescaped.
_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_ERROR_BEGIN = re.compile(rb'\{\s*"error"\s*:(?!\s*null)')
_USAGE_BEGIN = re.compile(rb'"usage"\s*:\s*\{')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,32})"')
_OPENING = b'"role":"assistant","content":""'

_CHUNK = msgspec.json.Decoder(_Chunk)
_ERROR = msgspec.json.Decoder(_ErrorEvent)


class StreamFilter(Protocol):
    """A stream so far. `failure` is what went wrong in it, `finished` that it was told to its end."""

    usage: Usage | None
    finish: str
    finished: bool
    failure: GatewayError | None
    tokens: bool  # the last event carried some

    def apply(self, event: bytes) -> bytes:
        """Say what the client gets for an event; b"" for nothing."""


@dataclass(slots=True)
class ChunkFilter:
    """OpenAI's chunks. Events are searched, not parsed, but for those with usage.

    vLLM writes its fingerprint into the last chunk: the one with usage, or else those that end a choice. Where usage
    was asked for on our account, these wait for it.
    """

    endpoint: Endpoint
    model: str
    wants_usage: bool
    usage: Usage | None = None
    finish: str = ""
    finished: bool = False
    failure: GatewayError | None = None
    tokens: bool = False
    _served: bytes = b""  # `"model":"..."` as this replica writes it
    _asked: bytes = b""
    _ends: bytes = b""  # what ends choices, and waits

    def apply(self, event: bytes) -> bytes:
        """Say what the client gets for an event; b"" for nothing, as for all that comes behind the end."""
        self.tokens = False
        if self.finished:
            return b""
        if not event.startswith(b"data: {"):
            return self._unusual(event)
        if b'"usage"' in event or b'"error"' in event:
            return self._looked_into(event, event[6:])
        return self._chunk(event)

    def _chunk(self, event: bytes) -> bytes:
        self.tokens = _OPENING not in event
        if b'"finish_reason":"' in event or b'"finish_reason": "' in event:
            self._finish(event)
            if self.failure is not None:
                return error_event(self.endpoint, self.failure)
            if not self.wants_usage:
                self._ends += self._renamed(event)
                return b""
        return self._ended(_NULL) + self._renamed(event) if self._ends else self._renamed(event)

    def _ended(self, fingerprint: msgspec.Raw) -> bytes:
        ends, self._ends = self._ends, b""
        if fingerprint == _NULL or b'"system_fingerprint"' in ends:
            return ends
        return ends.replace(b"}\n\n", b',"system_fingerprint":%b}\n\n' % fingerprint)

    def _renamed(self, event: bytes) -> bytes:
        if self._served and self._served in event:
            return event.replace(self._served, self._asked, 1)
        found = _MODEL.search(event)
        if found is None:
            return event
        self._served = found[0]
        self._asked = b"%b%b" % (found[0][: found[0].index(b":") + 1], _ENCODER.encode(self.model))
        if found[0][found[0].index(b":") + 1 :].startswith(b" "):
            self._asked = self._asked.replace(b":", b": ", 1)
        return event[: found.start()] + self._asked + event[found.end() :]

    def _unusual(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            # An event without data crashes the OpenAI SDK.
            return self._ended(_NULL) + event if is_comment(event) else b""
        if data == DONE:
            return self._done(event)
        if event_name(event) == b"error":
            return self._failed(data)
        return self._looked_into(event, data)

    def _done(self, event: bytes) -> bytes:
        if self.failure is not None:
            return b""
        if not self.finish:
            self.failure = UpstreamDisconnected("a replica ended its stream in the middle")
            return error_event(self.endpoint, self.failure)
        self.finished = True
        return self._ended(_NULL) + event

    def _looked_into(self, event: bytes, data: bytes) -> bytes:
        if _ERROR_BEGIN.match(data) or (b'"error"' in data and _tells_error(data)):
            return self._failed(data)
        chunk = _counted(data) if _USAGE_BEGIN.search(data) else None
        if chunk is None:
            return self._chunk(event)
        self.usage = chunk.usage
        if chunk.choices != []:
            return self._chunk(event)
        return self._renamed(event) if self.wants_usage else self._ended(chunk.system_fingerprint)

    def _failed(self, data: bytes) -> bytes:
        self.failure = error_from_response(embedded_status(data), data)
        return error_event(self.endpoint, self.failure)

    def _finish(self, event: bytes) -> None:
        reasons = _FINISH.findall(event)
        self.finish = reasons[-1].decode() if reasons else self.finish
        if b"abort" in reasons:
            self.failure = UpstreamError("a replica gave the answer up in the middle", code="upstream_aborted")


@dataclass(slots=True)
class NamedEventFilter:
    """Named events: `/v1/responses`, and `/v1/messages` in Anthropic's words. Few of them hold more than text."""

    endpoint: Endpoint
    model: str
    usage: Usage | None = None
    finish: str = ""
    finished: bool = False
    failure: GatewayError | None = None
    tokens: bool = False

    def apply(self, event: bytes) -> bytes:
        """Say what the client gets for an event; b"" for nothing."""
        name = event_name(event)
        self.tokens = name.endswith(b"delta") and name != b"message_delta" and not self.finished
        if self.tokens:
            return event
        data = event_data(event)
        if not data:
            return event if is_comment(event) else b""
        if data == DONE:
            # vLLM ends both with it; neither grammar has it, and the last event has told the end.
            return event if self.finished else b""
        if self.finished:
            return b""
        if name == b"error":
            return self._failed(data)
        return self._told(name, event, data)

    def _failed(self, data: bytes) -> bytes:
        self.failure = error_from_response(embedded_status(data), data)
        return error_event(self.endpoint, self.failure)

    def _told(self, name: bytes, event: bytes, data: bytes) -> bytes:
        try:
            fields = _FIELDS.decode(data)
            if not name and bytes(fields.get("error", b"null")) != b"null":
                return self._failed(data)
            inner = "message" if self.endpoint.errors == "anthropic" else "response"
            body = _FIELDS.decode(fields[inner]) if inner in fields and fields[inner] != b"null" else None
            self._follow(name, fields, body or {})
        except NO_JSON:
            return event
        if body is None or "model" not in body:
            return event
        body["model"] = msgspec.Raw(_ENCODER.encode(self.model))
        fields[inner] = msgspec.Raw(_ENCODER.encode(body))
        return b"event: %b\ndata: %b\n\n" % (name, _ENCODER.encode(fields))

    def _follow(self, name: bytes, fields: Fields, body: Fields) -> None:
        usage = body.get("usage") or fields.get("usage")
        if usage is not None and bytes(usage) != b"null":
            self.usage = msgspec.json.decode(usage, type=Usage).beside(self.usage)
        if name in {b"message_stop", b"response.completed", b"response.incomplete"}:
            self.finished = True
            self.finish = self.finish or ("length" if name == b"response.incomplete" else "stop")
        elif name == b"message_delta":
            delta = msgspec.json.decode(fields.get("delta", b"{}"), type=dict[str, Any])
            self.finish = str(delta.get("stop_reason") or self.finish)
        elif name == b"response.failed":
            self.failure = UpstreamError("a replica failed in the middle of the answer")


def stream_filter(endpoint: Endpoint, model: str, *, wants_usage: bool) -> StreamFilter:
    """Follow a stream of an endpoint."""
    if endpoint.takes_stream_options:
        return ChunkFilter(endpoint, model, wants_usage)
    return NamedEventFilter(endpoint, model)


def _counted(data: bytes) -> _Chunk | None:
    try:
        return _CHUNK.decode(data)
    except NO_JSON:
        # Nothing to count, and for the client to judge.
        return None


def _tells_error(data: bytes) -> bool:
    """Tell whether a chunk has an error in it, wherever."""
    try:
        return _ERROR.decode(data).error is not None
    except NO_JSON:
        return False
