"""Values: a replica, its launch, and its state."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from config.external import ExternalModel
from config.lora import lora_variant
from config.manifest import Engine
from config.schema import ReplicaSettings
from config.variant import Variant
from serving.tls import Tls

# Sources of registry entries (`Registry.source`).
SUPERVISOR = "supervisor"  # runs on this machine, started by this process
CONFIGURATION = "configuration"  # has a `url` in the configuration
KUBERNETES = "kubernetes"  # a pod that an entry with `kubernetes` in the configuration finds
STATE_DATABASE = "state database"  # published by the supervisor of another process
EXTERNAL_MODELS = "external models"  # run by other providers; each gateway adds those of its configuration
DIRECT = "direct"  # written without a handle, by tests and benchmarks


class State(StrEnum):
    """States of a replica, described in serving/README.md; only READY gets requests."""

    STOPPED = "stopped"
    STARTING = "starting"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    FAILED = "failed"


PENDING = frozenset({State.STARTING, State.WARMING})
NO_TLS: Mapping[int, Tls] = MappingProxyType({})

# Source of the opening <think>: the chat template, the model, or none.
ThinkTag = Literal["injected", "model", "none"]


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a server handles thinking: which of vLLM's parsers, and a chat template other than the model's own.

    `enable_thinking` is the default for requests without it; None leaves it to the template. `tag` is the expected
    source of the opening tag, and `switch` whether `enable_thinking: false` must suppress it.
    """

    parser: str | None = None
    template: Path | None = None
    enable_thinking: bool | None = None
    tag: ThinkTag | None = None
    switch: bool = False


@dataclass(frozen=True, slots=True)
class Replica:
    """One server of one variant at one address; `served_name` is the model name that it answers to.

    `max_model_len_tokens` and `think` are None until the replica is probed. `think_token` is the id of `<think>`, None
    if that is several tokens. `tools` is whether it accepts requests with tools, None if unknown. At most
    `max_in_flight` requests at once are sent to it. `tls` is None for the system's CAs or without encryption.
    `adapters` are the LoRA adapters that it serves beside its variant, each under its own model name. `base` is set
    only in the view of a server as a replica of the variant that an adapter is: the server's own variant. `external`
    is set if it is no server of ours, but a model of another provider: it has neither polls nor probes.
    """

    id: str
    variant: str
    precision: str
    url: str
    served_name: str
    api_key: str | None = None
    max_model_len_tokens: int | None = None
    think: ThinkTag | None = None
    think_token: int | None = None
    max_in_flight: int = 512
    tls: Tls | None = None
    tools: bool | None = None
    adapters: tuple[str, ...] = ()
    base: str | None = None
    external: ExternalModel | None = None

    @property
    def variants(self) -> frozenset[str]:
        """The names of all variants that it answers."""
        return frozenset([self.variant, *(lora_variant(self.variant, each) for each in self.adapters)])

    def with_adapter(self, adapter: str) -> "Replica":
        """Return the same server as a replica of the variant that an adapter is."""
        name = lora_variant(self.variant, adapter)
        return replace(self, variant=name, served_name=adapter, adapters=(), base=self.variant)


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """A replica's entry in the registry at one moment; `since_seconds` is on the monotonic clock.

    `source` is the name of the only writer that may change the entry.
    """

    replica: Replica
    state: State
    reason: str
    since_seconds: float
    in_flight: int
    source: str = DIRECT


@dataclass(frozen=True, slots=True)
class Launch:
    """One server that quantgate starts: its variant, engine, devices and settings.

    `tool_parser` is vLLM's parser for calls of tools; None: none, or what the replica's `args` say.
    """

    replica_id: str
    variant: Variant
    engine: Engine
    settings: ReplicaSettings
    gpus: tuple[int, ...] = ()
    port: int | None = None
    thinking: Thinking = Thinking()
    tool_parser: str | None = None
    cores: str | None = None  # CPU only: the machine's share for it, as vLLM reads it; None: all
    media_domains: tuple[str, ...] = ()  # that media in messages may be loaded from


def plan_launches(
    replicas: tuple[ReplicaSettings, ...], variants: dict[str, Variant], engine: Engine
) -> tuple[Launch, ...]:
    """Expand the configured replicas to single servers with ids, GPUs and ports, without those that have a `url`."""
    numbers: dict[str, int] = {}
    launches = []
    for settings in replicas:
        for index in range(settings.count if settings.supervised else 0):
            numbers[settings.variant] = numbers.get(settings.variant, 0) + 1
            width = settings.ranks
            launches.append(
                Launch(
                    replica_id=f"{settings.variant}-{numbers[settings.variant]}",
                    variant=variants[settings.variant],
                    engine=engine,
                    settings=settings,
                    gpus=settings.gpus[index * width : (index + 1) * width],
                    port=settings.port + index if settings.port else None,
                )
            )
    return tuple(launches)


def external_replicas(
    replicas: tuple[ReplicaSettings, ...], variants: Mapping[str, Variant], tls: Mapping[int, Tls] = NO_TLS
) -> tuple[Replica, ...]:
    """Return the external replicas, those with a `url`; probing finds their served names.

    `tls` is by index in the configuration.
    """
    numbers: dict[str, int] = {}
    external = []
    for index, settings in enumerate(replicas):
        if settings.url is None:
            continue
        numbers[settings.variant] = numbers.get(settings.variant, 0) + 1
        replica_id = f"{settings.variant}-url-{numbers[settings.variant]}"
        external.append(foreign_replica(settings, variants[settings.variant], replica_id, settings.url, tls.get(index)))
    return tuple(external)


def foreign_replica(
    settings: ReplicaSettings, variant: Variant, replica_id: str, url: str, tls: Tls | None = None
) -> Replica:
    """Return a server of a variant that quantgate does not start, before it is probed."""
    return Replica(
        replica_id,
        settings.variant,
        variant.precision,
        url,
        settings.variant,
        settings.api_key.get_secret_value() if settings.api_key else None,
        max_in_flight=settings.max_in_flight,
        tls=tls,
        tools=None if settings.tool_calling == "auto" else settings.tool_calling != "off",
        adapters=tuple([lora.name for lora in variant.loras]),
    )


def own_keys(replicas: tuple[ReplicaSettings, ...]) -> dict[str, str]:
    """Return the API keys of supervised replicas, by id, and by variant for other ids."""
    numbers: dict[str, int] = {}
    keys: dict[str, str] = {}
    for settings in replicas:
        for _ in range(settings.count if settings.supervised else 0):
            numbers[settings.variant] = numbers.get(settings.variant, 0) + 1
            if settings.api_key is not None:
                keys[f"{settings.variant}-{numbers[settings.variant]}"] = settings.api_key.get_secret_value()
                keys.setdefault(settings.variant, settings.api_key.get_secret_value())
    return keys
