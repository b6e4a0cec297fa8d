"""When a replica that sends nothing any more gets no new requests, and when those that it has are taken from it.

============  =============================================================================  ============
state         event                                                                          next
============  =============================================================================  ============
responsive    `MIN_TIMEOUTS` polls in a row without an answer, and for `SILENT_SECONDS`      silent
              neither an answered poll nor a byte of any response
silent        the same for `HUNG_SECONDS`, or its health check fails                         hung
silent, hung  a poll is answered, or a byte of a response arrives                            responsive
============  =============================================================================  ============

A silent replica gets no new requests while another one may be asked. A hung one gets none, and its running requests
end: those that have sent nothing to their clients move to other replicas.

One slow poll means nothing, nor does a page of metrics that cannot be used: it has been answered. A replica that never
answered a poll, such as an engine without metrics, cannot become silent. Times are on the monotonic clock.
"""

from math import inf
from typing import Literal

import msgspec

MIN_TIMEOUTS = 3
SILENT_SECONDS = 3.0
HUNG_SECONDS = 10.0

Silence = Literal["responsive", "silent", "hung"]


class PollAnswers(msgspec.Struct, frozen=True, gc=False):
    """When a replica last answered a poll, -inf for never; and how many it has not answered since."""

    answered_at: float = -inf
    unanswered: int = 0


def silence(polls: PollAnswers, heard_at: float, now: float, *, healthy: bool = True) -> Silence:
    """Classify a replica of which the last byte of a response came at `heard_at`."""
    if polls.answered_at == -inf or polls.unanswered < MIN_TIMEOUTS:
        return "responsive"
    seconds = now - max(polls.answered_at, heard_at)
    if seconds < SILENT_SECONDS:
        return "responsive"
    return "hung" if seconds >= HUNG_SECONDS or not healthy else "silent"
