"""The JSON schema of the chart's values, from their models."""

from collections.abc import Mapping
from typing import Any

from config.reserved_flags import RESERVED_FLAGS
from deploy.helm.values import ChartValues

# The chart sets these options of quantgate.yaml.
CHART_OPTIONS = frozenset({"listen", "admin", "admin_key", "state", "tls"})
# Options of `replicas` that templates/_engine.tpl turns into arguments of vLLM or fields of the pod.
ENGINE_OPTIONS = frozenset(
    {
        *("tensor_parallel", "pipeline_parallel", "data_parallel", "expert_parallel"),
        *("dtype", "max_model_len", "max_num_seqs", "max_queued", "max_in_flight"),
        *("kv_cache_bytes", "kv_cache_dtype", "speculative", "prefix_caching", "cores"),
        *("start_timeout_seconds", "drain_seconds", "args"),
    }
)
# The chart has no option for adapters: `args` start them.
ADAPTER_FLAGS = frozenset({"--enable-lora", "--lora-modules", "--max-lora-rank"})
# Names of variants that would give two Services one name: that of the admin port, and those of LeaderWorkerSets.
RESERVED_VARIANTS = "^admin$|-lws$"
# quantgate.yaml is a ConfigMap, so it refers to its secrets.
REFERENCE_PATTERN = r"^\$\{(env:[A-Za-z_][A-Za-z0-9_]*|credential:[A-Za-z0-9_.-]+)\}$"


def values_schema() -> dict[str, Any]:
    """Return the JSON schema of the values; what is optional has its default in values.yaml."""
    schema: dict[str, Any] = _without(("title", "default"), ChartValues.model_json_schema(by_alias=True))
    schema = _with_references(schema)
    tables: dict[str, Any] = schema["$defs"]
    for table in (schema, *(tables[name] for name in _partial(tables))):
        table.pop("required", None)
    _keep(tables["GatewaySettings"], tables["GatewaySettings"]["properties"].keys() - CHART_OPTIONS)
    options = tables["EngineOptions"]
    _keep(options, ENGINE_OPTIONS)
    size = {"type": "string", "pattern": r"^[0-9]+(MiB|GiB)$"}
    options["properties"]["kv_cache_bytes"] = {"anyOf": [{"type": "integer"}, size]}
    options["properties"]["args"]["items"] = {"type": "string", "not": {"pattern": _refused_flags()}}
    schema["properties"]["variants"]["additionalProperties"] = False
    schema["properties"]["variants"]["propertyNames"] = {"not": {"pattern": RESERVED_VARIANTS}}
    # Of charts that this one is a part of.
    schema["properties"]["global"] = {"type": "object"}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _partial(tables: Mapping[str, Any]) -> list[str]:
    """Return the tables of the chart, whose values are merged with the defaults, by name."""
    return [name for name in tables if name.endswith("Values") or name == "EngineOptions"]


def _keep(table: dict[str, Any], names: frozenset[str] | set[str]) -> None:
    table["properties"] = {name: value for name, value in table["properties"].items() if name in names}


def _refused_flags() -> str:
    flags = sorted(RESERVED_FLAGS.keys() - ADAPTER_FLAGS)
    return f"^({'|'.join(flags)})(=|$)"


def _with_references(value: Any) -> Any:
    """Accept references instead of secrets."""
    if isinstance(value, list):
        return [_with_references(each) for each in value]
    if not isinstance(value, Mapping):
        return value
    if value.get("format") == "password":
        return {"type": "string", "pattern": REFERENCE_PATTERN}
    return {key: _with_references(each) for key, each in value.items()}


def _without(names: tuple[str, ...], value: Any, *, properties: bool = False) -> Any:
    """Leave keywords of a JSON schema out, but not properties of the same name."""
    if isinstance(value, list):
        return [_without(names, each) for each in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: _without(names, each, properties=not properties and key in ("properties", "$defs"))
        for key, each in value.items()
        if properties or key not in names
    }
