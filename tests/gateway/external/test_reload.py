"""A reload of a gateway whose replicas run elsewhere: external models need no start."""

import asyncio

import pytest

from gateway.app import live_config_for
from gateway.deployment import Deployment
from gateway.observability.metrics import Metrics
from gateway.proxy.external_models import ExternalModels, external_model_replicas
from gateway.reload import FollowerReload
from serving.probe import Probe
from serving.registry import Registry
from serving.replica import Replica, State
from serving.watch import Watch
from tests.gateway.external.conftest import tables
from tests.gateway.fleet import deployment

WAIT_SECONDS = 0.3


def with_ladder(*ladder: str, usd_per_day: float | None = None) -> Deployment:
    """A configuration whose alias `smol` has this ladder."""
    changes = tables("http://127.0.0.1:9")
    changes["aliases"] = {"smol": {"ladder": list(ladder)}}
    if usd_per_day is not None:
        changes["variants"]["gpt"]["budget"] = {"usd_per_day": usd_per_day}
    return deployment(changes)


@pytest.mark.parametrize(
    "loaded, usd_per_day, waits",
    [(True, None, False), (True, 1.0, False), (False, None, True), (True, 0.5, True)],
)
async def test_an_alias_moves_onto_a_new_external_model(
    loaded: bool, usd_per_day: float | None, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """At once, unless the model could not answer: then it waits as for a replica, and says so."""
    registry = Registry()
    registry.put(Replica("hi-0", "hi", "bf16", "http://127.0.0.1:9", "hi"), State.READY)
    with ExternalModels(registry, Metrics(), loaded=loaded, spent={"gpt": 0.5}) as models:
        async with Probe() as probe, Watch((), registry, probe, {}) as watch:
            reload = FollowerReload(
                watch,
                None,
                registry,
                live_config_for(with_ladder("hi")),
                lambda to: models.available(external_model_replicas(to.settings.variants)),
                WAIT_SECONDS,
            )
            swapped = asyncio.Event()
            await reload.apply(with_ladder("gpt", usd_per_day=usd_per_day), swapped.set)
    assert swapped.is_set()
    assert any("no ready replica for smol after" in message for message in caplog.messages) == waits
