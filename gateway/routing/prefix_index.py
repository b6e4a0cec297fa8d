"""An estimate of each replica's prefix cache: blocks of the prompts that it was sent, evicted in vLLM's order.

vLLM evicts the least recently used blocks, and the last blocks of a prompt first: what it holds of a prompt is always
its beginning. The same holds here. A block is a hash of the beginning of a prompt: two prompts share a block if they
agree up to its end.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

BLOCK_BYTES = 256
# The rest of a prompt decides no more: a replica that holds so much of it is the one to ask.
MAX_BLOCKS = 256
_MAX_BYTES = BLOCK_BYTES * MAX_BLOCKS

DEFAULT_BLOCKS = 4096  # of a replica of unknown capacity: 1 MiB of text
MAX_BLOCKS_IN_ALL = 2**19
# A beginning is common if more replicas hold it, as with many models.
COMMON_HOLDERS = 16

_NOWHERE: Mapping[str, int] = MappingProxyType({})


def block_hashes(parts: Sequence[bytes], salt: bytes = b"") -> tuple[int, ...]:
    """Hash each whole block of the parts' first 64 KiB together with all before it; other salts give other hashes.

    Python salts its hashes anew in every process: they mean nothing outside of it, and no client can aim at one.
    """
    text = bytes(parts[0]) if len(parts) == 1 and len(parts[0]) <= _MAX_BYTES else _beginning(parts)
    previous = hash(bytes(salt))
    blocks = []
    for start in range(0, len(text) - BLOCK_BYTES + 1, BLOCK_BYTES):
        previous = hash((previous, text[start : start + BLOCK_BYTES]))
        blocks.append(previous)
    return tuple(blocks)


def _beginning(parts: Sequence[bytes]) -> bytes:
    """As much of the parts as is hashed; no more of them is copied."""
    left_bytes = _MAX_BYTES
    pieces = []
    for part in parts:
        pieces.append(memoryview(part)[:left_bytes])
        left_bytes -= len(pieces[-1])
        if not left_bytes:
            break
    return b"".join(pieces)


def blocks_that_fit(kv_capacity_tokens: float, bytes_per_token: float) -> int:
    """How many blocks of text a replica's KV cache holds."""
    return int(kv_capacity_tokens * bytes_per_token / BLOCK_BYTES)


class _ReplicaBlocks:
    """The blocks of one replica, least recently used first; `capacity` is what its own cache holds.

    `limit` is the capacity, or less if all replicas together would exceed MAX_BLOCKS_IN_ALL.
    """

    __slots__ = ("blocks", "capacity", "limit")

    def __init__(self, capacity: int) -> None:
        self.capacity = self.limit = capacity
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def leading(self, blocks: Sequence[int], guess: int) -> int:
        """How many leading blocks it holds; fast if the guess is right."""
        held = self.blocks
        if (guess == 0 or blocks[guess - 1] in held) and (guess == len(blocks) or blocks[guess] not in held):
            return guess
        return bisect_left(blocks, True, key=lambda block: block not in held)


class PrefixIndex:
    """Blocks by replica, within each one's capacity; MAX_BLOCKS_IN_ALL is shared out evenly."""

    def __init__(self, default_blocks: int = DEFAULT_BLOCKS, max_in_all: int = MAX_BLOCKS_IN_ALL) -> None:
        self._default = default_blocks
        self._max_in_all = max_in_all
        self._replicas: dict[str, _ReplicaBlocks] = {}
        # Replicas by the first block of prompts that they hold: no other replica holds any of such a prompt.
        self._holders: dict[int, set[str]] = {}

    def __len__(self) -> int:
        """How many blocks are recorded."""
        return sum(len(replica.blocks) for replica in self._replicas.values())

    def is_common(self, first_block: int) -> bool:
        """Return whether so many replicas hold a prompt's beginning that only some should be looked at."""
        return len(self._holders.get(first_block, ())) > COMMON_HOLDERS

    def matched(self, blocks: Sequence[int], among: Sequence[AbstractSet[str]] = ()) -> Mapping[str, int]:
        """How many leading blocks of a prompt each replica holds, or those `among` do; those with none are left out."""
        holders: AbstractSet[str] | None = self._holders.get(blocks[0]) if blocks else None
        if holders is None:
            return _NOWHERE
        if among:
            holders = set().union(*[holders & some for some in among])
        depth = len(blocks)
        if depth == 1:
            return dict.fromkeys(holders, 1)
        # Many replicas often hold equally much, the system prompt for example: each is the guess for the next.
        matches = {}
        for replica_id in holders:
            matches[replica_id] = depth = self._replicas[replica_id].leading(blocks, depth)
        return matches

    def remember(self, replica_id: str, blocks: Sequence[int]) -> None:
        """Record that a replica reads a prompt: it holds all of its blocks, as the most recently used."""
        if not blocks:
            return
        replica = self._replicas.get(replica_id) or self._add(replica_id)
        held = replica.blocks
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        holders = self._holders.get(blocks[0])
        if holders is None:
            self._holders[blocks[0]] = {replica_id}
        else:
            holders.add(replica_id)
        if len(held) > replica.limit:
            self._evict(replica_id, replica)

    def resize(self, replica_id: str, blocks: int) -> None:
        """Set how many blocks a replica's cache holds."""
        replica = self._replicas.get(replica_id) or self._add(replica_id)
        replica.capacity = max(blocks, 0)
        self._share_out()

    def forget(self, replica_id: str) -> None:
        """Record that a replica's cache is empty, because it was started anew."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            self._evict(replica_id, replica, keep=0)

    def keep_only(self, replica_ids: Collection[str]) -> None:
        """Forget all other replicas, and their capacity."""
        for replica_id in self._replicas.keys() - set(replica_ids):
            self.forget(replica_id)
            del self._replicas[replica_id]
        self._share_out()

    def _add(self, replica_id: str) -> _ReplicaBlocks:
        replica = self._replicas[replica_id] = _ReplicaBlocks(self._default)
        self._share_out()
        return replica

    def _share_out(self) -> None:
        for replica_id, replica in self._replicas.items():
            replica.limit = min(replica.capacity, self._max_in_all // len(self._replicas))
            if len(replica.blocks) > replica.limit:
                self._evict(replica_id, replica)

    def _evict(self, replica_id: str, replica: _ReplicaBlocks, keep: int | None = None) -> None:
        keep = replica.limit if keep is None else keep
        while len(replica.blocks) > keep:
            block, _ = replica.blocks.popitem(last=False)
            holders = self._holders.get(block)
            if holders is not None:
                holders.discard(replica_id)
                if not holders:
                    del self._holders[block]
