"""Settings: one YAML file, three flat tables (variants, replicas, aliases), the gateway and what serves beside it.

Every model is frozen and refuses keys that it doesn't know. `load.py` turns a file into `Settings` and every
problem into a line of the file; nobody else parses configuration.
"""

import re
from typing import Annotated, Literal
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

SIZE_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# Names that can be looked up; others fail in ways that depend on who looks.
HOST_NAME = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
LAST_PORT = 65535
SOCKET_PATH_BYTES = 107  # unix(7): 108 with the zero at the end
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}


def parse_size_bytes(value: object) -> object:
    """Read `32MiB`, `4GB` or a plain number as bytes; leaves other types to pydantic's own message."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B|)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is no size; write a number with {', '.join(filter(None, SIZE_UNITS))}")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def check_address(value: str) -> str:
    """Accept `host:port` only, so that the port never comes from a default nobody sees."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= LAST_PORT:
        raise ValueError(f"{value!r} is no address; write host:port, for example 127.0.0.1:8000")
    return value


def check_url(value: str) -> str:
    """Accept the root of a replica: scheme, host and port, without a path; or the path of a unix socket."""
    if re.fullmatch(r"unix:///[^\s?#]+", value):
        path = unquote_to_bytes(value.removeprefix("unix://"))
        if len(path) > SOCKET_PATH_BYTES or b"\0" in path:
            raise ValueError(f"{value!r} is no replica address; a socket's path has at most {SOCKET_PATH_BYTES} bytes")
        return value
    told = re.fullmatch(rf"https?://({HOST_NAME}|\[[0-9A-Fa-f:.]+\])(?::(\d{{1,5}}))?", value.rstrip("/"))
    if told is None or not 0 < int(told[2] or 80) <= LAST_PORT:
        raise ValueError(f"{value!r} is no replica address; write http://host:port, without /v1, or unix:///path")
    return value.rstrip("/")


SizeBytes = Annotated[int, BeforeValidator(parse_size_bytes), Field(ge=0)]
Address = Annotated[str, AfterValidator(check_address)]
ReplicaUrl = Annotated[str, AfterValidator(check_url)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$", max_length=128)]
FileName = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Entries = Annotated[int, Field(ge=1, le=65536)]


class Table(BaseModel):
    """A part of the file: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LimitSettings(Table):
    """What one request may ask for."""

    body_bytes: SizeBytes = 32 * 2**20
    depth: Annotated[int, Field(ge=8, le=512)] = 64
    messages: Entries = 2048
    prompts: Entries = 2048
    tools: Entries = 256
    stop: Entries = 16
    stop_bytes: SizeBytes = 4096
    n: Annotated[int, Field(ge=1)] = 8
    logprobs: Annotated[int, Field(ge=0)] = 20
    prompt_logprobs: Annotated[int, Field(ge=0)] = 5
    queue_seconds: Seconds = 30.0


class QueueSettings(Table):
    """How many requests may wait for a replica, and what their bodies may take."""

    per_alias: Annotated[int, Field(ge=0)] = 1000
    in_all: Annotated[int, Field(ge=0)] = 4000
    body_bytes: SizeBytes = 256 * 2**20


class RetrySettings(Table):
    """How many requests may be tried again on another replica: a share of all, and so many saved up."""

    share: Share = 0.2
    burst: Annotated[int, Field(ge=0)] = 10


class TracingSettings(Table):
    """Where spans go, in OTLP over HTTP, and which share of the traces that begin here."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s?#]+[^\s?#/]$")]
    sample_share: Share = 1.0


class GatewaySettings(Table):
    """The process that clients talk to."""

    listen: Address = "127.0.0.1:8000"
    admin: Address = "127.0.0.1:8001"
    admin_key: SecretStr | None = None
    state: Annotated[str, Field(pattern=r"^(sqlite|postgresql(\+\w+)?)://")] = "sqlite:///state.db"
    keys: str | None = None
    access_log: Literal["plain", "json", "off"] = "plain"
    tracing: TracingSettings | None = None
    limits: LimitSettings = LimitSettings()
    queue: QueueSettings = QueueSettings()
    retries: RetrySettings = RetrySettings()
    memory_bytes: SizeBytes = 512 * 2**20
    drain_seconds: Seconds = 30.0


class DeclaredQuality(Table):
    """Quality that somebody vouches for, of a variant whose manifest is out of reach; shown as declared."""

    kl_mean: Annotated[float, Field(ge=0)] | None = None
    top1_agreement: Share | None = None
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    kl_p99: Annotated[float, Field(ge=0)] | None = None
    length_ratio: Annotated[float, Field(gt=0)] | None = None


class VariantSettings(Table):
    """One model directory, or a name for what runs behind a replica's `url`."""

    path: str | None = None
    precision: Literal["bf16", "fp16", "fp32", "fp8", "int8", "int4"] | None = None
    quality: DeclaredQuality | None = None


class ReplicaSettings(Table):
    """Running servers of one variant: somebody else's (`url`), or `count` of ours."""

    variant: Name
    url: ReplicaUrl | None = None
    api_key: SecretStr | None = None
    ca: FileName | None = None
    certificate: FileName | None = None
    key_file: FileName | None = None
    count: Annotated[int, Field(ge=1)] = 1
    gpus: tuple[Annotated[int, Field(ge=0)], ...] = ()
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    max_num_seqs: Annotated[int, Field(ge=1)] | None = None
    max_queued: Annotated[int, Field(ge=1)] = 256
    max_in_flight: Annotated[int, Field(ge=1)] = 512
    kv_cache_bytes: SizeBytes | None = None
    prefix_caching: bool = True
    cores: Annotated[str, Field(pattern=r"^(nobind|auto|[\d,|-]+)$")] | None = None
    start_timeout_seconds: Seconds = 900.0
    drain_seconds: Seconds = 120.0
    hang_seconds: Seconds = 120.0
    args: tuple[str, ...] = ()


class Floor(Table):
    """The least quality that may answer; a measure that isn't named isn't limited."""

    top1_agreement: Share | None = None
    kl_mean: Annotated[float, Field(ge=0)] | None = None
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    kl_p99: Annotated[float, Field(ge=0)] | None = None
    length_ratio: Annotated[float, Field(gt=0)] | None = None


NO_FLOOR = Floor()


class Spill(Table):
    """When a lower rung answers because the higher one would keep the caller waiting, and when it stops."""

    after_seconds: Seconds = 2.0
    return_below_seconds: Seconds = 0.5
    dwell_seconds: Seconds = 10.0


class TimeoutSettings(Table):
    """How long an answer may keep us waiting; the first two are of streams, 0 is for ever."""

    connect_seconds: Annotated[float, Field(gt=0)] = 2.0
    first_byte_seconds: Seconds = 600.0
    idle_seconds: Seconds = 600.0
    total_seconds: Seconds = 3600.0
    heartbeat_seconds: Seconds = 15.0
    queue_seconds: Seconds | None = None


class AliasSettings(Table):
    """A model name that clients use, and the variants that may answer it, best first."""

    ladder: Annotated[tuple[Name, ...], Field(min_length=1)]
    floor: Floor = Floor()
    trust_declared: bool = False
    admit_failed: bool = False
    spill: Spill = Spill()
    think: Literal["auto", "prefix", "none"] = "auto"
    reasoning: Literal["parsed", "restored", "raw"] = "parsed"
    timeouts: TimeoutSettings = TimeoutSettings()


class LogSettings(Table):
    """What replicas print, a file for each; a full one is set aside, and the oldest of those thrown away."""

    format: Literal["plain", "json"] = "plain"
    rotate_bytes: SizeBytes = 64 * 2**20
    keep: Annotated[int, Field(ge=0, le=100)] = 3


class ServingSettings(Table):
    """How this machine's replicas are kept running."""

    parallel_starts: Annotated[int, Field(ge=1)] | None = None
    start_attempts: Annotated[int, Field(ge=1)] = 3
    logs: LogSettings = LogSettings()


class Settings(Table):
    """The whole file."""

    gateway: GatewaySettings = GatewaySettings()
    serving: ServingSettings = ServingSettings()
    variants: dict[Name, VariantSettings] = {}
    replicas: tuple[ReplicaSettings, ...] = ()
    aliases: dict[Name, AliasSettings] = {}
