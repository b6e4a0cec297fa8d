"""What a replica's engine says of its own load."""

import msgspec


class Poll(msgspec.Struct, frozen=True):
    """One look at an engine's metrics; what is None wasn't there, which is never the same as zero.

    `at_seconds` is on the monotonic clock. The two counters only grow, until the engine starts anew.
    """

    at_seconds: float
    running: float | None = None
    waiting: float | None = None
    kv_usage: float | None = None
    kv_capacity_tokens: int | None = None
    read_tokens: float | None = None
    generated_tokens: float | None = None
