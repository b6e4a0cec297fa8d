"""What replicas have probably cached, against a naive model."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.routing.prefix_hash import BLOCK_BYTES, MAX_BLOCKS, block_hashes
from gateway.routing.prefix_index import PrefixIndex, blocks_that_fit

USUAL, IN_ALL = 6, 15


def blocks_of(text: str) -> tuple[int, ...]:
    """A block for each letter, chained."""
    return tuple(hash(text[: end + 1]) for end in range(len(text)))


prompts = st.text("abc", max_size=9).map(blocks_of)
replicas = st.sampled_from(["r1", "r2", "r3", "r4"])


class Caches(RuleBasedStateMachine):
    """Each replica's blocks in a list, the one to go next first."""

    def __init__(self) -> None:
        super().__init__()
        self.prefixes = PrefixIndex(USUAL, IN_ALL)
        self.held: dict[str, list[int]] = {}
        self.most: dict[str, int] = {}

    def trim(self) -> None:
        """Keep what fits."""
        for replica, blocks in self.held.items():
            most = min(self.most[replica], IN_ALL // len(self.held))
            self.held[replica] = blocks[max(len(blocks) - most, 0) :]

    def known(self, replica: str) -> None:
        """Make room for a replica's blocks."""
        self.held.setdefault(replica, [])
        self.most.setdefault(replica, USUAL)

    @rule(replica=replicas, prompt=prompts)
    def reads(self, replica: str, prompt: tuple[int, ...]) -> None:
        """A prompt's blocks are the youngest, its first one above all."""
        self.prefixes.remember(replica, prompt)
        if prompt:
            self.known(replica)
            self.held[replica] = [each for each in self.held[replica] if each not in prompt] + list(prompt[::-1])
            self.trim()

    @rule(replica=replicas, blocks=st.integers(-1, 12))
    def is_of_another_size(self, replica: str, blocks: int) -> None:
        """What no longer fits is gone."""
        self.prefixes.resize(replica, blocks)
        self.known(replica)
        self.most[replica] = max(blocks, 0)
        self.trim()

    @rule(replica=replicas)
    def starts_anew(self, replica: str) -> None:
        """Its cache is empty; its size is known."""
        self.prefixes.forget(replica)
        if replica in self.held:
            self.held[replica] = []

    @rule(kept=st.sets(replicas))
    def some_leave(self, kept: set[str]) -> None:
        """Nothing is known of the others."""
        self.prefixes.keep_only(kept)
        self.held = {replica: blocks for replica, blocks in self.held.items() if replica in kept}
        self.most = {replica: most for replica, most in self.most.items() if replica in kept}

    @rule(prompt=prompts)
    def is_asked(self, prompt: tuple[int, ...]) -> None:
        """Count block by block."""
        assert dict(self.prefixes.matched(prompt)) == {
            replica: count for replica, blocks in self.held.items() if (count := leading(prompt, blocks))
        }

    @invariant()
    def bounded(self) -> None:
        """No more than fits, and no index of what isn't held."""
        assert len(self.prefixes) == sum(map(len, self.held.values())) <= IN_ALL
        held = {block for blocks in self.held.values() for block in blocks}
        assert set(self.prefixes._beginners) <= held
        assert all(self.prefixes._beginners.values())


TestCaches = Caches.TestCase


def leading(prompt: tuple[int, ...], held: list[int]) -> int:
    """How many leading blocks are held."""
    return next((number for number, block in enumerate(prompt) if block not in held), len(prompt))


def matched(prefixes: PrefixIndex, text: str) -> Mapping[str, int]:
    """Who holds how much of a text."""
    return prefixes.matched(blocks_of(text))


def test_two_conversations_with_one_system_prompt() -> None:
    """Both replicas hold what they share, each its own rest; a stranger's prompt is nowhere."""
    prefixes = PrefixIndex()
    prefixes.remember("r1", blocks_of("system one"))
    prefixes.remember("r2", blocks_of("system two"))
    assert matched(prefixes, "system two more") == {"r1": 7, "r2": 10}
    assert matched(prefixes, "other") == matched(prefixes, "") == {}


def test_the_ends_of_old_prompts_go_first() -> None:
    """As in vLLM: least recently used, of one prompt from the end; what is used again is young again."""
    prefixes = PrefixIndex(usual_blocks=6)
    prefixes.remember("r1", blocks_of("abc"))
    prefixes.remember("r1", blocks_of("xyz"))
    prefixes.remember("r1", blocks_of("abc"))
    prefixes.remember("r1", blocks_of("d"))
    assert [dict(matched(prefixes, text)) for text in ("abc", "xyz", "d")] == [{"r1": 3}, {"r1": 2}, {"r1": 1}]


def test_a_prompt_longer_than_the_cache() -> None:
    """Its beginning is what stays."""
    prefixes = PrefixIndex(usual_blocks=3)
    prefixes.remember("r1", blocks_of("abcdef"))
    assert matched(prefixes, "abcdef") == {"r1": 3}


@pytest.mark.parametrize("tokens, ratio, blocks", [(0, 4.0, 0), (63, 4.0, 0), (64, 4.0, 1), (100_000, 3.2, 1250)])
def test_blocks_that_fit(tokens: int, ratio: float, blocks: int) -> None:
    """Tokens of the KV cache, in blocks of bytes."""
    assert blocks_that_fit(tokens, ratio) == blocks


@given(st.binary(max_size=6 * BLOCK_BYTES), st.binary(max_size=2 * BLOCK_BYTES), st.binary(max_size=2 * BLOCK_BYTES))
def test_prompts_share_the_blocks_that_they_begin_with(common: bytes, one: bytes, other: bytes) -> None:
    """As many blocks are the same as are whole and equal, wherever the parts are cut."""
    first, second = block_hashes([common, one]), block_hashes([common + other])
    a, b = common + one, common + other
    equal = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert len(first) == len(a) // BLOCK_BYTES
    assert leading(first, list(second)) == equal // BLOCK_BYTES


def test_a_block_counts_only_where_it_stands() -> None:
    """The same bytes after others, or under another salt, are another block."""
    block = b"x" * BLOCK_BYTES
    twice = block_hashes([block, block])
    assert twice[0] != twice[1]
    assert block_hashes([b"y" * BLOCK_BYTES, block])[1] != twice[1]
    assert block_hashes([block], b"salt") != block_hashes([block])


def test_no_more_than_the_beginning_is_hashed() -> None:
    """What lies behind 64 KiB changes nothing, in one part or many."""
    begins = b"x" * (BLOCK_BYTES * MAX_BLOCKS)
    assert (
        block_hashes([begins])
        == block_hashes([begins + b"y" * 10_000])
        == block_hashes([begins[:-7], b"x" * 9000, b"z"])
    )
    assert len(block_hashes([begins])) == MAX_BLOCKS
