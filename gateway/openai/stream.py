"""Filters for streamed responses: rewrite each event for the client, and determine how the stream ends.

Two grammars. OpenAI's chunks (chat, completions) end with a finish reason for each choice, then `[DONE]`. Named events
(responses, messages) end with a final event. A stream that ends otherwise has failed.

ChunkFilter, for each event from the replica:

==========  ==============================  ========================================================  ==========
state       event                           to the client                                             next state
==========  ==============================  ========================================================  ==========
open        chunk, comment                  the chunk with the requested model name; the comment      open
open        chunk with a finish reason      the same, if the client wants usage                       open
open        ... usage not wanted            nothing: it is withheld for the fingerprint               withheld
withheld    ... another one (choice)        nothing: it is withheld, too                              withheld
withheld    chunk with usage, no choices    the withheld chunks with its fingerprint                  open
withheld    chunk, comment, `[DONE]`        the withheld chunks, then that event as in open
open        error, or reason `abort`        an error event; `failure` is set                          failed
open        `[DONE]`, a choice not ended    an error event; `failure` is set                          failed
open        `[DONE]`                        itself; `finished` is set                                 finished
finished    any event                       nothing                                                   finished
==========  ==============================  ========================================================  ==========

Until a chunk carries content the stream is `opening`: see gateway.openai.openers. Other events without data are dropped
in every state: the OpenAI SDK crashes on them. The filter of named events is in gateway.openai.named_events.

The caller stops at `failure`; its error event reaches the client only if something was sent before.
"""

import re
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from gateway.errors import INVALID_JSON, GatewayError, UpstreamDisconnected, UpstreamError
from gateway.openai.endpoints import Endpoint
from gateway.openai.fields import read
from gateway.openai.named_events import NamedEventFilter
from gateway.openai.openers import chunk_has_content
from gateway.openai.request import InferenceRequest
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


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class _Choices(msgspec.Struct):
    choices: list[_Choice] = []


class _ErrorEvent(msgspec.Struct):
    error: Any = None


# `model` precedes `choices`, so the first match is the right one. Generated text cannot match: its quotes are escaped.
_MODEL = re.compile(rb'"model"\s*:\s*"(?:[^"\\]|\\.)*"')
_ERROR_START = re.compile(rb'\{\s*"error"\s*:(?!\s*null)')
_USAGE_START = re.compile(rb'"usage"\s*:\s*\{')
_FINISH_REASON = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,32})"')
# The first chunk of a chat, which carries no token.
_TEXT_DELTA = b'"delta":{"content":"'
_ROLE_DELTA = b'"role":"assistant","content":""'

_CHUNK = msgspec.json.Decoder(_Chunk)
_CHOICES = msgspec.json.Decoder(_Choices)
_ERROR = msgspec.json.Decoder(_ErrorEvent)
_INTEGER = msgspec.json.Decoder(int | None)
_ENTRIES = msgspec.json.Decoder(list[msgspec.Raw])


class StreamFilter(Protocol):
    """Filter of one stream, with what is known of the stream so far."""

    usage: Usage | None
    finish: str  # the finish reason; "" before it
    finished: bool  # the stream was complete
    failure: GatewayError | None
    tokens: bool  # the last event carried generated tokens
    flowing: bool  # content has begun to arrive, and neither the end nor a failure has come

    def apply(self, event: bytes) -> bytes:
        """Return what the client gets for an event; b"" for nothing."""


@dataclass(slots=True)
class ChunkFilter:
    """Filter of OpenAI's chunks. Events are searched, not decoded, except for those with usage or an error.

    vLLM writes `system_fingerprint` into the last chunk: the one with usage, or without usage those with a finish
    reason. If the gateway requested the usage, that chunk is dropped, and the withheld ones get its fingerprint.
    """

    endpoint: Endpoint
    model: str
    wants_usage: bool
    usage: Usage | None = None
    finish: str = ""
    finished: bool = False
    failure: GatewayError | None = None
    tokens: bool = False
    flowing: bool = False
    choices: int = 1  # each of them must end
    _ended: frozenset[int] = frozenset()  # choices that have ended, if there are several
    _served_model: bytes = b""  # `"model":"..."` as this replica writes it
    _requested_model: bytes = b""  # its replacement, with the same spacing
    _withheld: bytes = b""  # chunks with a finish reason
    # The last chunk of text, before and after its text, and its beginning as the client gets it.
    _before: bytes = b"\0"
    _after: bytes = b""
    _before_out: bytes = b""

    def apply(self, event: bytes) -> bytes:
        """Return what the client gets for an event; b"" for nothing, as for everything after the end."""
        before = self._before
        if event.startswith(before) and event.endswith(self._after):
            start = len(before)
            if event.find(b'"', start) == len(event) - len(self._after):
                # The same chunk as the last one but for its text, which has no quote: nothing else can have changed.
                self.tokens = True
                return self._before_out + event[start:]
        self.tokens = False
        if self.finished:
            return b""
        if not event.startswith(b"data: {"):
            return self._apply_uncommon(event)
        if b'"usage"' in event or b'"error"' in event:
            self._before = b"\0"
            return self._apply_decoded(event, event[6:])
        withheld, out = self._withheld, self._apply_chunk(event)
        self._before = b"\0"
        if self.tokens and not withheld and not self._withheld:
            self._learn(event, out)
        return out

    def _learn(self, event: bytes, out: bytes) -> None:
        """Remember a chunk of text by what is around the text, if the client gets it with another model name only."""
        start = event.find(_TEXT_DELTA) + len(_TEXT_DELTA)
        if start < len(_TEXT_DELTA) or not out.endswith(event[start:]):
            return
        end = event.find(b'"', start)
        if event[end : end + 2] == b'"}' and event[end - 1 : end] != b"\\":
            self._before, self._after = event[:start], event[end:]
            self._before_out = out[: len(out) - len(event) + start]

    def _apply_chunk(self, event: bytes) -> bytes:
        self.tokens = _ROLE_DELTA not in event
        if self.tokens and not self.flowing:
            self.tokens = self.flowing = chunk_has_content(event_data(event))
        if b'"finish_reason":"' in event or b'"finish_reason": "' in event:
            reasons = _FINISH_REASON.findall(event)
            if b"abort" in reasons:
                return self._fail_with(UpstreamError("a replica aborted the generation", code="upstream_aborted"))
            self._read_finish_reason(event, reasons)
            if not self.wants_usage:
                self._withheld += self._replace_model(event)
                return b""
        return self._release(_NULL) + self._replace_model(event) if self._withheld else self._replace_model(event)

    def _release(self, fingerprint: msgspec.Raw) -> bytes:
        """Return the withheld chunks, with a fingerprint if they have none."""
        chunks, self._withheld = self._withheld, b""
        if fingerprint == _NULL or b'"system_fingerprint"' in chunks:
            return chunks
        return chunks.replace(b"}\n\n", b',"system_fingerprint":%b}\n\n' % fingerprint)

    def _replace_model(self, event: bytes) -> bytes:
        if self._served_model and self._served_model in event:
            return event.replace(self._served_model, self._requested_model, 1)
        match = _MODEL.search(event)
        if match is None:
            return event
        self._served_model = match[0]
        key, value = match[0][: match[0].index(b":") + 1], match[0][match[0].index(b":") + 1 :]
        self._requested_model = b"%b%b" % (key, _ENCODER.encode(self.model))
        if value.startswith(b" "):
            self._requested_model = self._requested_model.replace(b":", b": ", 1)
        return event[: match.start()] + self._requested_model + event[match.end() :]

    def _apply_uncommon(self, event: bytes) -> bytes:
        data = event_data(event)
        if not data:
            return self._release(_NULL) + event if is_comment(event) else b""
        if data == DONE:
            return self._apply_done(event)
        if event_name(event) == b"error":
            return self._fail(data)
        return self._apply_decoded(event, data)

    def _apply_done(self, event: bytes) -> bytes:
        if self.failure is not None:
            return b""
        if not self.finish or (self.choices > 1 and len(self._ended) < self.choices):
            which = "a finish reason" if self.choices == 1 else f"{self.choices} finish reasons"
            return self._fail_with(UpstreamDisconnected(f"a replica ended its stream without {which}"))
        self.finished, self.flowing = True, False
        return self._release(_NULL) + event

    def _apply_decoded(self, event: bytes, data: bytes) -> bytes:
        if _ERROR_START.match(data) or (b'"error"' in data and _has_error(data)):
            return self._fail(data)
        chunk = _decode_chunk(data) if _USAGE_START.search(data) else None
        if chunk is None:
            return self._apply_chunk(event)
        self.usage = chunk.usage
        if chunk.choices != []:
            return self._apply_chunk(event)
        return self._replace_model(event) if self.wants_usage else self._release(chunk.system_fingerprint)

    def _fail(self, data: bytes) -> bytes:
        return self._fail_with(error_from_response(embedded_status(data), data))

    def _fail_with(self, failure: GatewayError) -> bytes:
        self.failure, self.flowing = failure, False
        return error_event(self.endpoint, failure)

    def _read_finish_reason(self, event: bytes, reasons: list[bytes]) -> None:
        self.finish = reasons[-1].decode() if reasons else self.finish
        if self.choices > 1:
            self._ended |= _ended_choices(event_data(event))


def stream_filter(
    endpoint: Endpoint, model: str, *, wants_usage: bool, choices: int = 1, response_id: str | None = None
) -> StreamFilter:
    """Make the filter for a stream of an endpoint; `model` is the name that the client requested.

    `choices` is how many choices must end. `response_id` is the id of a response that was announced to the client.
    """
    if endpoint.takes_stream_options:
        return ChunkFilter(endpoint, model, wants_usage, choices=choices)
    return NamedEventFilter(endpoint, model, response_id)


def expected_choices(inference: InferenceRequest) -> int:
    """Return how many choices a request asks for: `n` for each of its prompts."""
    fields, batch = inference.fields, inference.endpoint.batch
    count = (read(fields, "n", _INTEGER) or 1) if "n" in fields else 1
    prompts = fields.get(batch) if batch else None
    return count * _prompts_in(prompts) if prompts is not None and bytes(memoryview(prompts)[:1]) == b"[" else count


def _prompts_in(prompts: msgspec.Raw) -> int:
    """Count the prompts of an array; an array of token ids is one prompt."""
    entries = _ENTRIES.decode(prompts)
    return 1 if not entries or bytes(entries[0])[:1].isdigit() else len(entries)


def _ended_choices(data: bytes) -> frozenset[int]:
    """The indices of the choices that a chunk ends."""
    try:
        return frozenset([choice.index for choice in _CHOICES.decode(data).choices if choice.finish_reason])
    except INVALID_JSON:
        return frozenset()


def _decode_chunk(data: bytes) -> _Chunk | None:
    try:
        return _CHUNK.decode(data)
    except INVALID_JSON:
        # Malformed: not counted, and passed on unchanged.
        return None


def _has_error(data: bytes) -> bool:
    """Whether a chunk has an `error` that is not null, at any position of its top level."""
    try:
        return _ERROR.decode(data).error is not None
    except INVALID_JSON:
        return False
