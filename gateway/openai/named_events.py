"""Filter of named events: `/v1/responses` and Anthropic's `/v1/messages`.

`model` is replaced inside the object of `message_start` and of response events, all else passes.

==========  ==============================================================  ============
state       event                                                           next state
==========  ==============================================================  ============
opening     an opener (gateway.openai.openers)                              opening
opening     content, or any other event                                     open
open        `message_stop`, `response.completed`, `response.incomplete`     finished
any         `error`, `response.failed`                                      failed
finished    `[DONE]` and comments are passed on, all else is dropped        finished
==========  ==============================================================  ============
"""

from dataclasses import dataclass
from typing import Any

import msgspec

from gateway.errors import INVALID_JSON, GatewayError, UpstreamError
from gateway.openai.endpoints import Endpoint
from gateway.openai.openers import LIFECYCLE, event_has_content
from gateway.openai.response import embedded_status, error_from_response, reason_of_response
from gateway.openai.sse import DONE, error_event, event_data, event_name, is_comment
from gateway.openai.usage import Usage

Fields = dict[str, msgspec.Raw]

_ENCODER = msgspec.json.Encoder()
_FIELDS = msgspec.json.Decoder(Fields)
_INCOMPLETE = msgspec.Raw(b'"incomplete"')


@dataclass(slots=True)
class NamedEventFilter:
    """Filter of one stream of named events. Events with a delta are not decoded.

    `response_id` is that of a response which another replica has announced to the client: this one is not announced
    again, and gets that id.
    """

    endpoint: Endpoint
    model: str
    response_id: str | None = None
    usage: Usage | None = None
    finish: str = ""
    finished: bool = False
    failure: GatewayError | None = None
    tokens: bool = False
    flowing: bool = False

    def apply(self, event: bytes) -> bytes:
        """Return what the client gets for an event; b"" for nothing."""
        name = event_name(event)
        self.tokens = name.endswith(b"delta") and name != b"message_delta" and not self.finished
        if self.tokens:
            self.flowing = True
            return event
        data = event_data(event)
        if not data:
            return event if is_comment(event) else b""
        if data == DONE:
            # vLLM ends both with it, although neither API has it: the final event marks the end.
            return event if self.finished else b""
        if self.finished:
            return b""
        if name == b"error":
            return self._fail(data)
        self.flowing = self.flowing or event_has_content(name, data)
        return self._apply_decoded(name, event, data)

    def _fail(self, data: bytes) -> bytes:
        self.failure, self.flowing = error_from_response(embedded_status(data), data), False
        return error_event(self.endpoint, self.failure)

    def _apply_decoded(self, name: bytes, event: bytes, data: bytes) -> bytes:
        try:
            fields = _FIELDS.decode(data)
            if not name and bytes(fields.get("error", b"null")) != b"null":
                return self._fail(data)
            inner = "message" if self.endpoint.errors == "anthropic" else "response"
            body = _FIELDS.decode(fields[inner]) if inner in fields and fields[inner] != b"null" else None
            self._update(name, fields, body or {})
        except INVALID_JSON:
            return event
        if body is None:
            return event
        if self.response_id is not None:
            if name in LIFECYCLE:
                return b""
            body["id"] = msgspec.Raw(_ENCODER.encode(self.response_id))
        if "model" in body:
            body["model"] = msgspec.Raw(_ENCODER.encode(self.model))
        elif self.response_id is None:
            return event
        fields[inner] = msgspec.Raw(_ENCODER.encode(body))
        return b"event: %b\ndata: %b\n\n" % (name, _ENCODER.encode(fields))

    def _update(self, name: bytes, fields: Fields, body: Fields) -> None:
        """Read usage, the finish reason and the end of the stream."""
        usage = body.get("usage") or fields.get("usage")
        if usage is not None and bytes(usage) != b"null":
            self.usage = msgspec.json.decode(usage, type=Usage).merged_with(self.usage)
        if name in {b"message_stop", b"response.completed", b"response.incomplete"}:
            self.finished, self.flowing = True, False
            # vLLM calls the last event `response.completed` in any case; the response inside says what it is.
            cut = name == b"response.incomplete" or body.get("status") == _INCOMPLETE
            self.finish = self.finish or reason_of_response(body) or ("length" if cut else "stop")
        elif name == b"message_delta":
            delta = msgspec.json.decode(fields.get("delta", b"{}"), type=dict[str, Any])
            self.finish = str(delta.get("stop_reason") or self.finish)
        elif name == b"response.failed":
            self.failure, self.flowing = UpstreamError("a replica failed during the generation"), False
