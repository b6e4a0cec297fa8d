"""A question as it is put on the command line, answered from a recorded state; pure."""

from collections.abc import Mapping
from math import inf

import msgspec

from gateway.errors import RequestError
from gateway.keys import Caller
from gateway.openai.constraints import parse_floor, parse_precisions
from gateway.proxy.routing_features import SESSION_HEADER, session_named
from gateway.routing.cluster_state import Query
from gateway.routing.explain import explain
from gateway.routing.explanation import Explanation
from gateway.routing.request import Ask
from gateway.routing.snapshot import Asked, State, floor_of


class Question(msgspec.Struct, frozen=True):
    """A request that somebody might make: by whom (`key` is a key's name), with which headers, and how long it is."""

    model: str
    headers: Mapping[bytes, bytes] = {}
    key: str | None = None
    prompt_tokens: float = 0.0
    max_tokens: int | None = None


def explained(state: State, question: Question) -> Explanation:
    """Say who would answer; GatewayError if it would be refused before anybody is chosen.

    Nothing is known of the words of its prompt, so that no replica has any of it cached.
    """
    caller = _caller(state, question.key)
    caller.check_model(question.model)
    target = state.target(question.model)
    name = question.headers.get(SESSION_HEADER)
    session = session_named(name, caller.name) if name else None
    answer_tokens = caller.max_tokens if question.max_tokens is None else question.max_tokens
    ask = Ask(question.prompt_tokens, answer_tokens, session=session)
    return explain(
        target,
        (caller.floor, parse_floor(question.headers)),
        parse_precisions({}, question.headers),
        Query(ask, stay=state.sessions.get(session) if session else None),
        state.scene(),
        state.now_seconds,
        absent=state.absent,
        patience_seconds=state.models[target.name].patience_seconds,
    )


def explained_request(state: State, asked: Asked) -> Explanation:
    """Say why a request went where it went."""
    floors = tuple(map(floor_of, asked.floors))
    target, scene = state.target(asked.model), state.scene()
    return explain(
        target,
        floors,
        asked.precisions,
        asked.query,
        scene,
        state.now_seconds,
        absent=state.absent,
        patience_seconds=inf if asked.patience_seconds is None else asked.patience_seconds,
    )


def _caller(state: State, key: str | None) -> Caller:
    if key is None:
        return Caller()
    told = state.callers.get(key)
    if told is None:
        raise RequestError(f"no key is named {key!r}; there are: {', '.join(sorted(state.callers)) or 'none'}")
    return Caller(key, told.models, floor_of(told.floor), told.max_tokens)
