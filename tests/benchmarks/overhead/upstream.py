"""A replica that costs next to nothing: `python -m tests.benchmarks.overhead.upstream PORT`, on eight addresses.

Of a request it reads `stream`, `include_usage`, `max_tokens` (how many chunks) and `seed` (milliseconds between them).
A chunk's text is when it left, in nanoseconds of the monotonic clock, which all processes of a machine share.
"""

import asyncio
import re
import sys
import time
from typing import cast

import httptools
import uvloop

MODEL = "served"
HOSTS = tuple(f"127.0.0.{number}" for number in range(1, 9))

_CHUNKS = re.compile(rb'"max_tokens":\s*(\d+)')
_GAP = re.compile(rb'"seed":\s*(\d+)')
_STREAM = re.compile(rb'"stream":\s*true')

_SAME = b'"id":"chatcmpl-1","created":1700000000,"model":"%b"' % MODEL.encode()
_CHUNK = b'data: {%b,"object":"chat.completion.chunk","choices":[%%b]%%b}\n\n' % _SAME
_CHOICE = b'{"index":0,"delta":{%b},"logprobs":null,"finish_reason":%b}'
_OPENING = _CHUNK % (_CHOICE % (b'"role":"assistant","content":""', b"null"), b"")
_TOKEN = _CHUNK % (_CHOICE % (b'"content":"%d "', b"null"), b"")
_LAST = _CHUNK % (_CHOICE % (b"", b'"stop"'), b"")
_USAGE = _CHUNK % (b"", b',"usage":{"prompt_tokens":20,"completion_tokens":%d,"total_tokens":%d}')
_DONE = b"data: [DONE]\n\n"
_WHOLE = (
    b'{%b,"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"%b"},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":20,"completion_tokens":40,"total_tokens":60}}'
) % (_SAME, b"word " * 40)
_MODELS = b'{"object":"list","data":[{"id":"%b","object":"model","owned_by":"vllm","max_model_len":4096}]}' % (
    MODEL.encode()
)
_METRICS = (
    '# TYPE vllm:num_requests_{0} gauge\nvllm:num_requests_{0}{{engine="0",model_name="' + MODEL + '"}} 0\n'
).format
_PAGES = {
    b"/v1/models": (b"application/json", _MODELS),
    b"/metrics": (b"text/plain; version=0.0.4", (_METRICS("running") + _METRICS("waiting")).encode()),
}
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _whole(kind: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (kind, len(body), body)


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _token() -> bytes:
    return _framed(_TOKEN % time.monotonic_ns())


class Replica(asyncio.Protocol):
    """One connection; requests on it come one after the other."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._body: list[bytes] = []
        self._next: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def on_message_begin(self) -> None:
        self._path = b""
        self._body.clear()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        if self._path != b"/v1/chat/completions":
            self._transport.write(_whole(*_PAGES.get(self._path, (b"application/json", b"{}"))))
            return
        body = b"".join(self._body)
        if not _STREAM.search(body):
            self._transport.write(_whole(b"application/json", _WHOLE))
            return
        chunks, gap_ms = _number(_CHUNKS, body, 64), _number(_GAP, body, 0)
        ending = self._ending(body, chunks)
        self._transport.write(_STREAM_HEAD + _framed(_OPENING))
        if gap_ms:
            self._spaced(chunks, gap_ms / 1000, self._loop.time(), ending)
        else:
            self._transport.write(b"".join([_token() for _ in range(chunks)]) + ending)

    def _spaced(self, left: int, gap_seconds: float, due: float, ending: bytes) -> None:
        """Send a chunk, and the next one a gap after this one was due."""
        if not left:
            self._transport.write(ending)
            return
        self._transport.write(_token())
        due += gap_seconds
        self._next = self._loop.call_at(due, self._spaced, left - 1, gap_seconds, due, ending)

    @staticmethod
    def _ending(body: bytes, chunks: int) -> bytes:
        usage = _framed(_USAGE % (chunks, chunks + 20)) if b'"include_usage"' in body else b""
        return b"%b%b%b0\r\n\r\n" % (_framed(_LAST), usage, _framed(_DONE))


def _number(pattern: "re.Pattern[bytes]", body: bytes, otherwise: int) -> int:
    found = pattern.search(body)
    return int(found[1]) if found else otherwise


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Replica, HOSTS, port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
