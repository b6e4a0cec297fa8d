"""Requests to the API server: pages, tokens, certificates, errors, and what ends a watch."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from config.errors import OptionError
from config.schema import ClusterSettings
from serving.errors import (
    ApiConflict,
    ApiExpired,
    ApiForbidden,
    ApiNotFound,
    ApiRejected,
    ApiServerAway,
    ApiServerFailed,
    ApiThrottled,
    ApiUnauthorized,
    KubernetesError,
)
from serving.kubernetes.access import ClusterAccess, access_problems, cluster_access
from serving.kubernetes.api import KubernetesApi, Resource, error_of
from serving.kubernetes.endpoints import EndpointSlice
from tests.fakes.certificates import Authority
from tests.fakes.kubernetes.running import FakeCluster, running_cluster
from tests.gateway.wire import answering, scripted, whole

SLICES = Resource("discovery.k8s.io", "v1", "endpointslices", "default")
ADDRESSES = [("10.0.0.1", 8000), ("10.0.0.2", 8000), ("10.0.0.3", 8000)]


def api_of(cluster: FakeCluster, ca: Path | None = None, **options: Any) -> KubernetesApi:
    """A client of a fake cluster."""
    return KubernetesApi(ClusterAccess(cluster.url, ca, cluster.token_file), **options)


async def next_type(api: KubernetesApi, version: str) -> str:
    """The type of the next event after a version."""
    async with api.watch(SLICES, EndpointSlice, version) as events:
        async for event in events:
            return event.type
    return "ended"


async def test_a_list_is_read_in_pages() -> None:
    """All pages have the same version."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        await cluster.add_workload("qwq", 3, ADDRESSES)
        await cluster.reshuffle("qwq", endpoints_per_slice=1)
        found = await api.list(SLICES, EndpointSlice, "kubernetes.io/service-name=qwq", page_objects=1)
        assert len(found.items) == 3
        assert found.version
        assert "continue=" in cluster.requests("endpointslices")[-1]["query"]
        assert (await api.list(SLICES, EndpointSlice, "kubernetes.io/service-name=other")).items == ()


async def test_a_watch_goes_on_from_a_version() -> None:
    """It begins with the changes since then."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        await cluster.add_workload("qwq", 1, ADDRESSES)
        version = (await api.list(SLICES, EndpointSlice)).version
        await cluster.scale("qwq", 2)
        assert await next_type(api, version) == "MODIFIED"


async def test_tls(tmp_path: Path) -> None:
    """A server is trusted by the configured CA only."""
    authority = Authority(tmp_path, "ca")
    async with running_cluster(issued=authority.issue()) as cluster:
        async with api_of(cluster, authority.file) as api:
            assert (await api.list(SLICES, EndpointSlice)).items == ()
        async with api_of(cluster) as api:
            with pytest.raises(ApiServerAway, match="certificate"):
                await api.list(SLICES, EndpointSlice)


async def test_another_token_is_read_when_the_old_one_is_refused() -> None:
    """A request is repeated with it; without another one it fails."""
    async with running_cluster(token="old") as cluster, api_of(cluster) as api:
        await api.list(SLICES, EndpointSlice)
        await cluster.set_tokens("new")
        with pytest.raises(ApiUnauthorized, match="401"):
            await api.list(SLICES, EndpointSlice)
        cluster.token_file.write_text("new")
        await api.list(SLICES, EndpointSlice)


async def test_a_token_is_read_again_before_it_is_refused() -> None:
    """Once a minute, here at every request."""
    async with running_cluster(token="old") as cluster, api_of(cluster, token_seconds=0.0) as api:
        await api.list(SLICES, EndpointSlice)
        await cluster.set_tokens("old", "new")
        cluster.token_file.write_text("new\n")
        await api.list(SLICES, EndpointSlice)
        assert cluster.requests("endpointslices")[-1]["headers"]["authorization"] == "Bearer new"


async def test_a_token_file_that_is_missing(tmp_path: Path) -> None:
    """The error names the file; nothing is sent."""
    async with running_cluster() as cluster:
        access = ClusterAccess(cluster.url, token_file=tmp_path / "none")
        async with KubernetesApi(access) as api:
            with pytest.raises(ApiUnauthorized, match=f"{tmp_path}/none with the token"):
                await api.list(SLICES, EndpointSlice)


@pytest.mark.parametrize("content", ["", "t\u00f6ken", "two\nlines", "a b"])
async def test_a_file_without_a_token(tmp_path: Path, content: str) -> None:
    """What can't be sent is an error that names the file."""
    file = tmp_path / "token"
    file.write_text(content)
    async with KubernetesApi(ClusterAccess("http://127.0.0.1:9", token_file=file)) as api:
        with pytest.raises(ApiUnauthorized, match=f"{file} .* has no token"):
            await api.list(SLICES, EndpointSlice)


async def test_what_a_role_lacks() -> None:
    """The error names verb and resource."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        await cluster.refuse(403, verbs=["list"], resources=["endpointslices.discovery.k8s.io"])
        expected = "list endpointslices of discovery.k8s.io in the namespace default: 403 .*; add the verb"
        with pytest.raises(ApiForbidden, match=expected):
            await api.list(SLICES, EndpointSlice)


@pytest.mark.parametrize(
    "retry_after, seconds",
    [("7", 7.0), (None, None), ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("301", 300.0), ("9" * 400, 300.0)],
)
async def test_too_many_requests(retry_after: str | None, seconds: float | None) -> None:
    """Retry-After is passed on, if it is in seconds, up to 300."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        await cluster.refuse(429, retry_after=retry_after)
        with pytest.raises(ApiThrottled) as caught:
            await api.list(SLICES, EndpointSlice)
        assert caught.value.retry_after_seconds == seconds


@pytest.mark.parametrize("by_event", [False, True])
async def test_a_forgotten_version(by_event: bool) -> None:
    """410 is the same error as a status and as an event."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        await cluster.add_workload("qwq", 1, ADDRESSES)
        version = (await api.list(SLICES, EndpointSlice)).version
        await cluster.scale("qwq", 2)
        await cluster.compact(by_event=by_event)
        with pytest.raises(ApiExpired):
            await next_type(api, version)


async def test_half_a_line_is_no_event() -> None:
    """The watch has ended with an error, and its last event is the one before."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        await cluster.add_workload("qwq", 1, ADDRESSES)
        version = (await api.list(SLICES, EndpointSlice)).version
        seen = []
        with pytest.raises(ApiServerAway):
            async with api.watch(SLICES, EndpointSlice, version) as events:
                await cluster.streams("bookmark")
                async for event in events:
                    seen.append(event.type)
                    await cluster.streams("half_line")
        assert seen == ["BOOKMARK"]


async def test_silence_ends_a_watch() -> None:
    """So does a server that does not begin to answer."""
    async with running_cluster() as cluster:
        async with api_of(cluster, silence_seconds=0.2) as api:
            with pytest.raises(ApiServerAway, match="Timeout"):
                await next_type(api, (await api.list(SLICES, EndpointSlice)).version)
        async with api_of(cluster, timeout_seconds=0.2) as api:
            await cluster.silence()
            with pytest.raises(ApiServerAway, match="Timeout"):
                await next_type(api, "1")
            with pytest.raises(ApiServerAway, match="Timeout"):
                await api.list(SLICES, EndpointSlice)


async def test_a_list_that_expires_between_pages_begins_again() -> None:
    """Once; the second time it is an error."""
    page = whole(b'{"metadata": {"resourceVersion": "5", "continue": "c"}, "items": []}')
    gone = whole(
        b'{"kind": "Status", "message": "The provided continue parameter is too old", "code": 410}', "410 Gone"
    )
    last = whole(b'{"metadata": {"resourceVersion": "9"}, "items": null}')
    for replies, version in (((page, gone, page, last), "9"), ((page, gone, page, gone), None)):
        async with (
            scripted(answering(*replies, close=False)) as server,
            KubernetesApi(ClusterAccess(server.url)) as api,
        ):
            if version is not None:
                assert (await api.list(SLICES, EndpointSlice)).version == version
                continue
            with pytest.raises(ApiExpired, match="too old"):
                await api.list(SLICES, EndpointSlice)


@pytest.mark.parametrize(
    "content", [b"<html>hello</html>", b'{"metadata": {"resourceVersion": "\xff"}}', b'{"a": ' * 100_000]
)
@pytest.mark.parametrize("status", ["200 OK", "500 Internal Server Error"])
async def test_something_else_than_kubernetes(content: bytes, status: str) -> None:
    """A proxy's page is not an empty cluster, and no text that can't be decoded is a defect."""
    async with scripted(answering(whole(content, status))) as server, KubernetesApi(ClusterAccess(server.url)) as api:
        with pytest.raises(ApiServerAway, match="not Kubernetes'" if status == "200 OK" else "500"):
            await api.list(SLICES, EndpointSlice)


async def test_a_redirect_is_no_watch() -> None:
    """It has no events, and is an error."""
    redirect = b"HTTP/1.1 302 Found\r\nlocation: /login\r\ncontent-length: 0\r\n\r\n"
    async with scripted(answering(redirect)) as server, KubernetesApi(ClusterAccess(server.url)) as api:
        with pytest.raises(ApiServerAway, match="302"):
            await next_type(api, "1")


@pytest.mark.parametrize(
    "status, kind",
    [
        (401, ApiUnauthorized),
        (403, ApiForbidden),
        (404, ApiNotFound),
        (409, ApiConflict),
        (410, ApiExpired),
        (429, ApiThrottled),
        (400, ApiRejected),
        (405, ApiRejected),
        (422, ApiRejected),
        (408, ApiServerFailed),
        (500, ApiServerFailed),
        (503, ApiServerFailed),
        (302, ApiServerAway),
    ],
)
def test_errors_by_status(status: int, kind: type[KubernetesError]) -> None:
    """What is no answer of an API server is a server that is away."""
    assert type(error_of(status, "https://k: list pods", "because", {})) is kind


# Access


def test_access_in_a_pod(tmp_path: Path) -> None:
    """Server, CA, token and namespace are those of the pod."""
    (tmp_path / "namespace").write_text("models\n")
    environment = {"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "443"}
    found = cluster_access(ClusterSettings(), tmp_path / "conf", environment, tmp_path)
    assert found == ClusterAccess("https://[fd00::1]:443", tmp_path / "ca.crt", tmp_path / "token", "models")


def test_configured_access(tmp_path: Path) -> None:
    """The pod's credentials are not sent to another server."""
    environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    (tmp_path / "token").write_text("secret")
    found = cluster_access(ClusterSettings(server="https://k:6443"), tmp_path, environment, tmp_path)
    assert found == ClusterAccess("https://k:6443", None, None, "default")
    settings = ClusterSettings(server="https://k:6443", ca="ca.pem", token_file="t")
    found = cluster_access(settings, tmp_path, {}, tmp_path)
    assert (found.ca, found.token_file) == (tmp_path / "ca.pem", tmp_path / "t")


def test_no_access(tmp_path: Path) -> None:
    """Outside of a pod, the server has to be configured."""
    with pytest.raises(OptionError, match=r"gateway\.kubernetes\.server: is missing"):
        cluster_access(ClusterSettings(), tmp_path, {}, tmp_path)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """Each is a problem at its option."""
    (tmp_path / "ca.pem").write_text("nothing")
    settings = ClusterSettings(server="https://k:6443", ca="ca.pem", token_file="none")
    assert [error.location[-1] for error in access_problems(settings, tmp_path)] == ["ca", "token_file"]
    assert [*access_problems(ClusterSettings(), tmp_path)] == []


async def test_a_watch_ends_with_its_block() -> None:
    """Its connection is closed, and others go on."""
    async with running_cluster() as cluster, api_of(cluster) as api:
        version = (await api.list(SLICES, EndpointSlice)).version
        async with api.watch(SLICES, EndpointSlice, version):
            pass
        async with asyncio.timeout(5):
            await api.list(SLICES, EndpointSlice)
