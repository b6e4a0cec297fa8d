"""Cutting a stream of bytes into events."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import UpstreamDisconnected, UpstreamError
from gateway.openai.endpoints import CHAT, MESSAGES, RESPONSES
from gateway.openai.sse import MAX_EVENT_BYTES, EventSplitter, error_event, event_data

lines = st.sampled_from(["data: {}", "data: café 汉字", "data:x", ": hello", "event: ping", "id: 7", "data: [DONE]"])
events = st.lists(st.lists(lines, min_size=1, max_size=3).map("\n".join), max_size=6)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """Cut bytes at some places."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


@given(events, st.lists(st.integers(0, 1000)), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "data: half"]))
def test_a_stream_cut_anywhere_gives_the_same_events(
    texts: list[str], cuts: list[int], end: str, unfinished: str
) -> None:
    """However a stream arrives, inside a character or a CRLF too, its whole events come out, and only they."""
    written = "".join(f"{text}\n\n" for text in texts) + unfinished
    cutter = EventSplitter()
    found = [event for piece in pieces(written.replace("\n", end).encode(), cuts) for event in cutter.feed(piece)]
    assert found == [f"{text}\n\n".encode() for text in texts]
    assert cutter.rest == unfinished.encode()


def test_an_event_comes_out_as_soon_as_it_is_whole() -> None:
    """Nothing waits for the event behind it."""
    cutter = EventSplitter()
    assert cutter.feed(b"data: 1\n") == []
    assert cutter.feed(b"\nda") == [b"data: 1\n\n"]
    assert cutter.feed(b"ta: 2\r\n\r") == []
    assert cutter.feed(b"\n") == [b"data: 2\n\n"]


def test_an_event_without_an_end_is_refused() -> None:
    """A replica can't fill the memory with one event."""
    cutter = EventSplitter()
    assert cutter.feed(b"x" * MAX_EVENT_BYTES) == []
    with pytest.raises(UpstreamDisconnected, match="an event of more than 16777216 bytes"):
        cutter.feed(b"x")


@pytest.mark.parametrize(
    "event, data",
    [
        (b'data: {"a":1}\n\n', b'{"a":1}'),
        (b'data:{"a":1}\n\n', b'{"a":1}'),
        (b"data: [DONE]\n\n", b"[DONE]"),
        (b": keep-alive\n\n", b""),
        (b"event: ping\n\n", b""),
        (b"\n\n", b""),
        (b"event: chunk\nid: 7\ndata: {}\n\n", b"{}"),
        (b": hello\ndata: {}\n\n", b"{}"),
        (b"\ndata: {}\n\n", b"{}"),
        (b"data: 1\ndata: 2\n\n", b"1\n2"),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes) -> None:
    """Data is found behind other fields too, and several lines are one payload."""
    assert event_data(event) == data


def test_an_error_event_is_one_event() -> None:
    """An error inside a stream is a single event, whatever its text holds."""
    for endpoint in (CHAT, RESPONSES, MESSAGES):
        event = error_event(endpoint, UpstreamError("a\n\nb é"))
        assert EventSplitter().feed(event) == [event]
        assert b"\\n\\nb" in event
        assert json.loads(event_data(event))["error"]["message"] == "a\n\nb é"
        assert event.startswith(b"data: " if endpoint is CHAT else b"event: error\ndata: ")


def test_an_event_in_many_small_pieces_costs_no_more_than_its_length() -> None:
    """What waits is looked through when an event may end, not with every piece."""
    cutter = EventSplitter()
    for _ in range(200_000):
        assert cutter.feed(b"data: 0123456789") == []
    assert len(cutter.feed(b"\n\n")[0]) == 200_000 * 16 + 2
