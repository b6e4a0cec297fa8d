"""Rendezvous hashing: the home of a conversation among the ready replicas of a rung.

Every gateway finds the same home without asking another one, as long as they agree about which replicas are ready. When
a replica comes or goes, only the conversations move whose home it becomes or was: one in n of n replicas (Thaler and
Ravishankar, "A Name-Based Mapping Scheme for Rendezvous", 1996).
"""

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b

import msgspec

# Of a later turn's prompt, how much its home has cached where this gateway does not know: less than what a conversation
# repeats, because its turns may have been answered elsewhere.
CACHED_SHARE = 0.5

# 60 bits are two digits of CPython's integers. The multiplier is odd, its bits are well mixed.
HASH_BITS = 60
_MULTIPLIER = 0x1342543DE82EF95
_MASK: int = 2**HASH_BITS - 1


# Where other gateways take turns of the same conversations, this share of later turns is of ones not seen here before.
SHARED_FROM = 0.05
_UNSEEN_WEIGHT = 0.02


class RendezvousTable(msgspec.Struct, frozen=True, gc=False):
    """Replicas by id, with the hash of each, in the same order."""

    ids: tuple[str, ...]
    hashes: tuple[int, ...]

    @classmethod
    def of(cls, replica_ids: Iterable[str]) -> "RendezvousTable":
        """Hash replicas by their ids."""
        ids = tuple(replica_ids)
        return cls(ids, tuple([hash_of(each) for each in ids]))

    def home(self, session_hash: int) -> str | None:
        """Return the replica with the highest weight for a session; None if there is no replica."""
        return self.ids[highest_weight(session_hash, self.hashes)] if self.ids else None


EMPTY_TABLE = RendezvousTable((), ())


def highest_weight(session_hash: int, hashes: Sequence[int]) -> int:
    """Return the place of the replica, by its hash, with the highest weight for a session."""
    weights = [(session_hash ^ each) * _MULTIPLIER & _MASK for each in hashes]
    return weights.index(max(weights))


def with_homes(cached_tokens: Mapping[str, float], homes: Sequence[str], prompt_tokens: float) -> Mapping[str, float]:
    """Add what homes have probably cached of a later turn: turns before it, which another gateway has sent there."""
    expected = CACHED_SHARE * prompt_tokens
    unknown = [each for each in homes if cached_tokens.get(each, 0.0) < expected]
    return {**cached_tokens, **dict.fromkeys(unknown, expected)} if unknown else cached_tokens


def unseen_share(share: float, *, unseen: bool) -> float:
    """Update the share of later turns whose conversations this gateway had not seen: an exponential mean."""
    return share + _UNSEEN_WEIGHT * (float(unseen) - share)


def hash_of(text: str) -> int:
    """Hash a session or the id of a replica to HASH_BITS bits, the same in every process."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & _MASK
