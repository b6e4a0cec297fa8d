"""Reasoning in the shape that an alias wants, however a stream is cut."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from gateway.openai.reasoning import ReasoningFormat, ReasoningRewriter, Shape, rewrite_reasoning
from serving.replica import ThinkTag

TOKEN = 7
PIECES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=5), max_size=5)
SOLID = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=5)


def event(**delta: Any) -> bytes:
    """A chunk as vLLM writes it."""
    ids = delta.pop("token_ids", None)
    finish = delta.pop("finish_reason", None)
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, "token_ids": ids}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: %b\n\n" % json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode()


def heard(shaping: ReasoningRewriter, events: Sequence[bytes]) -> tuple[str, str, str]:
    """All content, reasoning and mirrored reasoning that a client gets."""
    told = {"content": "", "reasoning": "", "reasoning_content": ""}
    for passed in filter(None, map(shaping.apply, events)):
        delta = json.loads(passed[6:])["choices"][0]["delta"]
        for key in told:
            told[key] += delta.get(key) or ""
    return told["content"], told["reasoning"], told["reasoning_content"]


def stream(thought: Sequence[str], answer: Sequence[str], think: ThinkTag) -> list[bytes]:
    """A model that thinks and answers: a role, pieces of a thought, pieces of an answer."""
    tag = [event(reasoning="", token_ids=[TOKEN])] if think == "model" else []
    pieces = [event(reasoning=piece, token_ids=[1]) for piece in thought]
    pieces += [event(content=piece, token_ids=[1]) for piece in answer]
    return [event(role="assistant", content=""), *tag, *pieces, event(finish_reason="stop")]


def manner(shape: Shape, think: ThinkTag) -> ReasoningFormat:
    """How a replica of this kind is asked."""
    hides = think == "model"
    return ReasoningFormat(shape, think, TOKEN if hides else None, hides)


@given(SOLID, PIECES, SOLID, PIECES, st.sampled_from(["injected", "model"]))
def test_cuts_make_no_difference(
    first: str, thought: list[str], begin: str, answer: list[str], think: ThinkTag
) -> None:
    """Every way to cut a thought and an answer into deltas gives the same text, and the tag stands there once."""
    pieces, words = [first, *thought], [begin, *answer]
    whole, said = "".join(pieces), "".join(words)
    events = stream(pieces, words, think)
    assert heard(ReasoningRewriter(manner("parsed", think)), events) == (said, whole, whole)
    assert heard(ReasoningRewriter(manner("restored", think)), events) == (f"<think>\n{whole}</think>{said}", "", "")
    tag = "<think>" if think == "model" else ""
    assert heard(ReasoningRewriter(manner("raw", think)), events) == (f"{tag}{whole}</think>{said}", "", "")


@given(PIECES)
def test_answers_without_reasoning_pass_as_they_are(answer: list[str]) -> None:
    """Where nobody thinks, not one byte changes, in any shape."""
    events = [event(role="assistant", content=""), *(event(content=piece) for piece in answer)]
    for shape in ("parsed", "restored", "raw"):
        shaping = ReasoningRewriter(ReasoningFormat(shape, "none"))
        assert [shaping.apply(each) for each in events] == events


@given(SOLID, PIECES, SOLID)
def test_whole_answers_say_the_same(first: str, thought: list[str], answer: str) -> None:
    """A whole answer has what all events of its stream have together."""
    reasoning = "".join([first, *thought])
    message = {"role": "assistant", "content": answer, "reasoning": reasoning}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    fields = msgspec.json.decode(json.dumps(body), type=dict[str, msgspec.Raw])
    for shape in ("parsed", "restored", "raw"):
        told = json.loads(msgspec.json.encode(rewrite_reasoning(fields, manner(shape, "injected"))))["choices"][0][
            "message"
        ]
        streamed = heard(ReasoningRewriter(manner(shape, "injected")), stream([first, *thought], [answer], "injected"))
        assert (told["content"], told["reasoning"] or "", told.get("reasoning_content") or "") == streamed
