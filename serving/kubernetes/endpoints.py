"""EndpointSlices, and the pods that they list. Pure.

A Service has several slices, and one pod may be in more than one of them at the same time, so a pod is what all slices
together say (https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/#duplicate-endpoints):

===========  ============================================  ======================
standing     conditions                                    requests
===========  ============================================  ======================
ready        ready and serving, not terminating            new ones, once verified
terminating  serving and terminating                       it finishes those it has
not_ready    anything else                                 none
===========  ============================================  ======================

A missing condition is true; a missing `terminating` is false. Of a pod with several standings, the upper one holds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

import msgspec

Pod = TypeVar("Pod")
Standing = Literal["ready", "terminating", "not_ready"]
STANDINGS: tuple[Standing, ...] = ("ready", "terminating", "not_ready")


class Conditions(msgspec.Struct, frozen=True):
    """What Kubernetes knows of an endpoint; None is unknown."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class TargetRef(msgspec.Struct, frozen=True):
    """The object behind an endpoint: its pod."""

    name: str = ""
    uid: str = ""


class Endpoint(msgspec.Struct, frozen=True, rename="camel"):
    """An endpoint of a slice; all of its addresses lead to the same pod."""

    addresses: tuple[str, ...] = ()
    conditions: Conditions | None = None
    target_ref: TargetRef | None = None


class Port(msgspec.Struct, frozen=True):
    """A port of all endpoints of a slice."""

    name: str | None = None
    port: int | None = None


class SliceMetadata(msgspec.Struct, frozen=True):
    """The name of a slice, by which a later version replaces it."""

    name: str


class EndpointSlice(msgspec.Struct, frozen=True, rename="camel"):
    """A part of the endpoints of a Service: `discovery.k8s.io/v1`, without what is not needed here."""

    metadata: SliceMetadata
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[Port, ...] | None = None


Slices = Mapping[str, EndpointSlice]  # by name


@dataclass(frozen=True, slots=True)
class PodEndpoint:
    """A pod at the address of its server. `id` is that of its replica, `uid` changes when a pod is replaced."""

    id: str
    uid: str
    url: str
    standing: Standing


def listed(slices: Iterable[EndpointSlice]) -> Slices:
    """Return the slices of a list by name."""
    return {each.metadata.name: each for each in slices}


def applied(slices: Slices, event: str, changed: EndpointSlice) -> Slices:
    """Return the slices after an event; to apply it twice changes nothing."""
    others = {name: each for name, each in slices.items() if name != changed.metadata.name}
    return others if event == "DELETED" else {**others, changed.metadata.name: changed}


def pod_endpoints(slices: Slices, port: int | str | None, variant: str) -> Mapping[str, PodEndpoint]:
    """Return the pods of all slices by the id of their replica: the name of the pod, or VARIANT-ADDRESS without one.

    `port` is the number of the pods' port, the name that the Service gives it, or None for the only one of a slice.
    The order of slices and endpoints does not matter.
    """
    pods = dict[str, PodEndpoint]()
    for each in sorted(_all_endpoints(slices.values(), port, variant), key=_precedence):
        pods.setdefault(each.uid, each)
    # A pod and its successor of the same name, as in a StatefulSet, may be listed at the same time.
    by_id = dict[str, PodEndpoint]()
    for each in pods.values():
        by_id.setdefault(each.id, each)
    return by_id


def qualified(pods: Mapping[str, PodEndpoint], namespace: str) -> Mapping[str, PodEndpoint]:
    """Return pods of another namespace than the gateway's under NAME.NAMESPACE: each may have a pod of that name."""
    return {(name := f"{replica_id}.{namespace}"): replace(pod, id=name) for replica_id, pod in pods.items()}


def _precedence(pod: PodEndpoint) -> tuple[int, bool, str, str]:
    """Order the endpoints of one pod: the best standing first, then IPv4."""
    return STANDINGS.index(pod.standing), "[" in pod.url, pod.url, pod.uid


def _all_endpoints(slices: Iterable[EndpointSlice], port: int | str | None, variant: str) -> Iterator[PodEndpoint]:
    for each in slices:
        number = port_number(each, port)
        if number is None:
            continue
        for endpoint in each.endpoints or ():
            for address in endpoint.addresses[:1]:
                host = f"[{address}]" if ":" in address else address
                target = endpoint.target_ref or TargetRef()
                replica_id = target.name or f"{variant}-{address}:{number}"
                yield PodEndpoint(
                    replica_id, target.uid or replica_id, f"http://{host}:{number}", standing(endpoint.conditions)
                )


def standing(conditions: Conditions | None) -> Standing:
    """Return what requests an endpoint may get; see the table above."""
    known = conditions or Conditions()
    serving = known.serving is not False
    if known.terminating:
        return "terminating" if serving else "not_ready"
    return "ready" if serving and known.ready is not False else "not_ready"


def port_number(of: EndpointSlice, port: int | str | None) -> int | None:
    """Return the port of a slice's endpoints; None if it has none of that name, or several of which none is named."""
    if isinstance(port, int):
        return port
    ports = of.ports or ()
    if port is None:
        return ports[0].port if len(ports) == 1 else None
    return next((each.port for each in ports if each.name == port), None)


def port_problem(slices: Slices, port: int | str | None) -> str | None:
    """Return why the endpoints of some slice can't be used; None if all can."""
    for name, each in sorted(slices.items()):
        if each.endpoints and port_number(each, port) is None:
            known = ", ".join(f"{has.name or 'without a name'} ({has.port})" for has in each.ports or ()) or "none"
            what = f"has no port {port!r}" if port is not None else "has not one port"
            return f"the EndpointSlice {name} {what}; set `port` to one of: {known}"
    return None


@dataclass(frozen=True, slots=True)
class Difference(Generic[Pod]):
    """What has changed between two pictures of the pods: new and changed ones, and those that are gone."""

    changed: tuple[Pod, ...]
    gone: tuple[Pod, ...]


def difference(before: Mapping[str, Pod], now: Mapping[str, Pod]) -> Difference[Pod]:
    """Compare two pictures."""
    return Difference(
        tuple(pod for replica_id, pod in now.items() if before.get(replica_id) != pod),
        tuple(pod for replica_id, pod in before.items() if replica_id not in now),
    )


def is_doubtful(before: Mapping[str, PodEndpoint], now: Mapping[str, PodEndpoint]) -> bool:
    """Whether a list contradicts what was known: no pod at all, where some were ready.

    A wrong selector or an API server that lost its data look like that, too.
    """
    return not now and any(pod.standing == "ready" for pod in before.values())
