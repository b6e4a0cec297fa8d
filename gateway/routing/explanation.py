"""What is told of one decision: who answers, what each replica would have cost, and why the others don't."""

import msgspec

from gateway.routing.snapshot import Absent


class Terms(msgspec.Struct, frozen=True):
    """What the request would cost on one replica, in seconds; `cached` comes off the rest."""

    queue: float
    ahead: float
    kv: float
    reading: float
    cached: float
    answering: float
    total: float


class Candidate(msgspec.Struct, frozen=True):
    """One replica that is ready, and why it isn't chosen; nothing if it is.

    `rank` None: it wouldn't be asked at all. `terms` None: nobody knows how fast it is. `stale`: nothing recent is
    known of its load, which is thought to be that of the others.
    """

    replica: str
    variant: str
    rank: int | None
    requests: float
    terms: Terms | None
    stale: bool
    why_not: str = ""


class RungView(msgspec.Struct, frozen=True):
    """One rung that may answer: how long its best replica keeps this request waiting, and what its gate does.

    None: nobody knows how long; or it doesn't spill, else it has been spilling for so long, now this share of requests.
    """

    variant: str
    precision: str
    verdict: str
    wait_seconds: float | None
    spilling_seconds: float | None
    share_down: float


class Refused(msgspec.Struct, frozen=True):
    """A variant of the ladder that may not answer."""

    variant: str
    precision: str
    why: str


class Chosen(msgspec.Struct, frozen=True):
    """Who answers, and why."""

    replica: str
    variant: str
    precision: str
    reason: str


class Explanation(msgspec.Struct, frozen=True):
    """One decision; `chosen` is None if nobody can be asked now, and `because` says why it is so."""

    model: str
    chosen: Chosen | None
    because: str
    prompt_tokens: float
    answer_tokens: int | None
    spill_after_seconds: float
    rungs: tuple[RungView, ...]
    candidates: tuple[Candidate, ...]
    refused: tuple[Refused, ...]
    absent: tuple[Absent, ...]
