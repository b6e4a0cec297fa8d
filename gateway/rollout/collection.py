"""Evidence of one rollout in this process, in blocks of 10 s; and the documents that carry it to the driver.

Conversations belong to the arm and to the step that they were drawn in, whatever happens later: to one of step 2 an
error in step 4 is evidence at the weight of step 2.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from gateway.rollout.evidence import Moments, moments
from gateway.rollout.gates import ArmBlock, Block
from gateway.rollout.lottery import Arm, Draw

BLOCK_SECONDS = 10.0
# Of the stable variant's first tokens, from the blocks before: how many decide what is slow, and how many it takes.
MAX_FIRST_TOKENS, MIN_FIRST_TOKENS = 500, 40
SLOW_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request; a quantity that it does not have is missing in `values`."""

    events: frozenset[str] = frozenset()
    values: Mapping[str, float] = field(default_factory=dict)


class _Tally:
    """What happened to one arm's conversations of one step in a block."""

    __slots__ = ("conversations", "events", "values")

    def __init__(self) -> None:
        self.conversations = 0
        self.events: dict[str, int] = {}
        self.values: dict[str, list[float]] = {}

    def document(self) -> "_ArmDocument":
        summaries = {name: moments(values) for name, values in self.values.items()}
        values = {name: (each.count, each.mean, each.squares) for name, each in summaries.items()}
        return _ArmDocument(self.conversations, self.events, values)


class _ArmDocument(msgspec.Struct):
    conversations: int = 0
    events: dict[str, int] = {}
    values: dict[str, tuple[int, float, float]] = {}

    def block(self) -> ArmBlock:
        values = {name: Moments(*each) for name, each in self.values.items()}
        return ArmBlock(self.conversations, self.events, values)


class _StepDocument(msgspec.Struct):
    step: int
    canary: _ArmDocument = msgspec.field(default_factory=_ArmDocument)
    stable: _ArmDocument = msgspec.field(default_factory=_ArmDocument)


class _Document(msgspec.Struct):
    """A block: evidence by step, and (difference, agreement, agreement of the old variant) of each shadowed answer."""

    steps: list[_StepDocument] = []
    shadow: list[tuple[float, float, float]] = []


_DECODER = msgspec.json.Decoder(_Document)


class Collection:
    """Adds up what happens; `take_block` ends a block."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[int, Arm], _Tally] = {}
        self._first_tokens: list[float] = []  # of the stable variant, of blocks before
        self._new_first_tokens: list[float] = []
        self.slow_first_token: float | None = None  # the logarithm from which one is slow; None: not known yet
        self.totals: dict[Arm, int] = {"canary": 0, "stable": 0}
        self._shadow: list[tuple[float, float, float]] = []

    def drawn(self, draw: Draw) -> None:
        """Count a new conversation."""
        if draw.counts:
            self._tally(draw).conversations += 1
            self.totals[draw.arm] += 1

    def ended(self, draw: Draw, outcome: Outcome) -> None:
        """Count the events of a request, each once per conversation, and the values of a first answer."""
        if not draw.counts:
            return
        tally, events = self._tally(draw), outcome.events
        first = not draw.answered
        draw.answered = True
        seconds = outcome.values.get("first_token_seconds")
        if first and seconds is not None:
            if draw.arm == "stable":
                self._new_first_tokens.append(seconds)
            if self.slow_first_token is not None and seconds > self.slow_first_token:
                events |= {"slow_first_token"}
        for name in events - draw.events:
            tally.events[name] = tally.events.get(name, 0) + 1
        draw.events |= events
        if first:
            for name, value in outcome.values.items():
                tally.values.setdefault(name, []).append(value)

    def shadowed(self, difference: float, agreement: float, old_agreement: float) -> None:
        """Add a shadowed answer; see gateway.proxy.shadow."""
        self._shadow.append((difference, agreement, old_agreement))

    def take_block(self) -> bytes | None:
        """End a block and return its document; None if nothing happened."""
        self._first_tokens = [*self._first_tokens, *self._new_first_tokens][-MAX_FIRST_TOKENS:]
        self._new_first_tokens = []
        if len(self._first_tokens) >= MIN_FIRST_TOKENS:
            ordered = sorted(self._first_tokens)
            self.slow_first_token = ordered[min(int(SLOW_SHARE * len(ordered)), len(ordered) - 1)]
        if not self._tallies and not self._shadow:
            return None
        steps: dict[int, _StepDocument] = {}
        for (step, arm), tally in sorted(self._tallies.items()):
            setattr(steps.setdefault(step, _StepDocument(step)), arm, tally.document())
        document = _Document(list(steps.values()), self._shadow)
        self._tallies, self._shadow = {}, []
        return msgspec.json.encode(document)

    def _tally(self, draw: Draw) -> _Tally:
        key = draw.step, draw.arm
        return self._tallies.get(key) or self._tallies.setdefault(key, _Tally())


@dataclass(frozen=True, slots=True)
class BlockEvidence:
    """A block of time: evidence by the step that it was drawn in, and shadowed answers."""

    steps: tuple[tuple[int, Block], ...]
    shadow: tuple[tuple[float, float, float], ...]


def read_block(document: str | bytes, weights: tuple[float, ...]) -> BlockEvidence:
    """Read the document of a block; evidence counts at the weight that it was drawn with."""
    read = _DECODER.decode(document)
    steps = [(each.step, Block(weights[each.step], each.canary.block(), each.stable.block())) for each in read.steps]
    return BlockEvidence(tuple(steps), tuple(read.shadow))


def logarithm(value: float) -> float:
    """The logarithm of a length or a time, as the gates compare them."""
    return math.log(max(value, 1e-6))
