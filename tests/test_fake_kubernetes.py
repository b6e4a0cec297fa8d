"""The fake Kubernetes API server, asked over its socket, steered and killed as a process."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.fakes.kubernetes.running import Action, FakeCluster, running_cluster
from tests.fakes.running import HOST, eventually

SLICES = FakeCluster.path("endpointslices")
WEB = FakeCluster.path("deployments", "web")
PLACES = [(HOST, 8001), (HOST, 8002), (HOST, 8003)]
LABELS = {"quantgate.io/variant": "m-4bit"}


@contextlib.asynccontextmanager
async def client_of(cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {cluster.token_file.read_text()}"}
    async with httpx.AsyncClient(base_url=cluster.url, headers=headers, timeout=20.0) as client:
        yield client


@contextlib.asynccontextmanager
async def watching(client: httpx.AsyncClient, version: str, **more: str) -> AsyncIterator[AsyncIterator[Any]]:
    """The events of a watch of slices."""
    asked = {"watch": "1", "resourceVersion": version, "allowWatchBookmarks": "true", "timeoutSeconds": "60", **more}
    async with client.stream("GET", SLICES, params=asked) as stream:
        assert stream.status_code == 200
        lines = stream.aiter_lines()
        yield (json.loads(line) async for line in lines)


async def version_of(client: httpx.AsyncClient) -> str:
    return str((await client.get(SLICES)).json()["metadata"]["resourceVersion"])


def ready(slices: list[dict[str, Any]]) -> list[int]:
    return sorted(
        each["ports"][0]["port"] for each in slices for endpoint in each["endpoints"] if endpoint["conditions"]["ready"]
    )


async def test_lists_have_pages_and_selectors() -> None:
    """A page says where the next one begins; labels select; a forgotten page is 410."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.add_workload("web", 3, PLACES, labels=LABELS)
        await cluster.add_workload("other", 1, [(HOST, 9000)])
        whole = (await client.get(SLICES, params={"labelSelector": "quantgate.io/variant=m-4bit"})).json()
        assert (whole["kind"], ready(whole["items"])) == ("EndpointSliceList", [8001, 8002, 8003])
        page = (await client.get(SLICES, params={"limit": "3"})).json()
        assert page["metadata"]["remainingItemCount"] == 1
        more = {"limit": "3", "continue": page["metadata"]["continue"]}
        assert len((await client.get(SLICES, params=more)).json()["items"]) == 1
        await cluster.compact()
        gone = await client.get(SLICES, params=more)
        assert (gone.status_code, gone.json()["reason"]) == (410, "Expired")


async def test_scaling_moves_endpoints_through_their_states() -> None:
    """Scaled down, an endpoint is terminating but serving, then gone; scaled up, it starts, then is ready."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.add_workload("web", 1, PLACES[:2], terminating_seconds=0.2, start_seconds=0.2)
        async with watching(client, await version_of(client)) as events:
            await cluster.scale("web", 0)
            states = [await anext(events) for _ in range(2)]
            assert [each["type"] for each in states] == ["MODIFIED", "DELETED"]
            assert states[0]["object"]["endpoints"][0]["conditions"] == {
                "ready": False,
                "serving": True,
                "terminating": True,
            }
            await cluster.scale("web", 1)
            states = [await anext(events) for _ in range(2)]
            assert [(each["type"], ready([each["object"]])) for each in states] == [("ADDED", []), ("MODIFIED", [8001])]
        status = (await client.get(WEB)).json()["status"]
        assert status == {"replicas": 1, "readyReplicas": 1}


async def test_a_stale_version_is_a_conflict() -> None:
    """A merge patch of `scale` carries the version that was read; an older one is 409."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.add_workload("web", 1, PLACES)
        read = (await client.get(f"{WEB}/scale")).json()
        patch = {"metadata": {"resourceVersion": read["metadata"]["resourceVersion"]}, "spec": {"replicas": 2}}
        kind = {"content-type": "application/merge-patch+json"}
        first = await client.patch(f"{WEB}/scale", json=patch, headers=kind)
        assert (first.status_code, first.json()["spec"]["replicas"]) == (200, 2)
        again = await client.patch(f"{WEB}/scale", json=patch, headers=kind)
        assert (again.status_code, again.json()["reason"]) == (409, "Conflict")
        assert (await client.patch(f"{WEB}/scale", json=patch)).status_code == 415
        assert (await client.get(FakeCluster.path("deployments", "no") + "/scale")).status_code == 404


@pytest.mark.parametrize("action", ["cut", "half_line", "end", "expire", "error", "duplicate", "bookmark"])
async def test_streams_have_faults(action: Action) -> None:
    """Each fault shows after the events before it."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.add_workload("web", 0, PLACES)
        async with watching(client, await version_of(client)) as events:
            await cluster.scale("web", 1)
            starting, began = await anext(events), await anext(events)
            assert (starting["type"], began["type"]) == ("ADDED", "MODIFIED")
            await cluster.streams(action)
            if action in ("cut", "half_line"):
                with pytest.raises((httpx.RemoteProtocolError, json.JSONDecodeError)):
                    await anext(events)
            elif action == "end":
                with pytest.raises(StopAsyncIteration):
                    await anext(events)
            else:
                event = await anext(events)
                codes = {"expire": 410, "error": 500}
                assert event["object"].get("code") == codes.get(action)
                assert (event == began) is (action == "duplicate")
                assert (event["type"] == "BOOKMARK") is (action == "bookmark")


@pytest.mark.parametrize("by_event", [False, True])
async def test_a_forgotten_version(by_event: bool) -> None:
    """410 is the status of the watch, or its first event."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        old = await version_of(client)
        await cluster.compact(by_event=by_event)
        answer = await client.get(SLICES, params={"watch": "1", "resourceVersion": old})
        assert answer.status_code == (200 if by_event else 410)
        status = answer.json()["object"] if by_event else answer.json()
        assert (status["code"], status["reason"]) == (410, "Expired")


async def test_requests_are_refused() -> None:
    """Refusals hold for a verb and a resource, so many times; another token is 401."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.refuse(429, times=1, verbs=["list"], retry_after="7")
        refused = await client.get(SLICES)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "7")
        assert (await client.get(SLICES)).status_code == 200
        await cluster.refuse(403, resources=["endpointslices.discovery.k8s.io"])
        assert "cannot list resource" in (await client.get(SLICES)).json()["message"]
        assert (await client.get(FakeCluster.path("deployments"))).status_code == 200
        await cluster.accept()
        await cluster.set_tokens("second")
        assert (await client.get(SLICES)).status_code == 401
        client.headers["authorization"] = "Bearer second"
        assert (await client.get(SLICES)).status_code == 200


async def test_silence() -> None:
    """A silent server takes requests and answers them later."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.silence()
        with pytest.raises(httpx.ReadTimeout):
            await client.get(SLICES, timeout=0.2)
        await cluster.speak()
        assert (await client.get(SLICES)).status_code == 200


@pytest.mark.parametrize("delete_first", [False, True])
async def test_reshuffled_slices(delete_first: bool) -> None:
    """The same endpoints are in other slices; on the way they are in two slices, or in none."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.add_workload("web", 3, PLACES)
        before = await cluster.slices()
        async with watching(client, await version_of(client)) as events:
            await cluster.reshuffle("web", delete_first=delete_first)
            kinds = [(await anext(events))["type"] for _ in range(6)]
        added, deleted = ["ADDED"] * 3, ["DELETED"] * 3
        assert kinds == (deleted + added if delete_first else added + deleted)
        after = await cluster.slices()
        assert ready(after) == ready(before)
        assert {each["metadata"]["name"] for each in after}.isdisjoint(each["metadata"]["name"] for each in before)


async def test_a_killed_server_comes_back_with_what_it_knew() -> None:
    """Objects, versions and history survive, and workloads scale again."""
    async with running_cluster() as cluster, client_of(cluster) as client:
        await cluster.add_workload("web", 1, PLACES)
        old, before = await version_of(client), await cluster.slices()
        await cluster.scale("web", 2)
        await cluster.kill()
        with pytest.raises(httpx.ConnectError):
            await client.get(SLICES)
        await cluster.start()

        async def both() -> bool:
            return ready(await cluster.slices()) == [8001, 8002]

        await eventually(both)
        assert (await cluster.slices())[0] == before[0]
        async with watching(client, old) as events:
            assert (await anext(events))["type"] == "ADDED"
        await cluster.scale("web", 0)
        await eventually(lambda: _none(cluster))


async def _none(cluster: FakeCluster) -> bool:
    return not await cluster.slices()
