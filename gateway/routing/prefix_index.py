"""What each replica has probably cached: the blocks of prompts that it was sent, kept as long as vLLM would.

vLLM drops the blocks that were used least recently, and of one prompt the last ones first, so that what it holds of a
prompt is always its beginning. The same is true here, of blocks of `gateway.routing.prefix_hash`.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType

from gateway.routing.prefix_hash import BLOCK_BYTES

USUAL_BLOCKS = 4096  # of a replica that doesn't tell its capacity: 1 MiB of text
MOST_BLOCKS_IN_ALL = 2**19

_NOWHERE: Mapping[str, int] = MappingProxyType({})


def blocks_that_fit(kv_capacity_tokens: float, bytes_per_token: float) -> int:
    """How many blocks of text a replica's KV cache holds."""
    return int(kv_capacity_tokens * bytes_per_token / BLOCK_BYTES)


class _Held:
    """The blocks of one replica, the one to be dropped next first; `most` is what its own cache holds."""

    __slots__ = ("blocks", "most")

    def __init__(self, most: int) -> None:
        self.most = most
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def leading(self, blocks: Sequence[int], guess: int) -> int:
        """How many leading blocks it holds; a guess that is right makes it quick."""
        held = self.blocks
        if (guess == 0 or blocks[guess - 1] in held) and (guess == len(blocks) or blocks[guess] not in held):
            return guess
        return bisect_left(blocks, True, key=lambda block: block not in held)


class PrefixIndex:
    """Blocks by replica, within each one's capacity; what there may be in all is shared out evenly."""

    def __init__(self, usual_blocks: int = USUAL_BLOCKS, most_in_all: int = MOST_BLOCKS_IN_ALL) -> None:
        self._usual = usual_blocks
        self._most_in_all = most_in_all
        self._held: dict[str, _Held] = {}
        # Who holds a block that some prompt begins with: nobody else holds anything of such a prompt.
        self._beginners: dict[int, set[str]] = {}

    def __len__(self) -> int:
        """How many blocks are remembered."""
        return sum(len(held.blocks) for held in self._held.values())

    def knows(self, first_block: int) -> bool:
        """Return whether any replica holds a prompt that begins with this block."""
        return first_block in self._beginners

    def matched(self, blocks: Sequence[int], among: Sequence[AbstractSet[str]] = ()) -> Mapping[str, int]:
        """How many leading blocks of a prompt each replica holds, of all or of some; who holds none is left out."""
        if not blocks or (holders := self._beginners.get(blocks[0])) is None:
            return _NOWHERE
        if among:
            # Of a prompt that many models are asked, a thousand others may hold the beginning.
            holders = {replica_id for some in among for replica_id in some & holders}
        # Many replicas often hold equally much: the system prompt, say.
        depth = len(blocks)
        matches = {}
        for replica_id in holders:
            matches[replica_id] = depth = self._held[replica_id].leading(blocks, depth)
        return matches

    def remember(self, replica_id: str, blocks: Sequence[int]) -> None:
        """Note that a replica reads a prompt: it has all of its blocks now, and they are the youngest."""
        if not blocks:
            return
        held = self._of(replica_id)
        for block in reversed(blocks):
            held.blocks[block] = None
            held.blocks.move_to_end(block)
        self._beginners.setdefault(blocks[0], set()).add(replica_id)
        self._trim(replica_id, held)

    def resize(self, replica_id: str, blocks: int) -> None:
        """Learn how many blocks a replica's cache holds."""
        held = self._of(replica_id)
        held.most = max(blocks, 0)
        self._trim(replica_id, held)

    def forget(self, replica_id: str) -> None:
        """Note that a replica's cache is empty: it started anew."""
        held = self._held.get(replica_id)
        if held is not None:
            self._drop(replica_id, held, len(held.blocks))

    def keep_only(self, replica_ids: Collection[str]) -> None:
        """Forget all other replicas, and what was known of their capacity."""
        for replica_id in self._held.keys() - set(replica_ids):
            self.forget(replica_id)
            del self._held[replica_id]

    def _of(self, replica_id: str) -> _Held:
        held = self._held.get(replica_id)
        if held is None:
            held = self._held[replica_id] = _Held(self._usual)
            # There is one more to share with.
            for other_id, other in self._held.items():
                self._trim(other_id, other)
        return held

    def _trim(self, replica_id: str, held: _Held) -> None:
        most = min(held.most, self._most_in_all // len(self._held))
        self._drop(replica_id, held, len(held.blocks) - most)

    def _drop(self, replica_id: str, held: _Held, count: int) -> None:
        for _ in range(count):
            block, _none = held.blocks.popitem(last=False)
            holders = self._beginners.get(block)
            if holders is not None:
                holders.discard(replica_id)
                if not holders:
                    del self._beginners[block]
