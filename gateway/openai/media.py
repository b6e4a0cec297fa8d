"""Media URLs in messages: which hosts the engines may load images, audio and video from.

An engine that loads any URL can be made to read servers that only its own network reaches (SSRF).
"""

import re
from collections.abc import Collection, Iterator

import msgspec

from gateway.errors import INVALID_JSON, RequestError
from gateway.openai.fields import quoted
from gateway.openai.json_scan import Fields, split_array

MAX_PARTS = 4096

_HOLDERS = ("messages", "previous_input_messages", "input")
# A key that may hold a URL ends so, unless one of its letters is escaped, which no encoder does.
KEY_END = b'url"'
ESCAPE = b"\\u00"
_ESCAPED_LETTER = re.compile(rb"\\u00[567]")
_HTTP = re.compile(r"https?://([A-Za-z0-9.-]+)(?::\d{1,5})?(?:[/?#]|$)", re.IGNORECASE)
_NOTHING = msgspec.Raw(b"null")


class _Part(msgspec.Struct):
    """Keys of a message, of an item of the Responses API, or of a part of their content; others are skipped."""

    content: msgspec.Raw = _NOTHING
    output: msgspec.Raw = _NOTHING
    source: msgspec.Raw = _NOTHING  # Anthropic's {"type": "url", "url": ...}; as a text, no media
    image_url: msgspec.Raw = _NOTHING
    audio_url: msgspec.Raw = _NOTHING
    video_url: msgspec.Raw = _NOTHING
    file_url: msgspec.Raw = _NOTHING


class _Source(msgspec.Struct):
    url: msgspec.Raw = _NOTHING


_PART = msgspec.json.Decoder(_Part)
_SOURCE = msgspec.json.Decoder(_Source)
_STRING = msgspec.json.Decoder(str)


def check_media(body: bytes, fields: Fields, domains: Collection[str]) -> None:
    """Raise RequestError for a media URL, other than `data:`, whose host is not among the domains.

    There is none in a body that has neither KEY_END nor ESCAPE: that needs no call.
    """
    if KEY_END not in body and _ESCAPED_LETTER.search(body) is None:
        return
    for key in _HOLDERS:
        if key not in fields:
            continue
        try:
            for url in _urls(bytes(fields[key])):
                _check_url(url, key, domains)
        except INVALID_JSON as error:
            raise RequestError(f"{key!r}: {error}", param=key) from error


def _urls(text: bytes) -> Iterator[str]:
    """Yield the URLs in a list of messages or parts, or in one of them."""
    if text.startswith(b"["):
        parts = split_array(text, MAX_PARTS)
        if parts is None:
            raise RequestError(f"a list of messages or parts has more than {MAX_PARTS} entries")
        for entry in parts:
            yield from _urls(bytes(entry))
    elif text.startswith(b"{"):
        part = _PART.decode(text)
        yield from _urls(bytes(part.content))
        yield from _urls(bytes(part.output))
        yield from _source_url(bytes(part.source))
        for holder in (part.image_url, part.audio_url, part.video_url, part.file_url):
            yield from _string(bytes(holder))
            yield from _source_url(bytes(holder))


def _source_url(text: bytes) -> Iterator[str]:
    if text.startswith(b"{"):
        yield from _string(bytes(_SOURCE.decode(text).url))


def _string(text: bytes) -> Iterator[str]:
    if text.startswith(b'"'):
        yield _STRING.decode(text)


def _check_url(url: str, key: str, domains: Collection[str]) -> None:
    if url[:5].lower() == "data:":
        return
    match = _HTTP.match(url)
    if match is not None and match[1].lower() in domains:
        return
    allowed = f"the permitted domains are {', '.join(sorted(domains))}" if domains else "only data: URLs are permitted"
    raise RequestError(
        f"{key!r} has the media URL {quoted(url)}; {allowed} (gateway.media_domains)",
        param=key,
        code="media_url_not_allowed",
    )
