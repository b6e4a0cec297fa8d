"""Schemas of the custom resources that the chart writes: the fields that it uses, of the versions that it names.

They are kept small. Sources: Prometheus Operator 0.86 (ServiceMonitor, PodMonitor, PrometheusRule), LeaderWorkerSet
0.10, Gateway API Inference Extension 1.6.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Schema = dict[str, Any]


def table(required: Mapping[str, Any], **optional: Any) -> Schema:
    """An object with these fields and no others."""
    properties = {**required, **optional}
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def array(items: Schema) -> Schema:
    """A list that is not empty."""
    return {"type": "array", "items": items, "minItems": 1}


TEXT: Schema = {"type": "string", "minLength": 1}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d|w|y))+$"}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT: Schema = {"type": "integer", "minimum": 0}
SELECTOR = table({"matchLabels": LABELS})
RELABELING = table({"targetLabel": TEXT, "replacement": {"type": "string"}})
SECRET_KEY = table({"name": TEXT, "key": TEXT})
SCRAPE = {"port": TEXT, "path": TEXT, "interval": DURATION}
AUTHORIZATION = table({"credentials": SECRET_KEY}, type=TEXT)
ENDPOINT = table(SCRAPE, authorization=AUTHORIZATION, relabelings=array(RELABELING))
NAMESPACES = table({"matchNames": array(TEXT)})
RECORDING = table({"record": TEXT, "expr": TEXT}, labels=LABELS)
ALERT = table(
    {"alert": TEXT, "expr": TEXT},
    **{"for": DURATION, "keep_firing_for": DURATION, "labels": LABELS, "annotations": LABELS},
)
GROUP = table({"name": TEXT, "rules": array({"oneOf": [RECORDING, ALERT]})}, interval=DURATION)
# Pods are validated by the schema of Kubernetes itself.
POD_TEMPLATE = table({"metadata": table({"labels": LABELS}, annotations=LABELS), "spec": {"type": "object"}})
GROUP_OF_PODS = table(
    {"size": {"type": "integer", "minimum": 1}, "workerTemplate": POD_TEMPLATE},
    leaderTemplate=POD_TEMPLATE,
    restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
)
PICKER = table(
    {"name": TEXT},
    port=table({"number": PORT}),
    failureMode={"enum": ["FailClose", "FailOpen"]},
)
SPECIFICATIONS: Mapping[tuple[str, str], Schema] = MappingProxyType(
    {
        ("monitoring.coreos.com/v1", "ServiceMonitor"): table(
            {"selector": SELECTOR, "endpoints": array(ENDPOINT)}, namespaceSelector=NAMESPACES
        ),
        ("monitoring.coreos.com/v1", "PodMonitor"): table(
            {"selector": SELECTOR, "podMetricsEndpoints": array(ENDPOINT)}, namespaceSelector=NAMESPACES
        ),
        ("monitoring.coreos.com/v1", "PrometheusRule"): table({"groups": array(GROUP)}),
        ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): table(
            {"leaderWorkerTemplate": GROUP_OF_PODS},
            replicas=COUNT,
            startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        ),
        ("inference.networking.k8s.io/v1", "InferencePool"): table(
            {
                "selector": SELECTOR,
                "targetPorts": {**array(table({"number": PORT})), "maxItems": 8},
                "endpointPickerRef": PICKER,
            },
            appProtocol={"enum": ["http", "kubernetes.io/h2c"]},
        ),
    }
)
METADATA = table({"name": TEXT, "namespace": TEXT, "labels": LABELS}, annotations=LABELS)


def schema_of(api_version: str, kind: str) -> Schema:
    """The schema of a custom resource; KeyError for any other kind."""
    specification = SPECIFICATIONS[api_version, kind]
    return table(
        {"apiVersion": {"const": api_version}, "kind": {"const": kind}, "metadata": METADATA, "spec": specification}
    )
