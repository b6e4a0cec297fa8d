"""The objects of a cluster, each with a version from one counter, and the history that watches read."""

import asyncio
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fakes.kubernetes.failures import conflict, expired

Object = dict[str, Any]
CREATED = "2026-11-01T00:00:00Z"


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Where an object lives."""

    resource: str  # plural and group: `deployments.apps`
    namespace: str
    name: str


@dataclass(frozen=True, slots=True)
class Change:
    """One object before and after; None where it did not exist."""

    key: Key
    version: int
    before: Object | None
    after: Object | None


@dataclass(frozen=True, slots=True)
class StreamFault:
    """Something that a watch has to do between two events; see `tests.fakes.kubernetes.watches`."""

    action: str


Queue = asyncio.Queue[Change | StreamFault]


@dataclass(slots=True)
class Store:
    """Owns the objects; every change goes through `put` or `delete`."""

    file: Path | None = None
    version: int = 100
    compacted: int = 0  # watches from below it are refused
    objects: dict[Key, Object] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    queues: set[Queue] = field(default_factory=set)

    def put(self, key: Key, document: Object, expected: str | None = None) -> Object:
        """Create or replace an object and give it as stored; ApiFailure 409 if `expected` is not its version."""
        before = self.objects.get(key)
        self._check(key, before, expected)
        after = deepcopy(document)
        metadata = after.setdefault("metadata", {})
        metadata.update(name=key.name, namespace=key.namespace)
        created = before["metadata"] if before else {"uid": str(uuid.uuid4()), "creationTimestamp": CREATED}
        metadata.update(uid=created["uid"], creationTimestamp=created["creationTimestamp"])
        self._change(key, before, after)
        return after

    def delete(self, key: Key, expected: str | None = None) -> None:
        """Remove an object that exists."""
        before = self.objects[key]
        self._check(key, before, expected)
        self._change(key, before, None)

    def matching(self, resource: str, namespace: str | None, labels: Mapping[str, str]) -> dict[Key, Object]:
        """Return the objects of a resource with these labels, in the order of names."""
        return {
            key: each
            for key, each in sorted(self.objects.items(), key=lambda item: item[0])
            if key.resource == resource and namespace in (None, key.namespace) and has_labels(each, labels)
        }

    def since(self, version: int) -> list[Change]:
        """Return what changed after a version; ApiFailure 410 if that is not known any more."""
        if version < self.compacted:
            raise expired(version, self.compacted)
        return [change for change in self.changes if change.version > version]

    def compact(self) -> None:
        """Forget the history."""
        self.version += 1
        self.compacted = self.version
        self.changes.clear()
        self._save()

    @contextmanager
    def subscribed(self) -> Iterator[Queue]:
        """Give a queue of changes from now on."""
        queue: Queue = asyncio.Queue()
        self.queues.add(queue)
        try:
            yield queue
        finally:
            self.queues.discard(queue)

    def publish(self, what: Change | StreamFault) -> None:
        """Put something into every open watch."""
        for queue in self.queues:
            queue.put_nowait(what)

    def _check(self, key: Key, before: Object | None, expected: str | None) -> None:
        if expected is not None and (before is None or before["metadata"]["resourceVersion"] != expected):
            raise conflict(key.resource, key.name)

    def _change(self, key: Key, before: Object | None, after: Object | None) -> None:
        self.version += 1
        if after is None:
            del self.objects[key]
        else:
            after["metadata"]["resourceVersion"] = str(self.version)
            self.objects[key] = after
        change = Change(key, self.version, before, after)
        self.changes.append(change)
        self.publish(change)
        self._save()

    def _save(self) -> None:
        if self.file is None:
            return
        objects = [[key.resource, key.namespace, key.name, each] for key, each in self.objects.items()]
        changes = [
            [each.key.resource, each.key.namespace, each.key.name, each.version, each.before, each.after]
            for each in self.changes
        ]
        document = {"version": self.version, "compacted": self.compacted, "objects": objects, "changes": changes}
        written = self.file.with_suffix(".new")
        written.write_text(json.dumps(document))
        written.replace(self.file)


def load(file: Path | None) -> Store:
    """Read what an earlier process with the same file had, as etcd keeps it; an empty store if there is none."""
    if file is None or not file.exists():
        return Store(file)
    document = json.loads(file.read_text())
    return Store(
        file,
        document["version"],
        document["compacted"],
        {Key(*where): each for *where, each in document["objects"]},
        [Change(Key(*each[:3]), *each[3:]) for each in document["changes"]],
    )


def has_labels(document: Object | None, labels: Mapping[str, str]) -> bool:
    """Whether an object exists and carries all of the labels."""
    carried = document["metadata"].get("labels") or {} if document else {}
    return document is not None and all(carried.get(name) == value for name, value in labels.items())
