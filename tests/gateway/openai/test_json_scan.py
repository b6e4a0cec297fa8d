"""Repeated keys and depth of JSON text, against a plain parser."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.openai.json_scan import Fields, duplicate_key, nests_deeper, split_array

DECODER = msgspec.json.Decoder(Fields)

spaces = st.sampled_from(["", "", " ", "\n\t", "  "])
# Few letters, so that keys come again; each may be spelled in two ways.
letters = st.sampled_from(["a", "b", "é", '\\"', "\\\\", "\\u0061", "\\u00e9", "n", ":", ",", "{", "}"])
keys = st.lists(letters, max_size=3).map("".join)
scalars = st.sampled_from(["1", "12", "1.5", "-1", "true", "null", '"a"', '"a\\"}"', '"[[["', '"\\\\"', '"]]"'])


def containers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Arrays, and objects with keys that may come again."""
    pairs = st.tuples(spaces, keys, spaces, spaces, inner, spaces)
    objects = st.lists(pairs, max_size=5).map(
        lambda given: "{" + ",".join(f'{a}"{key}"{b}:{c}{value}{d}' for a, key, b, c, value, d in given) + "}"
    )
    return objects | st.lists(inner, max_size=3).map(lambda given: "[" + ", ".join(given) + "]")


values = st.recursive(scalars, containers, max_leaves=8)
objects = st.tuples(spaces, containers(values).filter(lambda text: text.startswith("{")), spaces).map("".join)


def again(text: str) -> set[str]:
    """Keys of the outermost object that a plain parser sees more than once."""
    levels: list[list[str]] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        levels.append([key for key, _ in pairs])

    json.loads(text, object_pairs_hook=note)
    return {key for key in levels[-1] if levels[-1].count(key) > 1}


def depth(value: Any) -> int:
    """Levels of arrays and objects."""
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(objects)
@example('{"a":12,"a":1}')
@example('{"a":1,"b":1,"a":1}')
@example('{"a": 1, "a": 1, "b": 1}')
@example('{"":0,"":0}')
@example('{"a": 12, "b": 3}')
def test_repeated_keys(text: str) -> None:
    """A repeated key is found exactly where there is one, however it is written."""
    found = duplicate_key(text.encode(), DECODER.decode(text.encode()))
    expected = again(text)
    assert found in expected if expected else found is None


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=6), st.booleans(), st.booleans())
def test_what_clients_write(fields: dict[str, str], compact: bool, ascii_only: bool) -> None:
    """No key is taken for repeated in any client's usual style."""
    separators = (",", ":") if compact else None
    text = json.dumps(fields, separators=separators, ensure_ascii=ascii_only).encode()
    assert duplicate_key(text, DECODER.decode(text)) is None


@given(objects, st.integers(1, 6), st.integers(0, 3))
def test_depth(text: str, levels: int, copies: int) -> None:
    """Depth is that of the parsed value, in short bodies and in those long enough to be taken apart."""
    long = "x" * 70_000
    for body in (text, f'{{"x":[{{"y":{text},"z":"{long}"}}{"," + text if copies else ""}]}}'):
        fields = DECODER.decode(body.encode())
        if again(body):
            continue
        # A plain parser drops the first of two equal keys inside; the text has both.
        expected = depth(json.loads(body, object_pairs_hook=lambda pairs: dict(enumerate(v for _, v in pairs))))
        assert nests_deeper(body.encode(), fields, {}, levels) == (expected > levels)
        if "x" in fields and (parts := split_array(bytes(fields["x"]), 9) if body is not text else None):
            assert nests_deeper(body.encode(), fields, {"x": parts}, levels) == (expected > levels)


def test_a_deep_value_hidden_behind_a_repeated_key() -> None:
    """What a parser drops counts as well: another parser may keep it."""
    deep, long = "[" * 20 + "]" * 20, "x" * 70_000
    text = f'{{"messages":[{{"content":{deep},"content":"{long}"}}]}}'.encode()
    assert nests_deeper(text, DECODER.decode(text), {}, 20)


@pytest.mark.parametrize("text, most, count", [("[]", 1, 0), ("[null]", 1, 1), ("[1, 2]", 2, 2), ("[1,2]", 1, None)])
def test_parts(text: str, most: int, count: int | None) -> None:
    """An array comes apart if it isn't too long."""
    parts = split_array(text.encode(), most)
    assert (None if parts is None else len(parts)) == count
