"""Derive what routing needs from the raw body: estimated prompt length, prefix hashes, and the conversation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import takewhile
from typing import NamedTuple

import msgspec

from config.schema import NO_FLOOR
from config.variant import Variant
from gateway.errors import INVALID_JSON, RequestError
from gateway.openai.endpoints import MESSAGES, RESPONSES, Endpoint
from gateway.openai.fields import INTEGER
from gateway.openai.request import InferenceRequest
from gateway.proxy.affinity import Affinity
from gateway.proxy.context import RequestContext
from gateway.routing.prefix_index import block_hashes
from gateway.routing.request import NOTHING_CACHED, RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.spill import PAUSE_SECONDS

SESSION_HEADER = b"x-session-id"
# Names of a conversation, or of its user; `user` is what OpenAI's older clients send.
SESSION_KEYS = ("prompt_cache_key", "user", "safety_identifier")
_NAME_KEYS = frozenset({*SESSION_KEYS, "metadata"})
# Longer conversations are not parsed for a session: that would take as long as reading the request did.
MAX_TURNS_BYTES = 256 * 2**10
# While a rollout of the alias runs, longer ones are, too: they must not change sides. Beyond that they are stable.
MAX_DRAWN_BYTES = 8 * 2**20
# No model is expected to answer with more; a client may write any number.
MAX_ANSWER_TOKENS = 2**24

# Images and audio within a shorter text are not looked for: they rarely have more tokens than as much text.
MAX_TEXT_BYTES = 16 * 2**10
IMAGE_BYTES = 4096
# What stands before the data in a URL (RFC 2397), and in OpenAI's `input_audio` and Anthropic's `source`.
_DATA_MARKS = (b";base64,", b'"data":"', b'"data": "')

# Of a text more than twice as long, only both ends and the length are hashed.
_END_BYTES = 4096
_EMPTY = (b"null", b'""')
_MAX_EMPTY_BYTES = 4


# Returns why an external variant can't answer a request as asked.
Unsupported = Callable[[str, InferenceRequest], RequestError | None]


class _Turn(msgspec.Struct):
    """What tells the model's turns from others: a role, or in the Responses API the type of an item without one."""

    role: str | None = None
    type: str | None = None


class _Metadata(msgspec.Struct):
    user_id: str | None = None


_PARTS = msgspec.json.Decoder(list[msgspec.Raw])
_TURN = msgspec.json.Decoder(_Turn)
_METADATA = msgspec.json.Decoder(_Metadata | None)


def supports_all(_: str, __: InferenceRequest) -> RequestError | None:
    """None: an external variant can answer every request."""
    return None


def permitted_rungs(context: RequestContext, unsupported: Unsupported = supports_all) -> tuple[Variant, ...]:
    """The rungs that satisfy alias, key and request; FloorUnmet if there are none.

    External models are left out that do not answer the endpoint, or not as asked: `unsupported` says why, for an
    external variant. RequestError if no others are left.
    """
    route, inference = context.route, context.inference
    if route.rungs and inference.floor is NO_FLOOR and inference.precisions is None:
        rungs = route.rungs
    else:
        rungs = route.target.permitted_rungs((context.caller.floor, inference.floor), inference.precisions)
    if not rungs[-1].is_external:
        return rungs
    if not inference.endpoint.external:
        return tuple([rung for rung in rungs if not rung.is_external]) or rungs
    reasons = {rung.name: unsupported(rung.name, inference) for rung in rungs if rung.is_external}
    able = tuple([rung for rung in rungs if reasons.get(rung.name) is None])
    if not able and (reason := next(iter(reasons.values()))) is not None:
        raise reason
    return able


def routing_request(
    context: RequestContext,
    rungs: tuple[Variant, ...],
    turn: int,
    affinity: Affinity,
    with_blocks: bool,
    spilling_seconds: float | None = None,
) -> RoutingRequest:
    """Build the routing request of a context for its permitted rungs.

    `with_blocks`: hash the prompt, because more than one replica could answer. `spilling_seconds`: how long rungs of
    the alias have spilled, None if none did lately; then conversations are known from their first turn on. Only
    endpoints that generate have a session and are hashed. Nothing in the body is an error here: the engine judges it.
    """
    inference, caller, route = context.inference, context.caller, context.route
    endpoint, fields, model = inference.endpoint, inference.fields, route.target.name
    parts = prompt_parts(inference)
    prompt_bytes = text_bytes(parts)
    token_ids = count_token_ids(inference) if endpoint.batch else 0
    prompt_tokens = token_ids or prompt_bytes / affinity.bytes_per_token(model)
    blocks: tuple[int, ...] = ()
    session, placement, session_hash, later, cached_tokens = None, None, None, False, NOTHING_CACHED
    if endpoint.generates:
        session = session_of(inference, context.headers, caller.name)
        placement = None if session is None else affinity.placement(session)
        if spilling_seconds is not None and placement is None:
            session, placement = _from_opening(context, rungs, affinity, spilling_seconds, session)
        if with_blocks:
            blocks = block_hashes(parts, bytes(fields.get("cache_salt", b"")) + route.target.cache_salt)
            if blocks:
                cached_tokens = affinity.cached_tokens(model, rungs, blocks)
        if session is not None:
            later = (placement is None or not placement.replica_id) and is_later(inference, context.headers)
            session_hash = affinity.session_hash(session)
            if later and session_hash is not None:
                cached_tokens = affinity.with_homes(cached_tokens, session_hash, rungs, prompt_tokens)
    return RoutingRequest(
        route.target,
        rungs,
        turn,
        context.stats.request_id,
        caller.name or "",
        inference.stream,
        context.body_bytes,
        prompt_tokens,
        0 if token_ids else prompt_bytes,
        max_answer_tokens(inference),
        blocks,
        session,
        (caller.floor, inference.floor),
        inference.precisions,
        later,
        placement,
        session_hash,
        cached_tokens,
        tools=inference.uses_tools,
    )


# The prompt


def prompt_parts(inference: InferenceRequest) -> list[msgspec.Raw]:
    """The parts of the prompt, in the order in which chat templates write them."""
    fields = inference.fields
    return [fields[key] for key in inference.endpoint.prompt_keys if key in fields]


def text_bytes(parts: Sequence[msgspec.Raw]) -> int:
    """How many bytes of text the parts of a prompt count for: an image or audio counts as IMAGE_BYTES."""
    total = 0
    for part in parts:
        total += len(part)
        if len(part) > MAX_TEXT_BYTES:
            text = bytes(part)
            total -= sum([_excess_bytes(text, mark) for mark in _DATA_MARKS])
    return total


def count_token_ids(inference: InferenceRequest) -> int:
    """Count the token ids of all prompts; 0 if they are text."""
    key = inference.endpoint.batch
    raw = inference.fields.get(key) if key else None
    if raw is None:
        return 0
    start = bytes(memoryview(raw)[:64])
    if start.startswith(b"[") and start.lstrip(b"[ \t\r\n")[:1].isdigit():
        # One comma less than numbers, also between lists of them.
        return bytes(raw).count(b",") + 1
    return 0


def max_answer_tokens(inference: InferenceRequest) -> int | None:
    """The length that vLLM will stop at: the client's, else the one filled in, else vLLM's own; None: the context."""
    endpoint, fields = inference.endpoint, inference.fields
    for key in endpoint.length_keys:
        if (raw := fields.get(key)) is None:
            continue
        try:
            length = INTEGER.decode(raw)
        except INVALID_JSON:
            continue
        if length is not None and length > 0:
            return min(length, MAX_ANSWER_TOKENS)
    filled = inference.fill_max_tokens
    return endpoint.length_default_tokens if filled is None else filled


def _excess_bytes(text: bytes, mark: bytes) -> int:
    """How many bytes longer the data behind a mark is than what it counts for."""
    excess, end = 0, 0
    while (start := text.find(mark, end)) >= 0:
        start += len(mark)
        end = text.find(b'"', start)
        if end < 0:
            break
        excess += max(end - start - IMAGE_BYTES, 0)
    return excess


# The conversation


def _from_opening(
    context: RequestContext,
    rungs: tuple[Variant, ...],
    affinity: Affinity,
    spilling_seconds: float,
    session: str | None,
) -> tuple[str | None, Placement | None]:
    """The session of a request that was not answered before, and where its opening was.

    While rungs spill, a first turn without a name is recorded under its opening, and the second one looks there. An
    unknown conversation that goes on then has begun before they did, on the best rung.
    """
    opening = opening_of(context.inference, context.headers, context.caller.name)
    if opening is None:
        return session, None
    placement = affinity.placement(opening)
    if placement is None and session is not None and spilling_seconds < PAUSE_SECONDS:
        placement = Placement(rungs[0].name, replica_id="")
    return session or opening, placement


def session_of(inference: InferenceRequest, headers: Mapping[bytes, bytes], key_name: str | None) -> str | None:
    """Identify the conversation that a request is a turn of, by a one-way hash; None if it is the first turn.

    The API key's name is hashed, too, so no two keys share a session. A conversation that the client does not name is
    identified by its beginning up to the model's first turn, which later turns leave unchanged.
    """
    if name := _name(inference, headers):
        return session_from_name(name, key_name)
    turns = _first_turns(inference)
    return None if turns is None else _hashed(b"turns", key_name, turns)


def is_later(inference: InferenceRequest, headers: Mapping[bytes, bytes]) -> bool:
    """Tell whether an earlier turn of a conversation had the same session.

    The session of a conversation that the client does not name begins with its second turn, so the third is the first
    later one. The model's turns are counted without parsing them.
    """
    turns = _turns(inference, MAX_TURNS_BYTES)
    return turns is not None and turns.count(b'"assistant"') >= (1 if _name(inference, headers) else 2)


def opening_of(inference: InferenceRequest, headers: Mapping[bytes, bytes], key_name: str | None) -> str | None:
    """Identify an unnamed conversation by what comes before the model's first turn, as its first request has it.

    Conversations that open with the same words share it, so it is used only until the model's first turn is known.
    """
    if _name(inference, headers):
        return None
    opening = _turns_before_model(inference)
    return None if opening is None else _hashed(b"opening", key_name, opening)


def session_from_name(name: bytes, key_name: str | None) -> str:
    """The session of a conversation that the client named."""
    return _hashed(b"name", key_name, name)


def _name(inference: InferenceRequest, headers: Mapping[bytes, bytes]) -> bytes | None:
    return headers.get(SESSION_HEADER) or _name_in_body(inference)


def _name_in_body(inference: InferenceRequest) -> bytes | None:
    fields = inference.fields
    if not _NAME_KEYS.isdisjoint(fields):
        for key in SESSION_KEYS:
            raw = fields.get(key)
            if raw is not None and (len(raw) > _MAX_EMPTY_BYTES or bytes(raw) not in _EMPTY):
                return raw
        if inference.endpoint is MESSAGES and "metadata" in fields:
            return _user_id(fields["metadata"])
    return None


def _user_id(metadata: msgspec.Raw) -> bytes | None:
    try:
        decoded = _METADATA.decode(metadata)
    except INVALID_JSON:
        return None
    return decoded.user_id.encode() if decoded is not None and decoded.user_id else None


def _first_turns(inference: InferenceRequest, limit_bytes: int = MAX_TURNS_BYTES) -> bytes | None:
    """A conversation up to and with the model's first turn; None before there is one."""
    endpoint = inference.endpoint
    turns = _turns(inference, limit_bytes)
    # Spares the first turn of a conversation from being parsed; only the Responses API has items without a role.
    if turns is None or (b'"assistant"' not in turns and not (endpoint is RESPONSES and b'"type"' in turns)):
        return None
    try:
        parts = _PARTS.decode(turns)
        for number, part in enumerate(parts, start=1):
            if _is_from_model(_TURN.decode(part)):
                return _joined(inference, parts[:number])
    except INVALID_JSON:
        pass  # one string, or something that no replica will accept
    return None


def _turns_before_model(inference: InferenceRequest, limit_bytes: int = MAX_TURNS_BYTES) -> bytes | None:
    """A conversation up to the model's first turn, or all of it before there is one."""
    turns = _turns(inference, limit_bytes)
    if turns is None:
        return None
    try:
        parts = takewhile(lambda part: not _is_from_model(_TURN.decode(part)), _PARTS.decode(turns))
        return _joined(inference, parts)
    except INVALID_JSON:
        return None


def _turns(inference: InferenceRequest, limit_bytes: int) -> bytes | None:
    """The turns of a request; None if it has none, or they are too long to parse."""
    key = inference.endpoint.turns_key
    raw = inference.fields.get(key) if key else None
    return None if raw is None or len(raw) > limit_bytes else bytes(raw)


def _joined(inference: InferenceRequest, parts: Iterable[msgspec.Raw]) -> bytes:
    return b"\n".join([*_instructions(inference.endpoint, inference.fields), *map(_ends, parts)])


def _is_from_model(turn: _Turn) -> bool:
    if turn.role is not None:
        return turn.role == "assistant"
    # Reasoning and calls; the result of a call is the client's.
    return turn.type is not None and not turn.type.endswith("_output")


def _instructions(endpoint: Endpoint, fields: Mapping[str, msgspec.Raw]) -> Sequence[bytes]:
    """What comes before the turns, except tools: they are long, and may change during a conversation."""
    return [_ends(fields[key]) for key in endpoint.prompt_keys[1:-1] if key in fields]


def _ends(text: bytes) -> bytes:
    """What a text is hashed by: all of it, or its length and both ends."""
    if len(text) <= 2 * _END_BYTES:
        return text
    view = memoryview(text)
    return b"".join([b"%d " % len(text), view[:_END_BYTES], view[-_END_BYTES:]])


def _hashed(kind: bytes, key_name: str | None, text: bytes) -> str:
    name = (key_name or "").encode()
    return blake2b(b"%b %d %b %b" % (kind, len(name), name, _ends(text)), digest_size=16).hexdigest()


class Conversation(NamedTuple):
    """A conversation's identity, "" if it has none; whether its client named it; whether this turn is a later one."""

    key: str
    named: bool
    later: bool


def conversation_of(inference: InferenceRequest, headers: Mapping[bytes, bytes], key_name: str | None) -> Conversation:
    """Identify a conversation from its first turn on.

    A conversation that the client does not name is identified by its opening: those that open with the same words are
    one conversation to a lottery.
    """
    later = _first_turns(inference, MAX_DRAWN_BYTES) is not None or _is_too_long(inference)
    if name := _name(inference, headers):
        return Conversation(session_from_name(name, key_name), named=True, later=later)
    opening = _turns_before_model(inference, MAX_DRAWN_BYTES)
    return Conversation("" if opening is None else _hashed(b"opening", key_name, opening), named=False, later=later)


def _is_too_long(inference: InferenceRequest) -> bool:
    key = inference.endpoint.turns_key
    raw = inference.fields.get(key) if key else None
    return raw is not None and len(raw) > MAX_DRAWN_BYTES
