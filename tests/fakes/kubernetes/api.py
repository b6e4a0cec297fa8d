"""The routes of the fake API server: list, watch, get, create, replace, merge patch and delete, and `scale`."""

import base64
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from tests.fakes.http_server import Reply, Request
from tests.fakes.kubernetes.failures import ApiFailure, expired
from tests.fakes.kubernetes.faults import Faults
from tests.fakes.kubernetes.store import Key, Object, Store
from tests.fakes.kubernetes.watches import Watch, WatchRequest
from tests.fakes.kubernetes.workloads import WORKLOADS, Controllers, scale_of

# Plural, group and version of each resource, with the kind of its objects.
RESOURCES = {
    ("endpointslices", "discovery.k8s.io", "v1"): "EndpointSlice",
    ("deployments", "apps", "v1"): "Deployment",
    ("leaderworkersets", "leaderworkerset.x-k8s.io", "v1"): "LeaderWorkerSet",
    ("horizontalpodautoscalers", "autoscaling", "v2"): "HorizontalPodAutoscaler",
    ("leases", "coordination.k8s.io", "v1"): "Lease",
}
VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Target:
    """What a path names."""

    plural: str
    group: str
    version: str
    kind: str
    namespace: str | None
    name: str | None
    subresource: str | None

    @property
    def resource(self) -> str:
        """What messages and rules call the resource."""
        return f"{self.plural}.{self.group}"

    @property
    def key(self) -> Key:
        """Where the object lives."""
        assert self.namespace is not None
        assert self.name is not None
        return Key(self.resource, self.namespace, self.name)


class Api:
    """Answers what a client of Kubernetes asks."""

    def __init__(self, store: Store, controllers: Controllers, faults: Faults) -> None:
        self._store = store
        self._controllers = controllers
        self._faults = faults

    async def answer(self, request: Request, reply: Reply) -> None:
        """Answer one request, or raise ApiFailure."""
        self._faults.check_token(request)
        target, query = _target(request.path), dict(parse_qsl(request.query))
        verb = _verb(request, target, query)
        self._faults.check_refusals(verb, target.resource + (f"/{target.subresource}" if target.subresource else ""))
        if verb == "watch":
            await Watch(_watch_request(target, query), self._store, self._faults, reply).run()
        elif verb == "list":
            await reply.send_json(200, self._list(target, query))
        elif verb == "create":
            await reply.send_json(201, self._create(target, json.loads(request.body)))
        else:
            found = self._one(verb, target, request)
            if verb in self._faults.lose_answers:
                reply.drop()
            else:
                await reply.send_json(200, found)

    def _list(self, target: Target, query: Mapping[str, str]) -> Object:
        store = self._store
        found = list(store.matching(target.resource, target.namespace, _labels(query)).values())
        version, first = store.version, 0
        if "continue" in query:
            version, first = json.loads(base64.b64decode(query["continue"]))
            if version < store.compacted:
                raise expired(version, store.compacted)
        limit = int(query.get("limit", "0")) or len(found)
        metadata: Object = {"resourceVersion": str(version)}
        if (last := first + limit) < len(found):
            token = base64.b64encode(json.dumps([version, last]).encode()).decode()
            metadata.update({"continue": token, "remainingItemCount": len(found) - last})
        return {
            "kind": f"{target.kind}List",
            "apiVersion": f"{target.group}/{target.version}",
            "metadata": metadata,
            # The items of a list name neither kind nor version.
            "items": [
                {name: part for name, part in each.items() if name not in ("kind", "apiVersion")}
                for each in found[first:last]
            ],
        }

    def _create(self, target: Target, document: Object) -> Object:
        assert target.namespace is not None
        key = Key(target.resource, target.namespace, document["metadata"]["name"])
        if key in self._store.objects:
            raise ApiFailure(409, f'{target.resource} "{key.name}" already exists')
        return self._put(key, document, None)

    def _one(self, verb: str, target: Target, request: Request) -> Object:
        key = target.key
        if (stored := self._store.objects.get(key)) is None:
            raise ApiFailure(404, f'{target.resource} "{key.name}" not found')
        if verb == "delete":
            self._store.delete(key)
            self._controllers.follow(key)
            return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        if verb == "get":
            return scale_of(key, stored) if target.subresource else stored
        change = json.loads(request.body)
        expected = change.get("metadata", {}).get("resourceVersion")
        if verb == "patch":
            if request.headers.get("content-type") != MERGE_PATCH:
                raise ApiFailure(415, f"the body of the request was in an unknown format, expected {MERGE_PATCH}")
            change = merged(scale_of(key, stored) if target.subresource else stored, change)
        if not target.subresource:
            return self._put(key, change, expected)
        spec = {**stored["spec"], "replicas": change["spec"]["replicas"]}
        return scale_of(key, self._put(key, {**stored, "spec": spec}, expected))

    def _put(self, key: Key, document: Object, expected: str | None) -> Object:
        stored = self._store.put(key, document, expected)
        self._controllers.follow(key)
        return stored


def merged(document: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return deepcopy(patch)
    result = deepcopy(document) if isinstance(document, dict) else {}
    for name, value in patch.items():
        if value is None:
            result.pop(name, None)
        else:
            result[name] = merged(result.get(name), value)
    return result


def _target(path: str) -> Target:
    """Read /apis/GROUP/VERSION[/namespaces/NAMESPACE]/PLURAL[/NAME[/scale]]."""
    parts = path.strip("/").split("/")
    if len(parts) >= 4 and parts[0] == "apis":
        group, version, rest = parts[1], parts[2], parts[3:]
        namespace = None
        if rest[0] == "namespaces" and len(rest) >= 3:
            namespace, rest = rest[1], rest[2:]
        kind = RESOURCES.get((rest[0], group, version))
        name, subresource = [*rest[1:], None, None][:2]
        scalable = f"{rest[0]}.{group}" in WORKLOADS.values() and subresource == "scale"
        if kind is not None and len(rest) <= 3 and (subresource is None or scalable):
            return Target(rest[0], group, version, kind, namespace, name, subresource)
    raise ApiFailure(404, "the server could not find the requested resource")


def _verb(request: Request, target: Target, query: Mapping[str, str]) -> str:
    verb = VERBS.get(request.method)
    if verb is None or (verb not in ("get", "create") and target.name is None) or (verb == "create" and target.name):
        raise ApiFailure(405, "the server does not allow this method on the requested resource")
    if verb == "get" and target.name is None:
        return "watch" if query.get("watch") in ("1", "true") else "list"
    return verb


def _labels(query: Mapping[str, str]) -> dict[str, str]:
    """Read a selector of equalities: `a=b,c==d`."""
    labels = {}
    for part in query.get("labelSelector", "").split(","):
        name, equals, value = part.partition("=")
        if part and (not equals or name.endswith("!")):
            raise ApiFailure(400, f"the fake knows selectors of equalities only, not {part!r}")
        if part:
            labels[name.strip()] = value.removeprefix("=").strip()
    return labels


def _watch_request(target: Target, query: Mapping[str, str]) -> WatchRequest:
    version = query.get("resourceVersion", "")
    return WatchRequest(
        target.resource,
        target.namespace,
        _labels(query),
        target.kind,
        f"{target.group}/{target.version}",
        int(version) if version not in ("", "0") else None,
        query.get("allowWatchBookmarks") in ("1", "true"),
        float(query.get("timeoutSeconds", "1800")),
    )
