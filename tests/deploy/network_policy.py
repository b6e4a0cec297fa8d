"""Which connections NetworkPolicies permit: the rules of networking.k8s.io/v1 for pods, selectors and ports."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Peer:
    """A pod that connects: its labels, those of its namespace, and whether that is the namespace of the policies."""

    labels: Labels
    namespace_labels: Labels = field(default_factory=dict)
    same_namespace: bool = True


def permits(policies: Sequence[dict[str, Any]], target: Labels, port: int, peer: Peer) -> bool:
    """Whether a peer may connect to a port of a pod; without a policy that selects the pod, everybody may."""
    applying = [
        policy["spec"]
        for policy in policies
        if "Ingress" in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], target)
    ]
    rules = [rule for policy in applying for rule in policy.get("ingress", ())]
    return not applying or any(_has_port(rule, port) and _has_peer(rule, peer) for rule in rules)


def _has_port(rule: dict[str, Any], port: int) -> bool:
    return "ports" not in rule or any(each["port"] == port for each in rule["ports"])


def _has_peer(rule: dict[str, Any], peer: Peer) -> bool:
    return "from" not in rule or any(_is_peer(each, peer) for each in rule["from"])


def _is_peer(allowed: dict[str, Any], peer: Peer) -> bool:
    namespaces = allowed.get("namespaceSelector")
    if namespaces is None and not peer.same_namespace:
        return False
    if namespaces is not None and not _selects(namespaces, peer.namespace_labels):
        return False
    return _selects(allowed.get("podSelector", {}), peer.labels)


def _selects(selector: dict[str, Any], labels: Labels) -> bool:
    assert selector.keys() <= {"matchLabels"}, "the chart has no expressions"
    wanted: Labels = selector.get("matchLabels", {})
    return wanted.items() <= labels.items()
