"""The lottery: which arm of a rollout a conversation belongs to.

A conversation is drawn once, by hash(salt, conversation) < weight, when its first turn arrives, and stays with its arm
whatever the weight becomes:

=============  ==============================  =====================================================================
conversation   turn                            arm
=============  ==============================  =====================================================================
recorded       any                             the recorded one
not recorded   the first                       canary if its hash is below the weight now, else stable; recorded
not recorded   a later one                     stable: it began before the rollout, or its record is gone; recorded,
                                               and no evidence
=============  ==============================  =====================================================================

Every worker records what it draws, and shares through the state database, within a second, what others cannot work out
for themselves; they learn it from there, also after a restart. Between both, two workers draw alike, because hash and
weight are the same; they can differ about a conversation only whose turns reach two workers within that second, or
around a change of the weight. Without the database each worker goes on with what it knows.

Memory is bounded: beyond `limit` conversations the ones that were used least recently are forgotten, which makes their
later turns stable.
"""

from collections import OrderedDict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Literal

Arm = Literal["stable", "canary"]

HASH_BITS = 63
MAX_CONVERSATIONS = 100_000
# Of one write: a worker that draws more at once shares the rest with the next ones.
MAX_SHARED = 2000


class Draw:
    """A conversation's place in the lottery.

    `counts`: it was drawn while both arms had a chance, so what happens to it is evidence. `events` has those that were
    counted: each counts once per conversation. `answered`: its first answer has been counted.
    """

    __slots__ = ("answered", "arm", "conversation", "counts", "events", "step")

    def __init__(self, conversation: int, arm: Arm, step: int, *, counts: bool) -> None:
        self.conversation = conversation
        self.arm: Arm = arm
        self.step = step
        self.counts = counts
        self.events: frozenset[str] = frozenset()
        self.answered = False

    def __repr__(self) -> str:
        return f"<Draw {self.conversation:x} {self.arm} in step {self.step}{'' if self.counts else ', not counted'}>"


def conversation_hash(salt: str, key: str) -> int:
    """Hash a conversation to HASH_BITS bits; the salt makes every rollout draw anew."""
    digest = blake2b(f"{salt}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - HASH_BITS)


def is_below(conversation: int, weight: float) -> bool:
    """Whether a hash is within a share of all hashes."""
    return conversation < weight * float(2**HASH_BITS)


class Lottery:
    """The draws of one rollout in this process; `weight` and `step` are those of the recorded revision."""

    def __init__(self, salt: str, weight: float = 0.0, step: int = 0, limit: int = MAX_CONVERSATIONS) -> None:
        self.salt = salt
        self.weight = weight
        self.step = step
        self._limit = limit
        self._draws: OrderedDict[int, Draw] = OrderedDict()
        self._unshared: OrderedDict[int, Draw] = OrderedDict()

    def __len__(self) -> int:
        return len(self._draws)

    def draw(self, key: str, *, later: bool, named: bool = True, recurs: bool = True) -> tuple[Draw, bool]:
        """Return the draw of a conversation, and whether it is new; `later`: this is not its first turn.

        One that never `recurs` is not recorded. A stable draw is shared only if the conversation is `named` by its
        client: later turns of others show that they are later ones, and are stable without a record.
        """
        conversation = conversation_hash(self.salt, key)
        known = self._draws.get(conversation)
        if known is not None:
            self._draws.move_to_end(conversation)
            return known, False
        weight = self.weight
        arm: Arm = "canary" if not later and is_below(conversation, weight) else "stable"
        made = Draw(conversation, arm, self.step, counts=not later and 0 < weight < 1)
        if recurs:
            self._record(made)
        if recurs and (named or arm == "canary"):
            self._unshared[conversation] = made
            if len(self._unshared) > self._limit:
                self._unshared.popitem(last=False)
        return made, True

    def learn(self, draws: Iterable[tuple[int, Arm, int]]) -> None:
        """Record draws of other workers: conversation, arm and step; own ones stay. Their first answers are counted."""
        for conversation, arm, step in draws:
            if conversation not in self._draws:
                made = Draw(conversation, arm, step, counts=True)
                made.answered = True
                self._record(made)

    def take_unshared(self) -> list[Draw]:
        """Return draws that other workers do not know yet, at most MAX_SHARED."""
        count = min(len(self._unshared), MAX_SHARED)
        return [self._unshared.popitem(last=False)[1] for _ in range(count)]

    def put_back(self, draws: Iterable[Draw]) -> None:
        """Share these draws later: they could not be written."""
        for draw in draws:
            self._unshared[draw.conversation] = draw

    def _record(self, draw: Draw) -> None:
        self._draws[draw.conversation] = draw
        if len(self._draws) > self._limit:
            self._draws.popitem(last=False)
