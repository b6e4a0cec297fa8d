"""A fake cluster for tests: started, steered, read, killed and started again."""

import contextlib
import json
import ssl
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.fakes.certificates import Issued
from tests.fakes.kubernetes.api import MERGE_PATCH
from tests.fakes.kubernetes.workloads import API_VERSIONS, SLICES
from tests.fakes.running import HOST, announced_port, eventually, kill_group, start_process

WorkloadKind = Literal["deployment", "leaderworkerset"]
Action = Literal["cut", "end", "half_line", "duplicate", "bookmark", "expire", "error"]
TOKEN = "token-of-the-test"


@dataclass(slots=True)
class FakeCluster:
    """A fake API server that runs, and may be killed and started again on the same port with what it knew."""

    folder: Path
    issued: Issued | None = None
    port: int = 0
    process: Process | None = None
    workloads: list[dict[str, Any]] = field(default_factory=list)
    tokens: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        """Where a client finds the API server."""
        return f"{'https' if self.issued else 'http'}://{HOST}:{self.port}"

    @property
    def token_file(self) -> Path:
        """A file with a token that is accepted, as in a pod."""
        return self.folder / "token"

    async def start(self) -> None:
        """Start the process; it listens on return, and knows the workloads."""
        files = ["--log", str(self.folder / "log"), "--state", str(self.folder / "state")]
        if self.issued is not None:
            files += ["--certificate", str(self.issued.certificate), "--key", str(self.issued.key)]
        port_file = self.folder / "port"
        port_file.unlink(missing_ok=True)
        argv = [sys.executable, "-m", "tests.fakes.kubernetes", *files, "--port", str(self.port)]
        self.process = await start_process([*argv, "--port-file", str(port_file)], self.folder / "stderr", {})
        self.port = await announced_port(self.process, self.folder)
        await self.set_tokens(*(self.tokens or self.token_file.read_text().split()))
        for workload in self.workloads:
            await self._steer("workloads", workload)

    async def kill(self) -> None:
        """SIGKILL: connections break, new ones are refused."""
        if self.process is not None:
            kill_group(self.process.pid)
            await self.process.wait()
            self.process = None

    # What is in the cluster

    async def add_workload(
        self,
        name: str,
        replicas: int,
        addresses: Sequence[tuple[str, int]],
        *,
        kind: WorkloadKind = "deployment",
        labels: dict[str, str] | None = None,
        start_seconds: float = 0.0,
        terminating_seconds: float = 0.0,
    ) -> None:
        """Add a workload with a Service of its name, and `replicas` ready pods, at the first of the addresses."""
        described = {
            "kind": kind,
            "name": name,
            "service": name,
            "labels": labels or {},
            "addresses": [list(address) for address in addresses],
            "start_seconds": start_seconds,
            "terminating_seconds": terminating_seconds,
            "replicas": replicas,
        }
        self.workloads.append(described)
        await self._steer("workloads", described)

    async def scale(self, name: str, replicas: int, kind: WorkloadKind = "deployment") -> None:
        """Scale a workload, as `kubectl scale` does."""
        await self.patch(self.path(f"{kind}s", name) + "/scale", {"spec": {"replicas": replicas}})

    async def replicas(self, name: str, kind: WorkloadKind = "deployment") -> int:
        """How many replicas a workload shall have."""
        found = await self._ask("GET", self.path(f"{kind}s", name))
        return int(found["spec"]["replicas"])

    async def create(self, plural: str, document: dict[str, Any], namespace: str = "default") -> None:
        """Create any object, for example a slice by hand or a HorizontalPodAutoscaler."""
        await self._ask("POST", self.path(plural, namespace=namespace), document)

    async def delete(self, plural: str, name: str) -> None:
        """Delete an object."""
        await self._ask("DELETE", self.path(plural, name))

    async def patch(self, path: str, patch: dict[str, Any]) -> dict[str, Any]:
        """Apply a merge patch."""
        return await self._ask("PATCH", path, patch)

    async def slices(self) -> list[dict[str, Any]]:
        """The EndpointSlices of the namespace `default`."""
        found: list[dict[str, Any]] = (await self._ask("GET", self.path("endpointslices")))["items"]
        return found

    async def reshuffle(
        self,
        name: str,
        *,
        kind: WorkloadKind = "deployment",
        endpoints_per_slice: int = 1,
        delete_first: bool = False,
        duplicated: bool = False,
    ) -> None:
        """Put a workload's endpoints into other slices; the new ones come before the old ones go, or after."""
        how = {"endpoints_per_slice": endpoints_per_slice, "delete_first": delete_first, "duplicated": duplicated}
        await self._steer("reshuffle", {"kind": kind, "namespace": "default", "name": name, **how})

    @staticmethod
    def path(plural: str, name: str | None = None, namespace: str = "default") -> str:
        """The path of a resource in a namespace, or of one object of it."""
        versions = {
            "endpointslices": "discovery.k8s.io/v1",
            "horizontalpodautoscalers": "autoscaling/v2",
            "leases": "coordination.k8s.io/v1",
            **{f"{kind}s": version for kind, version in API_VERSIONS.items()},
        }
        base = f"/apis/{versions[plural]}/namespaces/{namespace}/{plural}"
        return base if name is None else f"{base}/{name}"

    # What goes wrong

    async def refuse(
        self,
        status: int,
        *,
        times: int = 1_000_000,
        verbs: Sequence[str] = (),
        resources: Sequence[str] = (),
        retry_after: str | None = None,
    ) -> None:
        """Answer requests with a status, `times` times; a resource is called `endpointslices.discovery.k8s.io`."""
        refusal = {"status": status, "times": times, "verbs": verbs, "resources": resources, "retry_after": retry_after}
        await self._steer("faults", {"refusals": [refusal]})

    async def lose_answers(self, *verbs: str) -> None:
        """Carry such requests out, and break the connection before the answer; the test's own requests, too."""
        await self._steer("faults", {"lose_answers": verbs})

    async def accept(self) -> None:
        """Refuse nothing more, and lose no answers."""
        await self._steer("faults", {"refusals": [], "lose_answers": []})

    async def set_tokens(self, *tokens: str) -> None:
        """Accept these tokens only; what the token file has is not changed."""
        self.tokens = tokens
        await self._steer("faults", {"tokens": [*tokens, TOKEN]})

    async def silence(self, seconds: float | None = None) -> None:
        """Write nothing, on streams and to new requests, for some seconds or until `speak`."""
        await self._steer("faults", {"silent": True} if seconds is None else {"silence_seconds": seconds})

    async def speak(self) -> None:
        """End the silence."""
        await self._steer("faults", {"silent": False})

    async def streams(self, action: Action) -> None:
        """Make every open watch do something; see `tests.fakes.kubernetes.watches`."""
        await self._steer("streams", {"action": action})

    async def compact(self, *, by_event: bool = False) -> None:
        """Forget the history: a watch from an older version gets 410, as its status or as an ERROR event."""
        await self._steer("faults", {"expire_by_event": by_event})
        await self._steer("compact", {})

    # What was asked

    def requests(self, path: str = "", *, watches: bool | None = None) -> list[dict[str, Any]]:
        """The requests so far whose path holds these words, oldest first; those of the test itself are not there."""
        log = self.folder / "log"
        whole = log.read_text(encoding="utf-8").rpartition("\n")[0] if log.exists() else ""
        noted = [json.loads(line) for line in whole.splitlines()]
        own = f"Bearer {TOKEN}"
        return [
            line
            for line in noted
            if path in line["path"]
            and line["headers"].get("authorization") != own
            and watches in (None, "watch=" in line["query"])
        ]

    async def watched(self, count: int = 1) -> None:
        """Return when that many watches have been asked for so far."""
        await eventually(lambda: len(self.requests(SLICES.partition(".")[0], watches=True)) >= count)

    async def _steer(self, what: str, asked: dict[str, Any]) -> None:
        await self._ask("POST", f"/fake/{what}", asked)

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {TOKEN}"}
        if body is not None:
            headers["content-type"] = MERGE_PATCH if method == "PATCH" else "application/json"
        async with httpx.AsyncClient(base_url=self.url, verify=_any_certificate()) as client:
            answer = await client.request(method, path, headers=headers, json=body, timeout=20.0)
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found


def _any_certificate() -> ssl.SSLContext:
    """For the test's own server; empty, because reading the CAs of the system takes long."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


@contextlib.asynccontextmanager
async def running_cluster(*, issued: Issued | None = None, token: str = "first") -> AsyncIterator[FakeCluster]:  # noqa: S107
    """An API server that listens on entry and is gone on exit; `token` is in its token file. `issued`: with TLS."""
    with tempfile.TemporaryDirectory(prefix="fake-kubernetes-") as name:
        cluster = FakeCluster(Path(name), issued)
        cluster.token_file.write_text(token)
        try:
            await cluster.start()
            yield cluster
        finally:
            await cluster.kill()
