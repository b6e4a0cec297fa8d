"""What controllers do: the pods of a Deployment or LeaderWorkerSet, and the EndpointSlices of its Service.

| state       | ready | serving | terminating | next                                        |
| ----------- | ----- | ------- | ----------- | ------------------------------------------- |
| starting    | no    | no      | no          | ready, `start_seconds` after it was added   |
| ready       | yes   | yes     | no          | terminating, when the workload scales down  |
| terminating | no    | yes     | yes         | gone, `terminating_seconds` later           |

A pod is an address that a test gives: what listens there is the test's. Endpoints of different ports are in different
slices, as with a named target port, and a slice has at most `endpoints_per_slice`.
"""

import asyncio
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.fakes.kubernetes.store import Key, Object, Store

SLICES = "endpointslices.discovery.k8s.io"
WORKLOADS = {"deployment": "deployments.apps", "leaderworkerset": "leaderworkersets.leaderworkerset.x-k8s.io"}
API_VERSIONS = {"deployment": "apps/v1", "leaderworkerset": "leaderworkerset.x-k8s.io/v1"}
State = Literal["starting", "ready", "terminating"]
KINDS = {"deployment": "Deployment", "leaderworkerset": "LeaderWorkerSet"}


@dataclass(slots=True)
class Pod:
    """A pod that exists."""

    address: str
    port: int
    name: str
    uid: str
    state: State


@dataclass(slots=True)
class Workload:
    """A workload as a test describes it, and its pods."""

    kind: str
    name: str
    service: str
    namespace: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)  # of the Service, and so of its slices
    addresses: Sequence[tuple[str, int]] = ()  # where pods may run, in this order
    start_seconds: float = 0.0
    terminating_seconds: float = 0.0
    endpoints_per_slice: int = 100
    port_name: str = "http"
    pods: list[Pod] = field(default_factory=list)
    generation: int = 0  # slices get other names with each reshuffle

    @property
    def key(self) -> Key:
        """Where the object of the workload lives."""
        return Key(WORKLOADS[self.kind], self.namespace, self.name)


class Controllers:
    """Owns the workloads and their pods: follows the number of replicas of each, and writes slices and status."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._workloads: dict[Key, Workload] = {}

    def add(self, described: Mapping[str, Any], replicas: int) -> None:
        """Take a workload over: create it with all of its pods ready, or go on with what the store has of it."""
        addresses = [(address, port) for address, port in described.get("addresses", ())]
        workload = Workload(**{**described, "addresses": addresses})
        self._workloads[workload.key] = workload
        if workload.key not in self._store.objects:
            workload.pods = [self._pod(workload, place, "ready") for place in workload.addresses[:replicas]]
            self._store.put(workload.key, _object(workload, replicas))
            self._write(workload)
            return
        workload.pods = [pod for each in self._stored_slices(workload).values() for pod in _pods(each)]
        for pod in workload.pods:
            if pod.state != "ready":
                self._later(workload, pod)
        self.follow(workload.key)

    def reshuffle(self, key: Key, *, endpoints_per_slice: int, delete_first: bool, duplicated: bool) -> None:
        """Put the endpoints of a workload into other slices; `duplicated`: the old slices stay as well."""
        workload = self._workloads[key]
        workload.generation += 1
        workload.endpoints_per_slice = endpoints_per_slice
        workload.pods.reverse()
        old, new = self._stored_slices(workload), dict(_slices(workload))
        steps = [*[(key, None) for key in old if not duplicated], *new.items()]
        for slice_key, document in steps if delete_first else reversed(steps):
            self._set(slice_key, document)

    def follow(self, key: Key) -> None:
        """Bring the pods of a workload to the number in its object; does nothing for other objects."""
        workload, stored = self._workloads.get(key), self._store.objects.get(key)
        if workload is None:
            return
        wanted = stored["spec"]["replicas"] if stored else 0
        staying = [pod for pod in workload.pods if pod.state != "terminating"]
        for pod in staying[wanted:]:
            pod.state = "terminating"
            self._later(workload, pod)
        free = [place for place in workload.addresses if all((p.address, p.port) != place for p in workload.pods)]
        for place in free[: max(0, wanted - len(staying))]:
            pod = self._pod(workload, place, "starting")
            workload.pods.append(pod)
            self._later(workload, pod)
        self._write(workload)

    def _later(self, workload: Workload, pod: Pod) -> None:
        """Move a pod on from the state it is in, unless it has left that before."""
        state = pod.state
        seconds = workload.terminating_seconds if state == "terminating" else workload.start_seconds

        def move() -> None:
            if pod.state != state:
                return
            if state == "terminating":
                workload.pods.remove(pod)
                self.follow(workload.key)  # an address has become free
            else:
                pod.state = "ready"
                self._write(workload)

        asyncio.get_running_loop().call_later(seconds, move)

    def _pod(self, workload: Workload, place: tuple[str, int], state: State) -> Pod:
        uid = str(uuid.uuid4())
        return Pod(*place, f"{workload.name}-{uid[:5]}", uid, state)

    def _write(self, workload: Workload) -> None:
        wanted = dict(_slices(workload))
        for key in self._stored_slices(workload).keys() - wanted.keys():
            self._set(key, None)
        for key, document in wanted.items():
            self._set(key, document)
        stored = self._store.objects.get(workload.key)
        if stored is not None:
            status = _status(workload)
            if stored.get("status") != status:
                self._store.put(workload.key, {**stored, "status": status})

    def _stored_slices(self, workload: Workload) -> dict[Key, Object]:
        labels = {"kubernetes.io/service-name": workload.service}
        return self._store.matching(SLICES, workload.namespace, labels)

    def _set(self, key: Key, document: Object | None) -> None:
        """Write what differs."""
        stored = self._store.objects.get(key)
        if document is None:
            if stored is not None:
                self._store.delete(key)
        elif stored is None or stored["endpoints"] != document["endpoints"]:
            self._store.put(key, document)


def scale_of(key: Key, document: Object) -> Object:
    """Show an object's `scale` subresource."""
    metadata = document["metadata"]
    shown = ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
    status = {"replicas": document.get("status", {}).get("replicas", 0), "selector": f"app={key.name}"}
    replicas = document["spec"]["replicas"]
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {name: metadata[name] for name in shown},
        "spec": {"replicas": replicas} if replicas else {},  # the API server omits a zero there
        "status": status,
    }


def _object(workload: Workload, replicas: int) -> Object:
    selector = {"matchLabels": {"app": workload.name}}
    return {
        "kind": KINDS[workload.kind],
        "apiVersion": API_VERSIONS[workload.kind],
        "metadata": {"labels": dict(workload.labels)},
        "spec": {"replicas": replicas, "selector": selector},
    }


def _status(workload: Workload) -> Object:
    states = [pod.state for pod in workload.pods if pod.state != "terminating"]
    return {"replicas": len(states), "readyReplicas": states.count("ready")}


def _slices(workload: Workload) -> Iterator[tuple[Key, Object]]:
    for port in sorted({pod.port for pod in workload.pods}):
        pods = [pod for pod in workload.pods if pod.port == port]
        for first in range(0, len(pods), workload.endpoints_per_slice):
            name = f"{workload.service}-{workload.generation}-{port}-{first}"
            some = pods[first : first + workload.endpoints_per_slice]
            yield Key(SLICES, workload.namespace, name), _slice(workload, port, some)


def _pods(document: Object) -> Iterator[Pod]:
    """Read the pods of a slice."""
    for endpoint in document["endpoints"]:
        conditions, target = endpoint["conditions"], endpoint["targetRef"]
        alive: State = "ready" if conditions["ready"] else "starting"
        state: State = "terminating" if conditions["terminating"] else alive
        yield Pod(endpoint["addresses"][0], document["ports"][0]["port"], target["name"], target["uid"], state)


def _slice(workload: Workload, port: int, pods: Sequence[Pod]) -> Object:
    labels = {**workload.labels, "kubernetes.io/service-name": workload.service}
    return {
        "kind": "EndpointSlice",
        "apiVersion": "discovery.k8s.io/v1",
        "metadata": {"labels": {**labels, "endpointslice.kubernetes.io/managed-by": "endpointslice-controller"}},
        "addressType": "IPv4",
        "endpoints": [_endpoint(workload, pod) for pod in pods],
        "ports": [{"name": workload.port_name, "protocol": "TCP", "port": port}],
    }


def _endpoint(workload: Workload, pod: Pod) -> Object:
    serving = pod.state != "starting"
    return {
        "addresses": [pod.address],
        "conditions": {
            "ready": pod.state == "ready",
            "serving": serving,
            "terminating": pod.state == "terminating",
        },
        "nodeName": "node-1",
        "targetRef": {"kind": "Pod", "namespace": workload.namespace, "name": pod.name, "uid": pod.uid},
    }
