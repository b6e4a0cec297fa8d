"""What EndpointSlices say about pods, as tables and properties."""

from collections.abc import Mapping, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.kubernetes.endpoints import (
    Conditions,
    Endpoint,
    EndpointSlice,
    PodEndpoint,
    Port,
    SliceMetadata,
    Slices,
    Standing,
    TargetRef,
    applied,
    difference,
    is_doubtful,
    listed,
    pod_endpoints,
    port_number,
    port_problem,
    standing,
)

HTTP = Port("http", 8000)
READY, TERMINATING = Conditions(True, True, False), Conditions(False, True, True)


def slice_of(name: str, *endpoints: Endpoint, ports: tuple[Port, ...] = (HTTP,)) -> EndpointSlice:
    """A slice with one port."""
    return EndpointSlice(SliceMetadata(name), endpoints, ports)


def pod(number: int, conditions: Conditions = READY, address: str | None = None) -> Endpoint:
    """The endpoint of a pod."""
    return Endpoint((address or f"10.0.0.{number}",), conditions, TargetRef(f"pod-{number}", f"uid-{number}"))


def pods(*slices: EndpointSlice, port: int | str | None = None) -> Mapping[str, PodEndpoint]:
    """The pods that slices list."""
    return pod_endpoints(listed(slices), port, "int8")


@pytest.mark.parametrize(
    "ready, serving, terminating, expected",
    [
        (None, None, None, "ready"),
        (True, True, False, "ready"),
        (True, None, None, "ready"),
        (None, None, False, "ready"),
        (False, None, None, "not_ready"),
        (False, False, False, "not_ready"),
        (True, False, False, "not_ready"),  # publishNotReadyAddresses
        (False, True, True, "terminating"),
        (True, True, True, "terminating"),  # publishNotReadyAddresses
        (False, None, True, "terminating"),
        (False, False, True, "not_ready"),
    ],
)
def test_conditions(ready: bool | None, serving: bool | None, terminating: bool | None, expected: Standing) -> None:
    """A missing condition is true, a missing `terminating` false."""
    assert standing(Conditions(ready, serving, terminating)) == expected


def test_an_endpoint_without_conditions_is_ready() -> None:
    """As the API says of a nil value."""
    assert standing(None) == "ready"


@pytest.mark.parametrize(
    "ports, wanted, expected",
    [
        ((HTTP,), None, 8000),
        ((HTTP, Port("metrics", 9000)), None, None),
        ((HTTP, Port("metrics", 9000)), "metrics", 9000),
        ((HTTP,), "metrics", None),
        ((Port("", 8000),), None, 8000),
        ((Port(None, None),), None, None),
        ((HTTP,), 8100, 8100),
        ((), None, None),
        ((), 8100, 8100),
    ],
)
def test_ports(ports: tuple[Port, ...], wanted: int | str | None, expected: int | None) -> None:
    """The only port, the one of that name, or any number."""
    found = slice_of("s", pod(1), ports=ports)
    assert port_number(found, wanted) == expected
    assert (port_problem(listed([found]), wanted) is None) == (expected is not None)


def test_the_problem_of_a_port_names_those_that_there_are() -> None:
    """It says what to write."""
    found = slice_of("qwq-x7", pod(1), ports=(HTTP, Port("metrics", 9000)))
    expected = "the EndpointSlice qwq-x7 has not one port; set `port` to one of: http (8000), metrics (9000)"
    assert port_problem(listed([found]), None) == expected


@pytest.mark.parametrize(
    "slices, expected",
    [
        ([slice_of("a", pod(1)), slice_of("b", pod(1))], "http://10.0.0.1:8000 ready"),
        ([slice_of("a", pod(1, TERMINATING)), slice_of("b", pod(1))], "http://10.0.0.1:8000 ready"),
        ([slice_of("a", pod(1, TERMINATING))], "http://10.0.0.1:8000 terminating"),
        ([slice_of("a", pod(1)), slice_of("b", pod(1, address="fd00::1"))], "http://10.0.0.1:8000 ready"),
        ([slice_of("a", pod(1, address="fd00::1"))], "http://[fd00::1]:8000 ready"),
        (
            [slice_of("a", pod(1, Conditions(False))), slice_of("b", pod(1, address="fd00::1"))],
            "http://[fd00::1]:8000 ready",
        ),
    ],
)
def test_one_pod_in_several_slices(slices: list[EndpointSlice], expected: str) -> None:
    """It is one replica, with the best of its standings, by IPv4 where it has both."""
    found = pods(*slices)
    assert {name: f"{each.url} {each.standing}" for name, each in found.items()} == {"pod-1": expected}


def test_ids() -> None:
    """A replica is named after its pod, or else after its variant and address."""
    assert [*pods(slice_of("a", pod(1), Endpoint(("10.0.0.7",))))] == ["pod-1", "int8-10.0.0.7:8000"]


def test_a_pod_and_its_successor_of_the_same_name() -> None:
    """The ready one counts: they are never two replicas of one id."""
    old = Endpoint(("10.0.0.1",), TERMINATING, TargetRef("qwq-0", "uid-old"))
    new = Endpoint(("10.0.0.2",), READY, TargetRef("qwq-0", "uid-new"))
    assert pods(slice_of("a", old), slice_of("b", new)) == {
        "qwq-0": PodEndpoint("qwq-0", "uid-new", "http://10.0.0.2:8000", "ready")
    }


def test_deleting_a_slice_removes_what_no_other_has() -> None:
    """The other endpoints stay."""
    slices = listed([slice_of("a", pod(1), pod(2)), slice_of("b", pod(2), pod(3))])
    left = applied(slices, "DELETED", slices["a"])
    assert [*pod_endpoints(left, None, "int8")] == ["pod-2", "pod-3"]


def test_a_slice_as_kubernetes_writes_it() -> None:
    """Fields that are not needed are ignored, and those that may be null may be."""
    text = """{
        "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
        "metadata": {"name": "qwq-x7", "labels": {"kubernetes.io/service-name": "qwq"}, "resourceVersion": "7"},
        "endpoints": [{
            "addresses": ["10.0.0.1"], "nodeName": "n", "zone": "z", "hints": {"forZones": [{"name": "z"}]},
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "targetRef": {"kind": "Pod", "namespace": "d", "name": "qwq-5", "uid": "u"}
        }],
        "ports": [{"name": "", "protocol": "TCP", "port": 8000}]
    }"""
    found = msgspec.json.decode(text, type=EndpointSlice)
    assert pods(found) == {"qwq-5": PodEndpoint("qwq-5", "u", "http://10.0.0.1:8000", "ready")}
    empty = msgspec.json.decode('{"metadata": {"name": "e"}, "endpoints": null, "ports": null}', type=EndpointSlice)
    assert pods(empty) == {}


# Properties

CONDITIONS = st.sampled_from([READY, TERMINATING, Conditions(False, False, False)])
ENDPOINTS = st.lists(st.builds(pod, st.integers(1, 5), CONDITIONS), max_size=4)
SLICES = st.dictionaries(st.sampled_from("abcd"), ENDPOINTS, max_size=4)
EVENTS = st.lists(st.tuples(st.sampled_from(["ADDED", "MODIFIED", "DELETED"]), st.sampled_from("abcd"), ENDPOINTS))


def after(slices: Slices, events: Sequence[tuple[str, str, list[Endpoint]]]) -> Slices:
    """The slices after events."""
    for kind, name, endpoints in events:
        slices = applied(slices, kind, slice_of(name, *endpoints))
    return slices


@given(SLICES, st.randoms(use_true_random=False))
def test_order_does_not_matter(described: dict[str, list[Endpoint]], random: object) -> None:
    """Neither that of slices nor that of endpoints, nor how they are distributed over slices."""
    slices = [slice_of(name, *endpoints) for name, endpoints in described.items()]
    shuffled = [slice_of(each.metadata.name, *reversed(each.endpoints or ())) for each in reversed(slices)]
    one = slice_of("all", *[endpoint for each in slices for endpoint in each.endpoints or ()])
    assert pods(*slices) == pods(*shuffled) == pods(one)


@given(SLICES, EVENTS)
def test_an_event_twice_is_an_event_once(
    described: dict[str, list[Endpoint]], events: list[tuple[str, str, list[Endpoint]]]
) -> None:
    """Each event may come again at once, as after a watch that was cut."""
    before = listed(slice_of(name, *endpoints) for name, endpoints in described.items())
    assert after(before, events) == after(before, [each for each in events for _ in range(2)])


@given(EVENTS, st.integers(0, 20))
def test_a_list_at_any_point_is_the_same_picture(events: list[tuple[str, str, list[Endpoint]]], at: int) -> None:
    """Events, and a list in between with the rest of the events, lead to the same pods."""
    between = listed(after({}, events[:at]).values())
    assert after(between, events[at:]) == after({}, events)


@given(EVENTS, EVENTS)
def test_a_difference_leads_from_one_picture_to_the_other(
    first: list[tuple[str, str, list[Endpoint]]], second: list[tuple[str, str, list[Endpoint]]]
) -> None:
    """Whoever applies it has what there is now; equal pictures have none."""
    before, now = (pod_endpoints(after({}, events), None, "int8") for events in (first, second))
    changes = difference(before, now)
    kept = {name: each for name, each in before.items() if each not in changes.gone}
    assert {**kept, **{each.id: each for each in changes.changed}} == now
    assert difference(now, now) == difference({}, {})


@pytest.mark.parametrize(
    "before, now, doubtful",
    [
        ([pod(1)], [], True),
        ([pod(1), pod(2)], [pod(2)], False),
        ([pod(1, TERMINATING)], [], False),
        ([], [], False),
        ([pod(1)], [pod(1, TERMINATING)], False),
    ],
)
def test_an_empty_list(before: list[Endpoint], now: list[Endpoint], doubtful: bool) -> None:
    """It is doubtful only where pods were ready."""
    assert is_doubtful(pods(slice_of("a", *before)), pods(slice_of("a", *now))) == doubtful
