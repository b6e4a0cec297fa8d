"""The index of prompts that replicas have probably cached, against a simple model."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.routing.prefix_index import BLOCK_BYTES, MAX_BLOCKS, PrefixIndex, block_hashes, blocks_that_fit

USUAL, IN_ALL = 6, 15


def blocks_of(text: str) -> tuple[int, ...]:
    """A chained block for each letter."""
    return tuple(hash(text[: end + 1]) for end in range(len(text)))


prompts = st.text("abc", max_size=9).map(blocks_of)
replicas = st.sampled_from(["r1", "r2", "r3", "r4"])


class PrefixIndexMachine(RuleBasedStateMachine):
    """The model is a list of blocks for each replica, the next to be evicted first."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixIndex(USUAL, IN_ALL)
        self.held: dict[str, list[int]] = {}
        self.most: dict[str, int] = {}

    def trim(self) -> None:
        """Evict what does not fit."""
        for replica, blocks in self.held.items():
            most = min(self.most[replica], IN_ALL // len(self.held))
            self.held[replica] = blocks[max(len(blocks) - most, 0) :]

    def add(self, replica: str) -> None:
        """Add a replica to the model."""
        self.held.setdefault(replica, [])
        self.most.setdefault(replica, USUAL)

    @rule(replica=replicas, prompt=prompts)
    def remember(self, replica: str, prompt: tuple[int, ...]) -> None:
        """The blocks of a prompt become the most recent, the first one most of all."""
        self.prefixes.remember(replica, prompt)
        if prompt:
            self.add(replica)
            self.held[replica] = [each for each in self.held[replica] if each not in prompt] + list(prompt[::-1])
            self.trim()

    @rule(replica=replicas, blocks=st.integers(-1, 12))
    def resize(self, replica: str, blocks: int) -> None:
        """The capacity changes; what no longer fits is evicted."""
        self.prefixes.resize(replica, blocks)
        self.add(replica)
        self.most[replica] = max(blocks, 0)
        self.trim()

    @rule(replica=replicas)
    def forget(self, replica: str) -> None:
        """The cache is empty, its capacity stays."""
        self.prefixes.forget(replica)
        if replica in self.held:
            self.held[replica] = []

    @rule(ready=st.sets(replicas))
    def keep_only(self, ready: set[str]) -> None:
        """All other replicas are forgotten."""
        self.prefixes.keep_only(ready)
        self.held = {replica: blocks for replica, blocks in self.held.items() if replica in ready}
        self.most = {replica: most for replica, most in self.most.items() if replica in ready}

    @rule(prompt=prompts)
    def matched(self, prompt: tuple[int, ...]) -> None:
        """The matches are those of the model, counted block by block."""
        assert dict(self.prefixes.matched(prompt)) == {
            replica: count for replica, blocks in self.held.items() if (count := leading(prompt, blocks))
        }

    @invariant()
    def bounded(self) -> None:
        """The limits hold, and blocks that are not held are not indexed."""
        assert len(self.prefixes) == sum(map(len, self.held.values())) <= IN_ALL
        held = {block for blocks in self.held.values() for block in blocks}
        assert set(self.prefixes._holders) <= held
        assert all(self.prefixes._holders.values())


TestPrefixIndex = PrefixIndexMachine.TestCase


def leading(prompt: tuple[int, ...], held: list[int]) -> int:
    """Count the leading blocks that are held."""
    return next((number for number, block in enumerate(prompt) if block not in held), len(prompt))


def matched(prefixes: PrefixIndex, text: str) -> Mapping[str, int]:
    """The number of blocks of a text that each replica holds."""
    return prefixes.matched(blocks_of(text))


def test_two_conversations_with_one_system_prompt() -> None:
    """Both replicas match the shared prefix, and each its own rest; another prompt matches none."""
    prefixes = PrefixIndex()
    prefixes.remember("r1", blocks_of("system one"))
    prefixes.remember("r2", blocks_of("system two"))
    assert matched(prefixes, "system two more") == {"r1": 7, "r2": 10}
    assert matched(prefixes, "other") == matched(prefixes, "") == {}


def test_eviction_order() -> None:
    """As in vLLM: least recently used blocks first, those of one prompt from its end."""
    prefixes = PrefixIndex(default_blocks=6)
    prefixes.remember("r1", blocks_of("abc"))
    prefixes.remember("r1", blocks_of("xyz"))
    prefixes.remember("r1", blocks_of("abc"))
    prefixes.remember("r1", blocks_of("d"))
    assert [dict(matched(prefixes, text)) for text in ("abc", "xyz", "d")] == [{"r1": 3}, {"r1": 2}, {"r1": 1}]


def test_a_prompt_longer_than_the_cache() -> None:
    """Its beginning is kept."""
    prefixes = PrefixIndex(default_blocks=3)
    prefixes.remember("r1", blocks_of("abcdef"))
    assert matched(prefixes, "abcdef") == {"r1": 3}


@pytest.mark.parametrize("tokens, ratio, blocks", [(0, 4.0, 0), (63, 4.0, 0), (64, 4.0, 1), (100_000, 3.2, 1250)])
def test_blocks_that_fit(tokens: int, ratio: float, blocks: int) -> None:
    """Tokens of the KV cache are converted to blocks of bytes, rounded down."""
    assert blocks_that_fit(tokens, ratio) == blocks


@given(st.binary(max_size=6 * BLOCK_BYTES), st.binary(max_size=2 * BLOCK_BYTES), st.binary(max_size=2 * BLOCK_BYTES))
def test_prompts_share_their_leading_blocks(common: bytes, one: bytes, other: bytes) -> None:
    """The equal hashes are those of the leading whole blocks, however the prompt is split into parts."""
    first, second = block_hashes([common, one]), block_hashes([common + other])
    a, b = common + one, common + other
    equal = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert len(first) == len(a) // BLOCK_BYTES
    assert leading(first, list(second)) == equal // BLOCK_BYTES


def test_hashes_are_chained_and_salted() -> None:
    """The same bytes after other blocks, or with another salt, have another hash."""
    block = b"x" * BLOCK_BYTES
    twice = block_hashes([block, block])
    assert twice[0] != twice[1]
    assert block_hashes([b"y" * BLOCK_BYTES, block])[1] != twice[1]
    assert block_hashes([block], b"salt") != block_hashes([block])


def test_only_the_beginning_is_hashed() -> None:
    """Bytes after the first 64 KiB change nothing, in one part or several."""
    begins = b"x" * (BLOCK_BYTES * MAX_BLOCKS)
    assert (
        block_hashes([begins])
        == block_hashes([begins + b"y" * 10_000])
        == block_hashes([begins[:-7], b"x" * 9000, b"z"])
    )
    assert len(block_hashes([begins])) == MAX_BLOCKS
