"""Turns as text, and text as tokens: a token is four bytes, which is what makes both ways the same."""

import random
from collections.abc import Sequence
from functools import cache
from struct import Struct

from tests.benchmarks.routing.profiles import BLOCK_TOKENS
from tests.benchmarks.routing.workloads import Turn

TOKEN_BYTES = 4
_POOL_TOKENS = 1 << 18
_TOKEN = Struct("<I")
_BLOCK = Struct(f"{BLOCK_TOKENS * TOKEN_BYTES}s")

Message = dict[str, str]


@cache
def _pool() -> str:
    chance = random.Random(1)
    return "".join("".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=3)) + " " for _ in range(_POOL_TOKENS))


def words(name: str, tokens: int) -> str:
    """A text of so many tokens; other names, other texts."""
    begins = random.Random(name).randrange(_POOL_TOKENS // 2)
    return _pool()[begins * TOKEN_BYTES : (begins + tokens) * TOKEN_BYTES]


def messages_of(turn: Turn, before: Sequence[Message]) -> list[Message]:
    """The messages of a turn; `before` are those of the last one, with its answer."""
    if before:
        asked = turn.prompt_tokens - sum(len(message["content"]) for message in before) // TOKEN_BYTES
        return [*before, {"role": "user", "content": words(f"{turn.session}/{turn.number}", max(asked, 1))}]
    system = [{"role": "system", "content": words(f"system {turn.shared_tokens}", turn.shared_tokens)}]
    asked = turn.prompt_tokens - turn.shared_tokens
    return [
        *(system if turn.shared_tokens else []),
        {"role": "user", "content": words(f"{turn.session}/0", max(asked, 1))},
    ]


def prompt_of(messages: Sequence[Message]) -> str:
    """The prompt that messages make: a chat template that adds nothing."""
    return "".join(message["content"] for message in messages)


def ids_of(text: str) -> list[int]:
    """The tokens of a text in ASCII as numbers: its bytes."""
    return [token for (token,) in _TOKEN.iter_unpack(text.encode()[: len(text) // TOKEN_BYTES * TOKEN_BYTES])]


def chain_of(text: bytes) -> tuple[int, ...]:
    """Name the full blocks of a text by everything up to their ends; names mean nothing in another process."""
    named, chain = 0, []
    for block in _BLOCK.iter_unpack(memoryview(text)[: len(text) // _BLOCK.size * _BLOCK.size]):
        named = hash((named, block))
        chain.append(named)
    return tuple(chain)
