"""Values of the chart, which values.schema.json is generated from. values.yaml describes each value.

Tables of quantgate.yaml are those of `config.schema`, so a typo in an alias is refused before anything is installed.
Objects of Kubernetes are passed on as they are: the API server validates them.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from config.schema import (
    AliasSettings,
    DeclaredQuality,
    GatewaySettings,
    ReplicaSettings,
    VariantSettings,
)

KubernetesObject = dict[str, Any]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]
Digest = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
UserId = Annotated[int, Field(ge=1)]
# A label value, and part of the names of objects.
VariantName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
# IntOrString of Kubernetes: 1 or 25%.
IntOrPercent = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^[0-9]+%$")]


class Values(BaseModel):
    """Base of all tables: unknown keys are refused, keys are in camelCase as usual for charts."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class ImageValues(Values):
    """A container image; `digest` takes precedence over `tag`."""

    repository: str = ""
    tag: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*)?$")] = ""
    digest: Digest = ""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"


class SecretValues(Values):
    """A Secret that exists; an empty name: none."""

    existing_secret: str = ""


class SecretKeyValues(SecretValues):
    """One key of a Secret."""

    key: str = ""


class ResourceValues(Values):
    """Resources of a container."""

    requests: dict[str, Quantity | int] = {}
    limits: dict[str, Quantity | int] = {}


class SwitchValues(Values):
    """Something that is on or off."""

    enabled: bool = False


class DisruptionValues(SwitchValues):
    """A PodDisruptionBudget."""

    max_unavailable: IntOrPercent = 1


class ServiceValues(Values):
    """The Service for clients."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = "ClusterIP"
    port: Port = 8000
    annotations: dict[str, str] = {}


class PersistenceValues(SwitchValues):
    """The volume of the SQLite database."""

    size: Quantity = ""
    storage_class_name: str = ""


class InFlightValues(SwitchValues):
    """A custom metric of requests in flight, and its average per gateway."""

    metric: str = ""
    average_value: Quantity = ""


class CpuValues(SwitchValues):
    """CPU in percent of what is requested."""

    average_utilization: AtLeastOne = 70


class AutoscalingValues(SwitchValues):
    """The HorizontalPodAutoscaler of the gateways."""

    min_replicas: AtLeastOne = 2
    max_replicas: AtLeastOne = 10
    in_flight: InFlightValues = InFlightValues()
    cpu: CpuValues = CpuValues()


class PlacementValues(Values):
    """Nodes that pods may run on."""

    node_selector: dict[str, str] = {}
    tolerations: list[KubernetesObject] = []
    affinity: KubernetesObject = {}
    pod_annotations: dict[str, str] = {}


class GatewayValues(PlacementValues):
    """The Deployment of the gateway, its Services and its volumes."""

    image: ImageValues = ImageValues()
    existing_secret: str = ""
    env: list[KubernetesObject] = []
    replicas: Count = 1
    state: SecretKeyValues = SecretKeyValues()
    persistence: PersistenceValues = PersistenceValues()
    tls: SecretValues = SecretValues()
    service: ServiceValues = ServiceValues()
    pre_stop_seconds: AtLeastOne = 10
    resources: ResourceValues = ResourceValues()
    autoscaling: AutoscalingValues = AutoscalingValues()
    pod_disruption_budget: DisruptionValues = DisruptionValues()
    topology_spread_constraints: list[KubernetesObject] = []
    pod_labels: dict[str, str] = {}
    volumes: list[KubernetesObject] = []
    volume_mounts: list[KubernetesObject] = []


class ConfigValues(Values):
    """Parts of quantgate.yaml; `gateway` is without the options of `schema.CHART_OPTIONS`."""

    gateway: GatewaySettings = GatewaySettings()
    variants: dict[str, VariantSettings] = {}
    replicas: list[ReplicaSettings] = []
    aliases: Annotated[dict[str, AliasSettings], Field(min_length=1)]


class ClaimValues(Values):
    """A PersistentVolumeClaim for the models."""

    create: bool = False
    size: Quantity = ""
    storage_class_name: str = ""
    access_modes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]] = []


class ModelValues(Values):
    """The volume with the model directories."""

    mount_path: Annotated[str, Field(pattern=r"^/.*[^/]$")] = "/models"
    volume: KubernetesObject = {}
    claim: ClaimValues = ClaimValues()
    mount_in_gateway: bool = True


class EngineValues(Values):
    """Image and command of vLLM on a kind of machine."""

    image: ImageValues = ImageValues()
    command: Annotated[list[str], Field(min_length=1)]
    gpu_resource: str = ""
    env: list[KubernetesObject] = []


class EnginesValues(Values):
    """vLLM on GPUs and on CPUs."""

    cuda: EngineValues
    cpu: EngineValues
    api_key: SecretKeyValues = SecretKeyValues()
    run_as_user: UserId = 10001
    pre_stop_seconds: AtLeastOne = 5


class EngineOptions(ReplicaSettings):
    """Options of vLLM: those of `replicas` in quantgate.yaml that are in `schema.ENGINE_OPTIONS`."""


class RollingUpdateValues(Values):
    """How many pods a rolling update adds and removes at once."""

    max_surge: IntOrPercent = 1
    max_unavailable: IntOrPercent = 0


class StrategyValues(Values):
    """How a Deployment replaces pods."""

    type: Literal["RollingUpdate", "Recreate"] = "RollingUpdate"
    rolling_update: RollingUpdateValues = RollingUpdateValues()


class VariantValues(PlacementValues):
    """A variant that runs in the cluster; what is missing is taken from `variantDefaults`."""

    engine: Literal["cuda", "cpu"] = "cuda"
    replicas: Count = 1
    autoscaled: bool = False
    nodes: AtLeastOne = 1
    path: str = ""
    volume: KubernetesObject = {}
    fingerprint: str = ""
    precision: Literal["", "bf16", "fp16", "fp32", "fp8", "fp4", "int8", "int4"] = ""
    quality: DeclaredQuality = DeclaredQuality()
    reasoning_parser: str = ""
    tool_parser: str = ""
    chat_template: str = ""
    template_defaults: dict[str, Any] = {}
    options: EngineOptions
    env: list[KubernetesObject] = []
    resources: ResourceValues = ResourceValues()
    shared_memory: Quantity = ""
    cache_size: Quantity = ""
    strategy: StrategyValues = StrategyValues()
    pod_disruption_budget: DisruptionValues = DisruptionValues()
    runtime_class_name: str = ""
    priority_class_name: str = ""


class RolloutValues(Values):
    """Whether rollouts may scale workloads."""

    scale: bool = False


class NetworkPolicyValues(SwitchValues):
    """Peers that may connect, and what pods may connect to."""

    clients: list[KubernetesObject] = []
    admin: list[KubernetesObject] = []
    prometheus: list[KubernetesObject] = []
    endpoint_pickers: list[KubernetesObject] = []
    gateway_egress: list[KubernetesObject] = []
    engine_egress: list[KubernetesObject] = []


class EndpointPickerValues(Values):
    """The Service of an endpoint picker."""

    name: str = ""
    port: Port = 9002
    failure_mode: Literal["FailClose", "FailOpen"] = "FailClose"


class InferencePoolValues(SwitchValues):
    """An InferencePool per variant."""

    endpoint_picker_ref: EndpointPickerValues = EndpointPickerValues()


class MonitorValues(SwitchValues):
    """A ServiceMonitor or PodMonitor."""

    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")] = "15s"


class DashboardValues(SwitchValues):
    """ConfigMaps with the dashboards."""

    labels: dict[str, str] = {}
    folder: str = ""


class MonitoringValues(Values):
    """Objects for Prometheus Operator and Grafana."""

    labels: dict[str, str] = {}
    service_monitor: MonitorValues = MonitorValues()
    pod_monitor: MonitorValues = MonitorValues()
    prometheus_rule: SwitchValues = SwitchValues()
    dashboards: DashboardValues = DashboardValues()


class ChartValues(Values):
    """values.yaml."""

    name_override: str = ""
    fullname_override: str = ""
    image_pull_secrets: list[KubernetesObject] = []
    gateway: GatewayValues = GatewayValues()
    config: ConfigValues
    models: ModelValues = ModelValues()
    engines: EnginesValues
    variant_defaults: VariantValues
    variants: dict[VariantName, VariantValues] = {}
    rollouts: RolloutValues = RolloutValues()
    network_policy: NetworkPolicyValues = NetworkPolicyValues()
    inference_pool: InferencePoolValues = InferencePoolValues()
    monitoring: MonitoringValues = MonitoringValues()
