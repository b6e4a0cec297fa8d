"""What routing needs to know of a request, read off its bytes: how long its prompt is, and whose turn of what it is."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from gateway.errors import NO_JSON
from gateway.openai.endpoints import MESSAGES
from gateway.openai.request import InferenceRequest
from gateway.routing.prefix_hash import block_hashes
from gateway.routing.request import Ask

SESSION_HEADER = b"x-session-id"
# Names of a conversation, or else of whoever leads it; `user` is what OpenAI's older clients send.
SESSION_KEYS = ("prompt_cache_key", "user", "safety_identifier")
# A conversation isn't looked for in more: taking so much apart takes as long as reading the request did.
LONGEST_TURNS_BYTES = 256 * 2**10
# A longer answer isn't expected of any model; what a client writes may be any number.
LONGEST_ANSWER_TOKENS = 2**24

# Pictures and sounds within a shorter text aren't looked for; nor have they more tokens than so much text, as a rule.
LONGEST_TEXT_BYTES = 16 * 2**10
PICTURE_BYTES = 4096
# Before the data in a URL (RFC 2397), and in OpenAI's `input_audio` and Anthropic's `source`, which have no URL.
_DATA_BEGINS = (b";base64,", b'"data":"', b'"data": "')

# Of a text twice as long, only the two ends and the length are hashed.
_END_BYTES = 4096
_EMPTY = (b"null", b'""')
_LONGEST_EMPTY_BYTES = 4


class _Turn(msgspec.Struct):
    """What tells the model's turns from others: a role, or in the Responses API the kind of an item without one."""

    role: str | None = None
    type: str | None = None


class _Metadata(msgspec.Struct):
    user_id: str | None = None


_INTEGER: "msgspec.json.Decoder[int | None]" = msgspec.json.Decoder(int | None)
_PARTS = msgspec.json.Decoder(list[msgspec.Raw])
_TURN = msgspec.json.Decoder(_Turn)
_METADATA = msgspec.json.Decoder(_Metadata | None)


class Prompt(NamedTuple):
    """What a model is to read: its parts in the order in which chat templates write them, and how long they are.

    A picture or a sound counts as a page of text, however many bytes it has. `token_ids` is 0 if it comes as text.
    """

    parts: list[msgspec.Raw]
    bytes: int
    token_ids: int

    @property
    def text_bytes(self) -> int:
        """How long it is as text; 0 for one that comes as token ids, which says nothing about text."""
        return 0 if self.token_ids else self.bytes


def prompt_of(inference: InferenceRequest) -> Prompt:
    """Find the prompt in a body."""
    fields = inference.fields
    parts = [fields[key] for key in inference.endpoint.prompt_keys if key in fields]
    return Prompt(parts, sum([_length(part) for part in parts]), _token_ids(inference))


def asked(
    inference: InferenceRequest,
    prompt: Prompt,
    headers: Mapping[bytes, bytes],
    key_name: str | None,
    bytes_per_token: float,
    *,
    with_blocks: bool = True,
) -> Ask:
    """Sum a request up; nothing in it is an error here, the replica judges that.

    Only what generates has blocks and a session: the others neither stay nor spill.
    """
    generates = inference.endpoint.generates
    return Ask(
        prompt_tokens=prompt.token_ids or prompt.bytes / bytes_per_token,
        answer_tokens=_answer_tokens(inference),
        blocks=_blocks(inference, prompt) if with_blocks and generates else (),
        session=session_of(inference, headers, key_name) if generates else None,
    )


def session_of(inference: InferenceRequest, headers: Mapping[bytes, bytes], key_name: str | None) -> str | None:
    """Name the conversation that a request is a turn of, None if it isn't any, by a hash that tells nothing of it.

    No two API keys share one: the key's name is hashed, too. Where the client doesn't name it, it is known by all up to
    the model's first turn, which later turns leave as it is.
    """
    if named := headers.get(SESSION_HEADER) or _named(inference):
        return session_named(named, key_name)
    turns = _first_turns(inference)
    return None if turns is None else _hashed(b"turns", key_name, turns)


def session_named(name: bytes, key_name: str | None) -> str:
    """Name the conversation that a client gave a name to."""
    return _hashed(b"name", key_name, name)


def _length(part: msgspec.Raw) -> int:
    """How many bytes of text a part of a prompt is worth."""
    count = len(part)
    if count <= LONGEST_TEXT_BYTES:
        return count
    text = bytes(part)
    return count - sum([_data_bytes(text, begins) for begins in _DATA_BEGINS])


def _data_bytes(text: bytes, begins: bytes) -> int:
    """By how much data behind such words are longer than what they count as."""
    too_many, end = 0, 0
    while (start := text.find(begins, end)) >= 0:
        start += len(begins)
        end = text.find(b'"', start)
        if end < 0:
            break
        too_many += max(end - start - PICTURE_BYTES, 0)
    return too_many


def _token_ids(inference: InferenceRequest) -> int:
    """Count the token ids of all prompts; 0 if they are text."""
    key = inference.endpoint.batch
    raw = inference.fields.get(key) if key else None
    if raw is None:
        return 0
    begins = bytes(memoryview(raw)[:64])
    if begins.startswith(b"[") and begins.lstrip(b"[ \t\r\n")[:1].isdigit():
        # As many commas as there are numbers but one, also between lists of them.
        return bytes(raw).count(b",") + 1
    return 0


def _blocks(inference: InferenceRequest, prompt: Prompt) -> tuple[int, ...]:
    salt = inference.fields.get("cache_salt")
    # vLLM shares no block between prompts of different salts.
    return block_hashes(prompt.parts, b"" if salt is None else bytes(salt))


def _answer_tokens(inference: InferenceRequest) -> int | None:
    """The length that vLLM will go by: the client's, or else the one filled in, or else vLLM's own."""
    endpoint, fields = inference.endpoint, inference.fields
    for key in endpoint.length_keys:
        if (raw := fields.get(key)) is None:
            continue
        try:
            length = _INTEGER.decode(raw)
        except NO_JSON:
            continue
        if length is not None and length > 0:
            return min(length, LONGEST_ANSWER_TOKENS)
    filled = inference.fill_max_tokens
    return endpoint.length_default_tokens if filled is None else filled


def _named(inference: InferenceRequest) -> bytes | None:
    """The name that a body gives its conversation, or whoever leads it."""
    fields = inference.fields
    for key in SESSION_KEYS:
        raw = fields.get(key)
        if raw is not None and (len(raw) > _LONGEST_EMPTY_BYTES or bytes(raw) not in _EMPTY):
            return raw
    if inference.endpoint is MESSAGES and "metadata" in fields:
        return _user_id(fields["metadata"])
    return None


def _user_id(metadata: msgspec.Raw) -> bytes | None:
    try:
        read = _METADATA.decode(metadata)
    except NO_JSON:
        return None
    return read.user_id.encode() if read is not None and read.user_id else None


def _first_turns(inference: InferenceRequest) -> bytes | None:
    """A conversation up to the model's first turn, that included; None before there is one."""
    endpoint, fields = inference.endpoint, inference.fields
    turns = fields.get(endpoint.turns_key) if endpoint.turns_key else None
    if turns is None or len(turns) > LONGEST_TURNS_BYTES or not _may_have_answers(bytes(turns)):
        return None
    try:
        parts = _PARTS.decode(turns)
        for number, part in enumerate(parts, start=1):
            if _is_the_models(_TURN.decode(part)):
                return b"\n".join([*_instructions(inference), *map(_ends, parts[:number])])
    except NO_JSON:
        return None  # one string, or what no replica will take
    return None


def _may_have_answers(turns: bytes) -> bool:
    """Tell whether one of them may be the model's; it spares conversations that begin from being taken apart."""
    return b"assistant" in turns or b'"type"' in turns


def _is_the_models(turn: _Turn) -> bool:
    if turn.role is not None:
        return turn.role == "assistant"
    # Thoughts and calls; a call's result is told by the client.
    return turn.type is not None and not turn.type.endswith("_output")


def _instructions(inference: InferenceRequest) -> list[bytes]:
    """What comes before the turns, but for tools: they are long, and may change on the way."""
    endpoint, fields = inference.endpoint, inference.fields
    return [_ends(fields[key]) for key in endpoint.prompt_keys[1:-1] if key in fields]


def _ends(text: bytes) -> bytes:
    """What a text is known by: all of it, or its ends and its length."""
    if len(text) <= 2 * _END_BYTES:
        return text
    view = memoryview(text)
    return b"".join([b"%d " % len(text), view[:_END_BYTES], view[-_END_BYTES:]])


def _hashed(kind: bytes, key_name: str | None, text: bytes) -> str:
    name = (key_name or "").encode()
    return blake2b(b"%b %d %b %b" % (kind, len(name), name, _ends(text)), digest_size=16).hexdigest()
