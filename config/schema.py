"""Schema of the configuration file: the tables variants, replicas and aliases, and settings of gateway and serving.

Every model is frozen and rejects unknown keys. `load.py` converts a file to `Settings`. `config/example.yaml` describes
each option.
"""

import ipaddress
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal
from urllib.parse import unquote_to_bytes

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from config.vllm import KvCacheDtype

SIZE_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# RFC 1123 host names and underscores. Resolvers differ in how they handle others, so they are rejected here.
HOST_NAME = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
LAST_PORT = 65535
SOCKET_PATH_BYTES = 107  # unix(7): 108 with the terminating null byte
# Upper bounds of numbers. A larger one is a slip of the keyboard, and would exhaust memory or overflow a timer.
MAX_BYTES = 2**50
MAX_SECONDS = 366 * 86400.0
MAX_COUNT = 10**6
MAX_SERVERS = 1024  # of one entry in `replicas`; also its GPUs

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$"
STATE_PATTERN = r"^(sqlite|postgresql(\+\w+)?)://"
ENDPOINT_PATTERN = r"^https?://[^\s?#]+[^\s?#/]$"
CORES_PATTERN = r"^(nobind|auto|[\d,|-]+)$"
TOOL_PARSER_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
# Of each pattern: what text that does not match it is not, and what to write.
PATTERNS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        NAME_PATTERN: ("is not a valid name", "use letters, digits and . _ : / -"),
        STATE_PATTERN: ("is not a database URL", "write sqlite:///state.db, or postgresql://USER:PASSWORD@HOST/NAME"),
        ENDPOINT_PATTERN: ("is not a valid endpoint", "write http://host:port, without a slash at the end"),
        TOOL_PARSER_PATTERN: ("is not a tool parser", "write auto, off, or the name of one of vLLM's tool parsers"),
        CORES_PATTERN: ("is not a list of cores", "write auto, nobind, or cores such as 0-3 or 0-3|4-7"),
    }
)


def is_loopback(host: str) -> bool:
    """Return whether a host, as in `listen` or a URL, can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_host(host: str) -> bool:
    """Return whether text is a host name, an IPv4 address, or an IPv6 address in brackets."""
    if not host.startswith("["):
        return re.fullmatch(HOST_NAME, host) is not None
    try:
        return host.endswith("]") and bool(ipaddress.IPv6Address(host[1:-1]))
    except ValueError:
        return False


def parse_size_bytes(value: object) -> object:
    """Parse `32MiB`, `4GB` or a number as bytes; ValueError for other text. Other types are left to pydantic."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMG]i?B|B|)", value.strip())
    if match is None:
        raise ValueError(f"{value!r} is not a valid size; write a number with {', '.join(filter(None, SIZE_UNITS))}")
    return int(float(match[1]) * SIZE_UNITS[match[2]])


def check_address(value: str) -> str:
    """Require `host:port`: a port is never implied. ValueError otherwise."""
    host, _, port = value.rpartition(":")
    if ":" in host.strip("[]") and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{value!r} is not a valid address; write an IPv6 address in brackets, [{host}]:{port}")
    if not _is_host(host) or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > LAST_PORT:
        raise ValueError(f"{value!r} is not a valid address; write host:port, for example 127.0.0.1:8000")
    return value


def _number_as_text(value: object) -> object:
    """Leave it to `check_address` to say what a port alone lacks."""
    return str(value) if isinstance(value, int) else value


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
    if match is None or not _is_host(match[1]) or not 0 < int(match[2] or 80) <= LAST_PORT:
        raise ValueError(f"{value!r} is not a valid replica URL; write http://host:port, without /v1, or unix:///path")
    return value.rstrip("/")


def check_origin(value: str) -> str:
    """Require an origin as browsers send it, or `*`; ValueError otherwise."""
    match = re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^\s/?#@A-Z]+)", value)
    default_port = {"http": ":80", "https": ":443"}.get(match[1], "/") if match else ""
    if value != "*" and (match is None or match[2].endswith(default_port)):
        raise ValueError(
            f"{value!r} is not a valid origin; write scheme://host, lower case, without path and default port, "
            "for example https://chat.example.com"
        )
    return value


def check_domain(value: str) -> str:
    """Require a host name or IPv4 address without scheme and port; ValueError otherwise."""
    if re.fullmatch(HOST_NAME, value) is None:
        raise ValueError(f"{value!r} is not a valid host name; write the name alone, for example images.example.com")
    return value.lower().rstrip(".")


SizeBytes = Annotated[int, BeforeValidator(parse_size_bytes), Field(ge=0, le=MAX_BYTES)]
Address = Annotated[str, BeforeValidator(_number_as_text), AfterValidator(check_address)]
Origin = Annotated[str, AfterValidator(check_origin)]
Domain = Annotated[str, AfterValidator(check_domain)]
ReplicaUrl = Annotated[str, AfterValidator(check_url)]
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=128)]
FileName = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, le=MAX_SECONDS, allow_inf_nan=False)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# `auto`, `off`, or the name of one of vLLM's tool parsers.
ToolCalling = Annotated[str, Field(pattern=TOOL_PARSER_PATTERN)]
Entries = Annotated[int, Field(ge=1, le=65536)]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT)]
# A value in a configuration of the engine that is passed on as it is.
EngineValue = str | bool | Annotated[int, Field(ge=0, le=MAX_COUNT)] | float
Servers = Annotated[int, Field(ge=1, le=MAX_SERVERS)]


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
    n: Positive = 8
    logprobs: Count = 20
    prompt_logprobs: Count = 5
    queue_seconds: Seconds = 30.0


class QueueSettings(Table):
    """Limits on the requests that wait for a replica: their number, and the size of their bodies."""

    per_alias: Count = 1000
    in_all: Count = 4000
    body_bytes: SizeBytes = 256 * 2**20


class RetrySettings(Table):
    """Retry budget: retries on another replica as a fraction of all requests, plus a burst."""

    share: Share = 0.2
    burst: Count = 10


class TracingSettings(Table):
    """OTLP/HTTP endpoint for spans, and the sampling ratio of traces that start in the gateway."""

    endpoint: Annotated[str, Field(pattern=ENDPOINT_PATTERN)]
    sample_share: Share = 1.0


class CorsSettings(Table):
    """Origins of web pages that may call the client port from a browser; `*`: any."""

    origins: tuple[Origin, ...] = ()


class GatewaySettings(Table):
    """Settings of the gateway process."""

    listen: Address = "127.0.0.1:8000"
    admin: Address = "127.0.0.1:8001"
    admin_key: SecretStr | None = None
    state: Annotated[str, Field(pattern=STATE_PATTERN)] = "sqlite:///state.db"
    keys: FileName | None = None
    allowed_hosts: tuple[Domain, ...] = ()
    cors: CorsSettings | None = None
    media_domains: tuple[Domain, ...] = ()
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

    kl_mean: Measure | None = None
    top1_agreement: Share | None = None
    perplexity_ratio: Ratio | None = None
    kl_p99: Measure | None = None
    length_ratio: Ratio | None = None


class VariantSettings(Table):
    """A model directory, or the declared properties of a variant whose replicas have a `url`."""

    path: FileName | None = None
    precision: Literal["bf16", "fp16", "fp32", "fp8", "fp4", "int8", "int4"] | None = None
    quality: DeclaredQuality | None = None


class ReplicaSettings(Table):
    """Servers of one variant: an external one (`url`), or `count` servers that quantgate starts."""

    variant: Name
    url: ReplicaUrl | None = None
    api_key: SecretStr | None = None
    ca: FileName | None = None
    certificate: FileName | None = None
    key_file: FileName | None = None
    count: Servers = 1
    gpus: tuple[Annotated[int, Field(ge=0, lt=MAX_SERVERS)], ...] = ()
    tensor_parallel: Servers = 1
    pipeline_parallel: Servers = 1
    data_parallel: Servers = 1
    expert_parallel: bool = False
    port: Annotated[int, Field(ge=1024, le=LAST_PORT)] | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    max_model_len: Annotated[int, Field(ge=16, le=10**9)] | None = None
    max_num_seqs: Positive | None = None
    max_queued: Positive = 256
    max_in_flight: Positive = 512
    kv_cache_bytes: SizeBytes | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    speculative: Annotated[dict[str, EngineValue], Field(min_length=1)] | None = None
    prefix_caching: bool = True
    cores: Annotated[str, Field(pattern=CORES_PATTERN)] | None = None
    start_timeout_seconds: Seconds = 900.0
    drain_seconds: Seconds = 120.0
    hang_seconds: Seconds = 120.0
    tool_calling: ToolCalling = "auto"
    args: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """GPUs (on CPU: NUMA nodes) of one server: the product of its kinds of parallelism."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class Floor(Table):
    """Minimum quality of a variant that may answer; an omitted measure is not limited."""

    top1_agreement: Share | None = None
    kl_mean: Measure | None = None
    perplexity_ratio: Ratio | None = None
    kl_p99: Measure | None = None
    length_ratio: Ratio | None = None


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

    connect_seconds: Annotated[float, Field(gt=0, le=MAX_SECONDS, allow_inf_nan=False)] = 2.0
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

    parallel_starts: Servers | None = None
    start_attempts: Positive = 3
    logs: LogSettings = LogSettings()


class Settings(Table):
    """The configuration file."""

    gateway: GatewaySettings = GatewaySettings()
    serving: ServingSettings = ServingSettings()
    variants: dict[Name, VariantSettings] = {}
    replicas: tuple[ReplicaSettings, ...] = ()
    aliases: dict[Name, AliasSettings] = {}
