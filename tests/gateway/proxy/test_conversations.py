"""The identity of a conversation, from its first turn on, for the lottery of a rollout."""

import json
from typing import Any

import pytest

from gateway.proxy.routing_features import MAX_DRAWN_BYTES, MAX_TURNS_BYTES, Conversation, conversation_of
from tests.gateway.openai.parsing import parse

USER, MODEL = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}


def conversation(*messages: dict[str, Any], headers: dict[bytes, bytes] | None = None, **fields: Any) -> Conversation:
    body = json.dumps({"model": "m", "messages": list(messages), **fields})
    return conversation_of(parse(body), headers or {}, "alice")


def test_a_conversation_is_its_opening() -> None:
    """Later turns have the identity of the first, and are known as later; another opening is another one."""
    first, second = conversation(USER), conversation(USER, MODEL, USER)
    assert (first.key, first.named, first.later) == (second.key, False, False)
    assert second.later
    assert conversation({"role": "user", "content": "other"}).key != first.key


@pytest.mark.parametrize("given", [{"headers": {b"x-session-id": b"s"}}, {"user": "u"}, {"prompt_cache_key": "k"}])
def test_a_name_is_an_identity(given: dict[str, Any]) -> None:
    """Whatever the turns are; another key's conversation of that name is another one."""
    first, second = conversation(USER, **given), conversation(USER, MODEL, USER, **given)
    assert first.key == second.key
    assert (first.named, first.later, second.later) == (True, False, True)


def test_long_conversations_keep_their_identity() -> None:
    """Where sessions are not parsed any more, the lottery still does; beyond its own limit they are later turns."""
    long = {"role": "user", "content": "x" * (MAX_TURNS_BYTES + 1)}
    assert conversation(USER, MODEL, long).key == conversation(USER).key
    endless = {"role": "user", "content": "x" * (MAX_DRAWN_BYTES + 1)}
    assert conversation(USER, MODEL, endless) == Conversation("", named=False, later=True)
