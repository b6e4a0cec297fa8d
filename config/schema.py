"""Schema of the configuration file: the tables variants, replicas and aliases, and settings of gateway and serving.

Every model is frozen and rejects unknown keys. `load.py` converts a file to `Settings`. `config/example.yaml` describes
each option.
"""

import re
from typing import Annotated, Literal
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

SIZE_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# RFC 1123 host names and underscores. Resolvers differ in how they handle others, so they are rejected here.
HOST_NAME = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
LAST_PORT = 65535
SOCKET_PATH_BYTES = 107  # unix(7): 108 with the terminating null byte
LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}


def parse_size_bytes(value: object) -> object:
    """Parse `32MiB`, `4GB` or a number as bytes; ValueError for other text. Other types are left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|B|)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a valid size; write a number with {', '.join(filter(None, SIZE_UNITS))}")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def check_address(value: str) -> str:
    """Require `host:port`: a port is never implied. ValueError otherwise."""
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 <= int(port) <= LAST_PORT:
        raise ValueError(f"{value!r} is not a valid address; write host:port, for example 127.0.0.1:8000")
    return value


def check_url(value: str) -> str:
    """Require `http(s)://host[:port]` without a path, or `unix:///path`; ValueError otherwise."""
    if re.fullmatch(r"unix:///[^\s?#]+", value):
        path = unquote_to_bytes(value.removeprefix("unix://"))
        if len(path) > SOCKET_PATH_BYTES or b"\0" in path:
            raise ValueError(
                f"{value!r} is not a valid replica URL; the path of a socket has at most {SOCKET_PATH_BYTES} bytes"
            )
        return value
    match = re.fullmatch(rf"https?://({HOST_NAME}|\[[0-9A-Fa-f:.]+\])(?::(\d{{1,5}}))?", value.rstrip("/"))
    if match is None or not 0 < int(match[2] or 80) <= LAST_PORT:
        raise ValueError(f"{value!r} is not a valid replica URL; write http://host:port, without /v1, or unix:///path")
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
    """Base of all tables: frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LimitSettings(Table):
    """Limits on a single request."""

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
    """Limits on the requests that wait for a replica: their number, and the size of their bodies."""

    per_alias: Annotated[int, Field(ge=0)] = 1000
    in_all: Annotated[int, Field(ge=0)] = 4000
    body_bytes: SizeBytes = 256 * 2**20


class RetrySettings(Table):
    """Retry budget: retries on another replica as a fraction of all requests, plus a burst."""

    share: Share = 0.2
    burst: Annotated[int, Field(ge=0)] = 10


class TracingSettings(Table):
    """OTLP/HTTP endpoint for spans, and the sampling ratio of traces that start in the gateway."""

    endpoint: Annotated[str, Field(pattern=r"^https?://[^\s?#]+[^\s?#/]$")]
    sample_share: Share = 1.0


class GatewaySettings(Table):
    """Settings of the gateway process."""

    listen: Address = "127.0.0.1:8000"
    admin: Address = "127.0.0.1:8001"
    admin_key: SecretStr | None = None
    state: Annotated[str, Field(pattern=r"^(sqlite|postgresql(\+\w+)?)://")] = "sqlite:///state.db"
    keys: str | None = None
    access_log: Literal["plain", "json", "off"] = "plain"
    tracing: TracingSettings | None = None
    per_key_metrics: bool = False
    limits: LimitSettings = LimitSettings()
    queue: QueueSettings = QueueSettings()
    retries: RetrySettings = RetrySettings()
    memory_bytes: SizeBytes = 512 * 2**20
    drain_seconds: Seconds = 30.0


class DeclaredQuality(Table):
    """Quality of a variant without a local manifest, as declared by the operator."""

    kl_mean: Annotated[float, Field(ge=0)] | None = None
    top1_agreement: Share | None = None
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    kl_p99: Annotated[float, Field(ge=0)] | None = None
    length_ratio: Annotated[float, Field(gt=0)] | None = None


class VariantSettings(Table):
    """A model directory, or the declared properties of a variant whose replicas have a `url`."""

    path: str | None = None
    precision: Literal["bf16", "fp16", "fp32", "fp8", "int8", "int4"] | None = None
    quality: DeclaredQuality | None = None


class ReplicaSettings(Table):
    """Servers of one variant: an external one (`url`), or `count` servers that quantgate starts."""

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
    """Minimum quality of a variant that may answer; an omitted measure is not limited."""

    top1_agreement: Share | None = None
    kl_mean: Annotated[float, Field(ge=0)] | None = None
    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    kl_p99: Annotated[float, Field(ge=0)] | None = None
    length_ratio: Annotated[float, Field(gt=0)] | None = None


NO_FLOOR = Floor()


class Spill(Table):
    """When a rung starts to spill requests to the next lower rung, and when it stops."""

    after_seconds: Seconds = 2.0
    return_below_seconds: Seconds = 0.5
    dwell_seconds: Seconds = 10.0


class TimeoutSettings(Table):
    """Timeouts of a request to a replica.

    `first_byte_seconds`, `idle_seconds` and `heartbeat_seconds` apply to streams only. 0 disables a timeout.
    """

    connect_seconds: Annotated[float, Field(gt=0)] = 2.0
    first_byte_seconds: Seconds = 600.0
    idle_seconds: Seconds = 600.0
    total_seconds: Seconds = 3600.0
    heartbeat_seconds: Seconds = 15.0
    queue_seconds: Seconds | None = None


class AliasSettings(Table):
    """A model name for clients, and the variants that may answer it, best first."""

    ladder: Annotated[tuple[Name, ...], Field(min_length=1)]
    floor: Floor = Floor()
    trust_declared: bool = False
    admit_failed: bool = False
    spill: Spill = Spill()
    think: Literal["auto", "prefix", "none"] = "auto"
    reasoning: Literal["parsed", "restored", "raw"] = "parsed"
    timeouts: TimeoutSettings = TimeoutSettings()


class LogSettings(Table):
    """Log files of replicas, one per replica, with rotation."""

    format: Literal["plain", "json"] = "plain"
    rotate_bytes: SizeBytes = 64 * 2**20
    keep: Annotated[int, Field(ge=0, le=100)] = 3


class ServingSettings(Table):
    """Settings of the supervisor of local replicas."""

    parallel_starts: Annotated[int, Field(ge=1)] | None = None
    start_attempts: Annotated[int, Field(ge=1)] = 3
    logs: LogSettings = LogSettings()


class Settings(Table):
    """The configuration file."""

    gateway: GatewaySettings = GatewaySettings()
    serving: ServingSettings = ServingSettings()
    variants: dict[Name, VariantSettings] = {}
    replicas: tuple[ReplicaSettings, ...] = ()
    aliases: dict[Name, AliasSettings] = {}
