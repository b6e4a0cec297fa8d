"""The values of `GET /admin/status`; `quantgate top` and the page `/ui` decode them.

`version` grows when a field changes its meaning or leaves; new fields may appear in any version. Times (`_at`) are in
seconds since 1970, None is unknown, shares are from 0 to 1.
"""

from typing import Any, Literal

import msgspec

GateState = Literal["closed", "spilling"]
RungState = Literal["answers", "ready", "spilling", "no_replica", "rejected"]


class WorkerStatus(msgspec.Struct, frozen=True):
    """The process that this status is of; with several workers, each has its own admin port and its own status."""

    number: int
    of: int
    process_id: int


class GatewayStatus(msgspec.Struct, frozen=True):
    """The gateway itself.

    `state_database` and `kubernetes`, the API server, are why these cannot be read; None if they can, or there is none.
    """

    version: str
    started_at: float
    now_at: float
    draining: bool
    worker: WorkerStatus
    in_flight: int
    keys_required: bool
    state_database: str | None
    kubernetes: str | None = None


class SpillGateStatus(msgspec.Struct, frozen=True):
    """The spill gate of a rung; `share_down` of new conversations goes to the next lower rung."""

    state: GateState
    seconds: float | None
    share_down: float


class RungStatus(msgspec.Struct, frozen=True):
    """A variant of a ladder; `rejected` is why it may not answer, None if it may.

    `share` is that of the alias' requests of the last `recent_seconds` that it has answered, None without any.
    """

    variant: str
    precision: str
    state: RungState
    rejected: str | None
    replicas_ready: int
    replicas: int
    wait_seconds: float | None
    gate: SpillGateStatus
    requests: int
    share: float | None


class CanaryStatus(msgspec.Struct, frozen=True):
    """The new variant of a running rollout, and the share of new conversations that are drawn to it."""

    variant: str
    precision: str
    weight: float
    requests: int
    share: float | None


class AnswerStatus(msgspec.Struct, frozen=True):
    """Who would answer a new request without a prompt now; `reason` as in `x-quantgate-reason`."""

    replica: str
    variant: str
    precision: str
    reason: str
    wait_seconds: float | None


class AliasStatus(msgspec.Struct, frozen=True):
    """An alias with its ladder, best first."""

    name: str
    floor: dict[str, float]
    spill_after_seconds: float
    waiting: int
    answers_now: AnswerStatus | None
    rungs: tuple[RungStatus, ...]
    canary: CanaryStatus | None
    requests: int
    failed: int


class MeasureStatus(msgspec.Struct, frozen=True):
    """A measure of quality relative to the parent; `bound` is the worse end of its interval, which floors compare."""

    name: str
    value: float
    bound: float


class SpeedStatus(msgspec.Struct, frozen=True):
    """The measured speed of one replica: of one answer alone, of all at `slots` requests, and of reading prompts."""

    answer_tokens_per_second: float
    total_tokens_per_second: float
    prompt_tokens_per_second: float
    slots: int | None


class VariantStatus(msgspec.Struct, frozen=True):
    """A configured variant. `source` of its quality: measured, declared, parent or unknown; `verdict` with a manifest.

    `speed` is None without a measurement on this kind of machine.
    """

    name: str
    id: str
    precision: str
    scheme: str | None
    base: str | None
    bytes: int | None
    source: str
    verdict: str | None
    measures: tuple[MeasureStatus, ...]
    speed: SpeedStatus | None
    replicas_ready: int


class ReplicaView(msgspec.Struct, frozen=True):
    """A replica; `running`, `waiting` and `kv_usage` are those of its engine's last poll, from all senders."""

    id: str
    variant: str
    precision: str
    url: str
    source: str
    state: str
    state_seconds: float
    reason: str
    tools: bool | None
    context_tokens: int | None
    in_flight: int
    max_in_flight: int
    running: float | None
    waiting: float | None
    kv_usage: float | None
    wait_seconds: float | None
    load_known: bool
    breaker: str
    silence: str


class RateStatus(msgspec.Struct, frozen=True):
    """Rates of one precision: answered requests, and tokens of prompts and answers, booked when an answer ends."""

    requests_per_second: float
    prompt_tokens_per_second: float
    answer_tokens_per_second: float


class TrafficPoint(msgspec.Struct, frozen=True):
    """The rates of one interval, which ends at `at`; failed requests are those with 429, 5xx or a broken stream."""

    at: float
    seconds: float
    failed_per_second: float
    precisions: dict[str, RateStatus]


class TrafficStatus(msgspec.Struct, frozen=True):
    """Traffic of this process: the last hour by `interval_seconds`, oldest first, and the last `recent_seconds`."""

    interval_seconds: float
    recent_seconds: float
    recent: TrafficPoint | None
    points: tuple[TrafficPoint, ...]


class ErrorStatus(msgspec.Struct, frozen=True):
    """The latest of `count` errors with the same alias, code and replica since the start of this process."""

    at: float
    alias: str
    code: str
    replica: str
    request_id: str
    message: str
    count: int


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an operator sees of one gateway process.

    `rollouts` are those that run or have ended within the hour, as `quantgate rollout status --json` prints them.
    """

    version: Literal[1] = 1
    gateway: GatewayStatus
    aliases: tuple[AliasStatus, ...]
    variants: tuple[VariantStatus, ...]
    replicas: tuple[ReplicaView, ...]
    traffic: TrafficStatus
    rollouts: tuple[dict[str, Any], ...]
    errors: tuple[ErrorStatus, ...]

    def to_json(self) -> bytes:
        """Encode it."""
        return _ENCODER.encode(self)


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Status)


def read_status(text: bytes) -> Status:
    """Decode a status; msgspec.DecodeError if it is of another version."""
    return _DECODER.decode(text)
