"""The live configuration: routes are resolved once."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from config.schema import Floor, LimitSettings
from gateway.app import live_config_for
from gateway.errors import NotAllowed, UnknownModel
from gateway.keys import Caller
from gateway.live_config import MAX_ROUTES, LiveConfig
from tests.gateway.fleet import deployment

WAIT_SECONDS = 7.0
ALICE = Caller("alice", aliases=frozenset({"smol", "hopeless", "unknown"}), floor=Floor(top1_agreement=0.95))


def live_config(**changes: Any) -> LiveConfig:
    """The configuration of the tests' gateway, with some top-level tables changed."""
    live = live_config_for(deployment(changes))
    live.limits = LimitSettings(queue_seconds=WAIT_SECONDS)
    return live


def aliases(**options: Any) -> Mapping[str, Any]:
    """One alias with these options."""
    return {"smol": {"ladder": ["hi", "mid", "lo"], "trust_declared": True, **options}}


def test_a_route() -> None:
    """It has the caller, the target, the rungs that satisfy alias and key, and how long its requests may wait."""
    live = live_config()
    route = live.route(ALICE, "smol")
    assert (route.caller, route.target) == (ALICE, live.catalog.resolve("smol"))
    assert [rung.name for rung in route.rungs] == ["hi", "mid"]
    assert route.queue_seconds == WAIT_SECONDS
    assert [rung.name for rung in live.route(Caller(), "smol").rungs] == ["hi", "mid", "lo"]


@pytest.mark.parametrize("queue_seconds", [0.0, 0.5])
def test_the_wait_of_an_alias(queue_seconds: float) -> None:
    """The alias' own wait replaces that of the gateway, also if it is 0."""
    live = live_config(aliases=aliases(timeouts={"queue_seconds": queue_seconds}))
    assert live.route(ALICE, "smol").queue_seconds == queue_seconds


def test_a_route_is_resolved_once() -> None:
    """Every request with one key and alias gets the same route; other keys and aliases have their own."""
    live = live_config()
    route = live.route(ALICE, "smol")
    assert live.route(ALICE, "smol") is route
    anonymous, bob = Caller(), Caller("bob")
    others = {pair: live.route(*pair) for pair in ((anonymous, "smol"), (bob, "smol"), (bob, "lo"))}
    assert len({id(each) for each in (route, *others.values())}) == 4
    assert live.route(ALICE, "smol") is route
    assert all(live.route(*pair) is other for pair, other in others.items())


def test_a_reload_resolves_routes_anew() -> None:
    """After `replace`, a route has the new catalog's target, rungs and wait."""
    live = live_config()
    before = live.route(ALICE, "smol")
    other = live_config(aliases=aliases(ladder=["mid", "lo"]))
    other.limits = LimitSettings(queue_seconds=1.0)
    live.replace(other)
    after = live.route(ALICE, "smol")
    assert after.target is other.catalog.resolve("smol")
    assert ([rung.name for rung in after.rungs], after.queue_seconds) == (["mid"], 1.0)
    assert [rung.name for rung in before.rungs] == ["hi", "mid"]
    live.replace(live_config(aliases=aliases(ladder=["lo"])))
    assert live.route(ALICE, "smol").rungs == ()


def test_another_caller_of_the_same_name_has_its_own_route() -> None:
    """A key that was issued anew under its name, with another floor and other models, is not served from the cache."""
    live = live_config()
    assert [rung.name for rung in live.route(ALICE, "smol").rungs] == ["hi", "mid"]
    anew = replace(ALICE, floor=Floor(top1_agreement=0.99))
    assert [rung.name for rung in live.route(anew, "smol").rungs] == ["hi"]
    assert live.route(anew, "smol").caller is anew
    with pytest.raises(NotAllowed):
        live.route(replace(ALICE, aliases=frozenset({"lo"})), "smol")


def test_models_that_have_no_route() -> None:
    """A model that the key may not use is refused before it is looked up, and an unknown one is not found."""
    live = live_config()
    for _ in range(2):
        for model in ("lo", "no-such-model"):
            with pytest.raises(NotAllowed):
                live.route(ALICE, model)
        with pytest.raises(UnknownModel):
            live.route(ALICE, "unknown")
    assert live.route(ALICE, "hopeless").rungs == ()


def test_routes_are_bounded() -> None:
    """The cache is cleared when it is full."""
    live = live_config()
    first = live.route(ALICE, "smol")
    for number in range(MAX_ROUTES + 10):
        live.route(Caller(f"key-{number}"), "smol")
        assert len(live._routes) <= MAX_ROUTES
    assert live.route(ALICE, "smol") is not first
    assert live.route(ALICE, "smol") == first
