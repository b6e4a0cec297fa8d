"""Schema of the configuration file: the tables variants, replicas and aliases, and settings of gateway and serving.

Every model is frozen and rejects unknown keys. `load.py` converts a file to `Settings`. `config/example.yaml` describes
each option.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from config.field_types import (
    CORES_PATTERN,
    ENDPOINT_PATTERN,
    LAST_PORT,
    MAX_SECONDS,
    MAX_SERVERS,
    STATE_PATTERN,
    Address,
    Count,
    Credential,
    Domain,
    EngineValue,
    Entries,
    ExternalModelName,
    FileName,
    LabelSelector,
    Measure,
    Name,
    Namespace,
    ObjectName,
    Origin,
    Positive,
    ProviderUrl,
    Ratio,
    ReplicaUrl,
    Seconds,
    Secret,
    Servers,
    ServicePort,
    Share,
    SizeBytes,
    ToolCalling,
    Workload,
)
from config.lora import lora_variant
from config.vllm import KvCacheDtype


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


class TlsSettings(Table):
    """The certificate of the clients' port, with its chain; without `key_file`, its key is in the same file."""

    certificate: FileName
    key_file: FileName | None = None


class ClusterSettings(Table):
    """Access to the API server of a Kubernetes cluster; an omitted option is that of the pod that the gateway runs in.

    `server` is a URL, `ca` a PEM file with its CA, `token_file` has the bearer token, and may be replaced at any time.
    """

    server: Annotated[str, Field(pattern=ENDPOINT_PATTERN)] | None = None
    ca: FileName | None = None
    token_file: FileName | None = None


# As gateway.keys: the keys are in the state database. A file of this name is `./database`.
KEYS_IN_DATABASE = "database"


class GatewaySettings(Table):
    """Settings of the gateway process; `keys` is a file, or KEYS_IN_DATABASE."""

    listen: Address = "127.0.0.1:8000"
    admin: Address = "127.0.0.1:8001"
    admin_key: Secret | None = None
    tls: TlsSettings | None = None
    state: Annotated[str, Field(pattern=STATE_PATTERN)] = "sqlite:///state.db"
    keys: FileName | None = None
    allowed_hosts: tuple[Domain, ...] = ()
    cors: CorsSettings | None = None
    media_domains: tuple[Domain, ...] = ()
    access_log: Literal["plain", "json", "off"] = "plain"
    tracing: TracingSettings | None = None
    kubernetes: ClusterSettings = ClusterSettings()
    per_key_metrics: bool = False
    usage_days: Annotated[int, Field(ge=0, le=3660)] = 400
    limits: LimitSettings = LimitSettings()
    queue: QueueSettings = QueueSettings()
    retries: RetrySettings = RetrySettings()
    memory_bytes: SizeBytes = 512 * 2**20
    drain_seconds: Seconds = 30.0

    @property
    def keys_in_database(self) -> bool:
        """Whether the keys are in the state database."""
        return self.keys == KEYS_IN_DATABASE

    @property
    def keys_file(self) -> str | None:
        """The keys file; None: no keys, or those in the state database."""
        return None if self.keys_in_database else self.keys


class DeclaredQuality(Table):
    """Quality of a variant without a local manifest, as declared by the operator."""

    kl_mean: Measure | None = None
    top1_agreement: Share | None = None
    perplexity_ratio: Ratio | None = None
    kl_p99: Measure | None = None
    length_ratio: Ratio | None = None


def _path_as_lora(value: object) -> object:
    """Accept a directory alone as an adapter."""
    return {"path": value} if isinstance(value, str) else value


class LoraSettings(Table):
    """A LoRA adapter: its directory, and its quality relative to the same adapter on the unquantized base.

    Without `path`, only replicas with a `url` can serve it.
    """

    path: FileName | None = None
    quality: DeclaredQuality | None = None


class BudgetSettings(Table):
    """What an external model may cost; when that is spent, it is not available until the next day (UTC)."""

    usd_per_day: Measure


class PriceSettings(Table):
    """What an external model costs, in US dollars per million tokens."""

    prompt_usd: Measure
    completion_usd: Measure


class VariantSettings(Table):
    """A model directory, the declared properties of a variant whose replicas have a `url`, or an external model.

    `external` is a model of another provider, as litellm names it: `PROVIDER/MODEL`. The options after it are for
    external models only. `credentials` are those that a provider needs besides or instead of `api_key`.
    """

    path: FileName | None = None
    precision: Literal["bf16", "fp16", "fp32", "fp8", "fp4", "int8", "int4"] | None = None
    quality: DeclaredQuality | None = None
    lora: dict[
        Name, Annotated[LoraSettings, BeforeValidator(_path_as_lora, json_schema_input_type=LoraSettings | str)]
    ] = {}
    external: ExternalModelName | None = None
    api_key: Secret | None = None
    base_url: ProviderUrl | None = None
    credentials: dict[Credential, Secret] = {}
    budget: BudgetSettings | None = None
    price: PriceSettings | None = None
    max_in_flight: Positive = 64


class KubernetesSettings(Table):
    """The pods behind a Service: those of its EndpointSlices, which `service` names or `selector` selects by label.

    `namespace` is by default the gateway's own, `port` (number or name) the only one that a slice has. `workload` is
    what a rollout scales: `deployment/NAME` or `leaderworkerset/NAME`.
    """

    service: ObjectName | None = None
    selector: LabelSelector | None = None
    namespace: Namespace | None = None
    port: ServicePort | None = None
    workload: Workload | None = None

    @property
    def label_selector(self) -> str:
        """The labels of the EndpointSlices: Kubernetes gives them the name of their Service."""
        return self.selector or f"kubernetes.io/service-name={self.service}"


class ReplicaSettings(Table):
    """Servers of one variant: an external one (`url`), pods (`kubernetes`), or `count` that quantgate starts."""

    variant: Name
    url: ReplicaUrl | None = None
    kubernetes: KubernetesSettings | None = None
    api_key: Secret | None = None
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
    def supervised(self) -> bool:
        """Whether quantgate starts these servers."""
        return self.url is None and self.kubernetes is None

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

    @property
    def loras(self) -> dict[str, tuple[str, str]]:
        """Base variant and adapter by the name of the variant that the adapter is."""
        return {
            lora_variant(base, adapter): (base, adapter)
            for base, variant in self.variants.items()
            for adapter in variant.lora
        }

    @property
    def served_variants(self) -> frozenset[str]:
        """The variants that a replica is configured for, those of its adapters included, and external models."""
        served = {replica.variant for replica in self.replicas}
        served |= {name for name, variant in self.variants.items() if variant.external is not None}
        return frozenset(served | {name for name, (base, _) in self.loras.items() if base in served})
