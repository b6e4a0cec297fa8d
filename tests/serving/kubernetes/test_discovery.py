"""Pods of a fake cluster become replicas, and stay what they are whatever the API server does."""

import logging
from dataclasses import replace

import pytest

from config.golden import GoldenAnswer
from serving.kubernetes.discovery import Discovery
from serving.kubernetes.reflector import UNPRODUCTIVE_WATCHES
from serving.replica import Replica, State
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.serving.kubernetes.faults import compact, refuse
from tests.serving.kubernetes.pods import SERVICE, Scene, addresses, discovering, pods, slice_of, sources

GOLDEN = GoldenAnswer((65, 66, 67), (-1.0, -1.0))  # the log-probabilities of the fake


async def settled(scene: Scene, *fakes: FakeReplica) -> None:
    """Return when exactly these servers are ready."""
    await eventually(lambda: scene.ready() == {fake.url for fake in fakes})


async def test_pods_come_and_go() -> None:
    """A pod is a replica with its name once it is verified; one that terminates drains, and is then gone."""
    async with pods(2) as (one, two), discovering() as scene:
        await scene.cluster.add_workload(SERVICE, 1, addresses((one, two)), terminating_seconds=0.3)
        await settled(scene, one)
        first = scene.registry.snapshot()[0]
        assert first.replica.id.startswith(f"{SERVICE}-")
        assert (first.replica.served_name, first.source) == ("m1", "kubernetes")
        assert one.requests("/v1/models")
        await scene.cluster.scale(SERVICE, 2)
        await settled(scene, one, two)
        await scene.cluster.scale(SERVICE, 0)
        await eventually(lambda: not scene.registry.snapshot())
        expected = [State.STARTING, State.READY, State.DRAINING]
        assert [*scene.states.values()] == [expected, expected]


async def test_a_pod_that_starts() -> None:
    """It is a replica that is starting, which nobody asks, until Kubernetes says that it is ready."""
    async with pods(1) as (one,), discovering() as scene:
        await scene.cluster.add_workload(SERVICE, 0, addresses((one,)), start_seconds=0.5)
        before = len(one.requests("/health"))
        await scene.cluster.scale(SERVICE, 1)
        (status,) = await eventually(scene.registry.snapshot)
        assert (status.state, status.reason) == (State.STARTING, "its pod is not ready")
        assert len(one.requests("/health")) == before
        await settled(scene, one)


async def test_a_pod_with_another_model() -> None:
    """Kubernetes finds it ready; its golden prompt differs, so it gets no request."""
    wrong_model = ("--fake-logprob-shift", "0.3")
    async with (
        running_fake(*wrong_model) as wrong,
        running_fake() as right,
        discovering(goldens={"int8": GOLDEN}) as scene,
    ):
        await scene.cluster.add_workload(SERVICE, 2, addresses((wrong, right)))
        await settled(scene, right)
        await eventually(lambda: [each for each in scene.registry.snapshot() if "golden" in each.reason])
        (rejected,) = [each for each in scene.registry.snapshot() if each.replica.url == wrong.url]
        assert rejected.state is State.FAILED


async def test_a_request_in_flight_is_waited_for() -> None:
    """The entry of a pod that is gone stays until it is idle, whether it was terminating before or not."""
    async with pods(1) as (one,), discovering(removal_seconds=0.0) as scene:
        await scene.cluster.add_workload(SERVICE, 1, addresses((one,)))
        await settled(scene, one)
        (status,) = scene.registry.snapshot()
        scene.registry.take(status.replica.id)
        await scene.cluster.scale(SERVICE, 0)
        await eventually(lambda: scene.registry.status(status.replica.id).reason == "its pod is gone")
        assert scene.registry.status(status.replica.id).state is State.DRAINING
        scene.registry.give_back(status.replica.id)
        await eventually(lambda: not scene.registry.snapshot())


@pytest.mark.parametrize("delete_first", [False, True])
@pytest.mark.parametrize("duplicated", [False, True])
async def test_other_slices(delete_first: bool, duplicated: bool) -> None:
    """Pods that are listed in other slices stay ready, also if they are in none for a moment, or in two."""
    async with pods(2) as (one, two), discovering() as scene:
        await scene.cluster.add_workload(SERVICE, 2, addresses((one, two)))
        await settled(scene, one, two)
        for size in (2, 1):
            await scene.cluster.reshuffle(
                SERVICE, endpoints_per_slice=size, delete_first=delete_first, duplicated=duplicated
            )
        await caught_up(scene)
        assert [*scene.states.values()] == [[State.STARTING, State.READY]] * 2


async def caught_up(scene: Scene) -> None:
    """Return when the discovery has seen all events so far."""
    counts = scene.discovery.statuses[0].counts
    before = counts.events["bookmark"]
    await scene.cluster.streams("bookmark")
    await eventually(lambda: counts.events["bookmark"] > before)


async def test_pods_that_left_while_the_history_was_forgotten() -> None:
    """A new list says so: no event does."""
    async with pods(2) as (one, two), discovering() as scene:
        await scene.cluster.add_workload(SERVICE, 2, addresses((one, two)))
        await settled(scene, one, two)
        await refuse(503)(scene.cluster)
        await scene.cluster.scale(SERVICE, 1)
        await compact(by_event=False)(scene.cluster)
        await settled(scene, one)
        await eventually(lambda: len(scene.registry.snapshot()) == 1)
        assert scene.discovery.statuses[0].counts.errors["expired"]


async def test_an_api_server_that_lost_its_data() -> None:
    """An empty list is not believed while the pods answer, also when others come; those that do not are removed."""
    async with pods(3) as (one, two, three), discovering() as scene:
        await scene.cluster.add_workload(SERVICE, 2, addresses((one, two)))
        await settled(scene, one, two)
        await scene.cluster.kill()
        (scene.cluster.folder / "state").unlink()
        scene.cluster.workloads.clear()
        errors = scene.discovery.statuses[0].counts.errors
        await eventually(lambda: errors["away"] > UNPRODUCTIVE_WATCHES)
        await scene.cluster.start()
        await eventually(lambda: scene.discovery.statuses[0].unlisted == 2)
        assert scene.ready() == {one.url, two.url}
        one.process.kill()
        await settled(scene, two)
        await eventually(lambda: len(scene.registry.snapshot()) == 1)
        assert scene.discovery.statuses[0].unlisted == 1
        await scene.cluster.add_workload(SERVICE, 1, addresses((three,)))
        await settled(scene, two, three)
        two.process.kill()
        await settled(scene, three)
        assert scene.discovery.statuses[0].unlisted == 0


async def test_what_is_missing_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A role without the verb is told apart from a server that is away, once."""
    with caplog.at_level(logging.WARNING):
        async with discovering() as scene:
            await refuse(403)(scene.cluster)
            away = await eventually(scene.discovery.away)
            assert "endpointslices of discovery.k8s.io in the namespace default: 403" in away
            assert "(since 20" in away
            errors = scene.discovery.statuses[0].counts.errors
            await eventually(lambda: errors["forbidden"] > 3)
    assert len([each for each in caplog.messages if "add the verb" in each]) <= 2  # one for each verb


async def test_an_id_that_another_source_has(caplog: pytest.LogCaptureFixture) -> None:
    """Its replica stays as it is, which is logged once."""
    async with pods(1) as (one,), discovering() as scene:
        own = Replica("qwq-0", "own", "int8", "http://127.0.0.1:1", "own")
        scene.registry.source("supervisor").put(own, State.READY)
        endpoint = {"addresses": ["127.0.0.1"], "targetRef": {"name": "qwq-0", "uid": "u"}}
        document = {
            "metadata": {"name": "by-hand", "labels": {"kubernetes.io/service-name": SERVICE}},
            "addressType": "IPv4",
            "endpoints": [endpoint],
            "ports": [{"port": one.port}],
        }
        await scene.cluster.create("endpointslices", document)
        await eventually(lambda: "'qwq-0' belongs to the source 'supervisor'" in caplog.text)
        await scene.cluster.delete("endpointslices", "by-hand")
        await caught_up(scene)
        (status,) = scene.registry.snapshot()
        assert status.replica == own


async def test_another_pod_of_the_same_name() -> None:
    """It is verified, although its address is the same."""
    async with pods(1) as (one,), discovering(removal_seconds=0.0) as scene:
        endpoint = {"addresses": ["127.0.0.1"], "targetRef": {"name": "qwq-0", "uid": "first"}}
        document = {
            "metadata": {"name": "by-hand", "labels": {"kubernetes.io/service-name": SERVICE}},
            "addressType": "IPv4",
            "endpoints": [endpoint],
            "ports": [{"port": one.port}],
        }
        await scene.cluster.create("endpointslices", document)
        await settled(scene, one)
        path = scene.cluster.path("endpointslices", "by-hand")
        await scene.cluster.patch(path, {"endpoints": [{**endpoint, "targetRef": {"name": "qwq-0", "uid": "second"}}]})
        await one.requested("/v1/models", 2)
        await settled(scene, one)
        assert [*scene.states] == ["qwq-0"]


async def test_a_changed_entry() -> None:
    """Its pods are verified again; those of an entry that is gone drain."""
    async with pods(1) as (one,), discovering() as scene:
        await scene.cluster.add_workload(SERVICE, 1, addresses((one,)))
        await settled(scene, one)
        (changed,) = [replace(each, pod=replace(each.pod, max_in_flight=7)) for each in sources()]
        await scene.discovery.add((changed,), {})
        await eventually(lambda: any(each.replica.max_in_flight == 7 for each in scene.registry.snapshot()))
        await settled(scene, one)
        assert len(scene.cluster.requests("endpointslices", watches=True)) == 1
        scene.discovery.keep_only(())
        await eventually(lambda: not scene.registry.snapshot())
        assert scene.discovery.statuses == ()


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("entry", [{"namespace": "default"}, {"selector": f"app={SERVICE}"}, {"port": "http"}])
async def test_another_entry_with_the_same_pods(entry: dict[str, str], waits: bool) -> None:
    """They stay ready, whether the new entry has been listed when the old one goes, or not."""
    async with pods(1) as (one,), discovering() as scene:
        await scene.cluster.create("endpointslices", slice_of("by-hand", SERVICE, "u", one))
        await settled(scene, one)
        new = sources(**entry)
        await scene.discovery.add(new, {})
        if waits:
            await eventually(lambda: not scene.discovery.leaving())
        scene.discovery.keep_only(new)
        await eventually(lambda: [each.source for each in scene.discovery.statuses] == [*new])
        await one.requested("/health", len(one.requests("/health")) + 3)
        assert scene.states == {"qwq-0": [State.STARTING, State.READY]}
        await scene.cluster.delete("endpointslices", "by-hand")
        await eventually(lambda: not scene.registry.snapshot())


async def test_another_entry_while_the_api_server_is_away() -> None:
    """What the old one has found stays until the new one is listed."""
    async with pods(1) as (one,), discovering() as scene:
        await scene.cluster.create("endpointslices", slice_of("by-hand", SERVICE, "u", one))
        await settled(scene, one)
        await scene.cluster.kill()
        new = sources(namespace="default")
        await scene.discovery.add(new, {})
        scene.discovery.keep_only(new)
        await eventually(lambda: scene.discovery.statuses[-1].counts.errors["away"] > 2)
        assert scene.ready() == {one.url}
        await scene.cluster.start()
        await eventually(lambda: len(scene.discovery.statuses) == 1)
        assert scene.states == {"qwq-0": [State.STARTING, State.READY]}


@pytest.mark.parametrize("pod", ["qwq-0", ""])
async def test_an_entry_of_another_variant(pod: str) -> None:
    """Its pods are verified before the change, and change with it."""
    async with pods(1) as (one,), discovering() as scene:
        await scene.cluster.create("endpointslices", slice_of("by-hand", SERVICE, "u", one, pod))
        await settled(scene, one)
        new, ready = sources("int4"), scene.registry.ready
        await scene.discovery.add(new, {})
        registry = scene.discovery.successors if pod else scene.registry
        await eventually(lambda: registry.ready.get("int4"))
        assert ready.get("int8")
        scene.discovery.keep_only(new)
        assert ready.get("int4")
        await eventually(lambda: not ready.get("int8"))
        await eventually(lambda: len(scene.registry.snapshot()) == 1)
        assert scene.ready() == {one.url}


async def test_two_pods_of_one_name(caplog: pytest.LogCaptureFixture) -> None:
    """The first entry has the id, which is logged; when its pod is gone, the other one is verified."""
    async with pods(2) as (one, two), discovering(*sources(), *sources("int4", service="other")) as scene:
        await scene.cluster.create("endpointslices", slice_of("second", "other", "two", two))
        await settled(scene, two)
        await scene.cluster.create("endpointslices", slice_of("first", SERVICE, "one", one))
        await settled(scene, one)
        assert "another pod of that name is found for int4" in caplog.text
        await scene.cluster.delete("endpointslices", "first")
        await settled(scene, two)
        assert scene.registry.ready.keys() == {"int4"}


async def test_pods_of_another_namespace() -> None:
    """Their ids have its name: the gateway's own may have pods of the same names."""
    async with pods(2) as (one, two), discovering(*sources(), *sources(namespace="models")) as scene:
        await scene.cluster.create("endpointslices", slice_of("first", SERVICE, "one", one))
        await scene.cluster.create("endpointslices", slice_of("second", SERVICE, "two", two), namespace="models")
        await settled(scene, one, two)
        assert [each.replica.id for each in scene.registry.snapshot()] == ["qwq-0", "qwq-0.models"]


async def test_a_port_that_is_not_clear(caplog: pytest.LogCaptureFixture) -> None:
    """The log says which there are; with its name, the pods are found."""
    async with pods(1) as (one,), discovering() as scene:
        document = {
            "metadata": {"name": "two-ports", "labels": {"kubernetes.io/service-name": SERVICE}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": ["127.0.0.1"]}],
            "ports": [{"name": "http", "port": one.port}, {"name": "metrics", "port": 9}],
        }
        await scene.cluster.create("endpointslices", document)
        await eventually(lambda: "set `port` to one of: http" in caplog.text)
        assert scene.discovery.statuses[0].problem
        await scene.discovery.add(sources(port="http"), {})
        await settled(scene, one)
        assert scene.registry.snapshot()[0].replica.id == f"int8-127.0.0.1:{one.port}"


async def test_without_entries_no_cluster_is_needed() -> None:
    """Access is looked up for the first entry only."""
    async with discovering() as scene:

        def no_access() -> None:
            raise AssertionError

        async with Discovery(scene.registry, scene.discovery.probe, no_access) as idle:  # type: ignore[arg-type]
            await idle.add((), {})
            assert (idle.statuses, idle.away()) == ((), None)
