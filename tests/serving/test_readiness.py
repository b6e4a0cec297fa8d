"""When a gateway knows its replicas well enough to take over."""

import pytest

from serving.errors import TakeoverRefused
from serving.readiness import unverified, verified_replicas
from serving.registry import Registry
from serving.replica import CONFIGURATION, STATE_DATABASE, Replica, State


def registry(**replicas: tuple[str, State]) -> Registry:
    """A registry with replicas, by source and state."""
    made = Registry()
    for name, (source, state) in replicas.items():
        made.source(source).put(Replica(name, "hi", "bf16", "http://127.0.0.1:9", "m1"), state, "a reason")
    return made


@pytest.mark.parametrize(
    "replicas, awaited, reason",
    [
        ({"a": (CONFIGURATION, State.READY)}, (), ""),
        ({"a": (CONFIGURATION, State.READY)}, ("a", "removed from the configuration"), ""),
        ({"a": (CONFIGURATION, State.READY), "b": (CONFIGURATION, State.FAILED)}, (), ""),
        (
            {"a": (CONFIGURATION, State.READY), "b": (CONFIGURATION, State.FAILED)},
            ("b",),
            "replica b is failed here (a reason)",
        ),
        (
            {"a": (CONFIGURATION, State.READY), "b": (CONFIGURATION, State.STARTING)},
            (),
            "replica b is starting here (a reason)",
        ),
        ({"a": (STATE_DATABASE, State.READY), "b": (STATE_DATABASE, State.STARTING)}, (), ""),
        ({"a": (CONFIGURATION, State.FAILED)}, (), "no replica is ready here"),
        ({}, (), "no replica is ready here"),
    ],
)
def test_reasons(replicas: dict[str, tuple[str, State]], awaited: tuple[str, ...], reason: str) -> None:
    """Each configured replica is reached or has failed, what was ready is ready, and one at least is."""
    assert unverified(registry(**replicas).snapshot(), frozenset(awaited), required=True) == reason


def test_no_replica_is_needed() -> None:
    """A gateway of external models has none."""
    assert unverified((), frozenset(), required=False) == ""


async def test_time() -> None:
    """Replicas that are not ready in time end the takeover, with the reason."""
    with pytest.raises(TakeoverRefused, match=r"no replica is ready here after 0\.01 s; the gateway that runs goes on"):
        async with verified_replicas(Registry(), frozenset(), required=True, within_seconds=0.01):
            pass
