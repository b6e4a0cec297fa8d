"""Replicas that rollouts want beside the configured ones."""

import pytest

from config.schema import ReplicaSettings
from serving.state.database import StateDatabase
from serving.state.demands import DemandFollower, with_demands
from serving.state.link import Link
from serving.state.rollout_records import Change, Demand
from serving.state.rollouts import RolloutDatabase
from tests.serving.state.databases import PostgreSQL, away
from tests.serving.state.test_rollouts import FIRST, entry

OLD = ReplicaSettings(variant="old", count=2, port=9000)
OWN = ReplicaSettings(variant="new", max_model_len=1024)
URL = ReplicaSettings(variant="new", url="http://10.0.0.1:8000")
VARIANTS = ("old", "new")


def demand(variant: str, *, run: bool, modeled_on: str = "old") -> Demand:
    return Demand(variant, modeled_on, run, "r-1")


@pytest.mark.parametrize(
    "configured, demands, expected",
    [
        ((OLD,), (), [("old", 2, 9000)]),
        ((OLD,), (demand("new", run=True),), [("old", 2, 9000), ("new", 2, None)]),
        ((OLD, OWN), (demand("new", run=True),), [("old", 2, 9000), ("new", 1, None)]),
        ((OLD, URL), (demand("new", run=True),), [("old", 2, 9000), ("new", 1, None)]),
        ((OLD,), (demand("new", run=True), demand("old", run=False)), [("new", 2, None)]),
        ((OLD, OWN), (demand("new", run=False),), [("old", 2, 9000)]),
        ((OLD, URL), (demand("new", run=False),), [("old", 2, 9000), ("new", 1, None)]),
        ((OLD,), (demand("gone", run=True),), [("old", 2, 9000)]),
        (
            (OLD,),
            (demand("new", run=True), demand("old", run=True, modeled_on="old")),
            [("old", 2, 9000), ("new", 2, None)],
        ),
    ],
)
def test_what_runs(
    configured: tuple[ReplicaSettings, ...], demands: tuple[Demand, ...], expected: list[tuple[str, int, int | None]]
) -> None:
    """A new variant runs like the old one, the old one leaves, and what has a url belongs to somebody else."""
    wanted = with_demands(configured, demands, VARIANTS)
    assert [(each.variant, each.count, each.port) for each in wanted] == expected
    assert with_demands(wanted, demands, VARIANTS) == wanted


@pytest.mark.parametrize("stopped", [True, False], ids=["done", "in a rollout"])
def test_a_variant_after_the_next(state: str, stopped: bool) -> None:
    """A variant without an entry may replace one that has none either, and be replaced by it again."""
    database = RolloutDatabase(StateDatabase.at(state))
    database.start(FIRST, entry())
    demands = [demand("new", run=True), demand("old", run=False, modeled_on="new")]
    demands += [demand("newer", run=True, modeled_on="new")]
    demands += [demand("new", run=False, modeled_on="newer")] if stopped else []
    demands += [demand("new", run=True, modeled_on="newer"), demand("newer", run=True, modeled_on="newer")]
    for version, each in enumerate(demands):
        database.change("r-1", version, Change("{}", "starting", True, (entry(),), demands=(each,)), "d", 0.0, None)
    pinned = OLD.model_copy(update={"cores": "0"})
    wanted = with_demands((pinned,), database.snapshot().demands, (*VARIANTS, "newer"))
    assert [(each.variant, each.count, each.cores) for each in wanted] == [("new", 2, None), ("newer", 2, None)]
    database.database.close()


def test_what_leads_nowhere() -> None:
    """Demands that name each other start nothing."""
    circle = (demand("new", run=True, modeled_on="newer"), demand("newer", run=True, modeled_on="new"))
    assert with_demands((OLD,), circle, (*VARIANTS, "newer")) == (OLD,)


async def test_demands_are_followed(state: str) -> None:
    """A change is told once."""
    follower = await DemandFollower.read(state)
    assert list(follower.current) == []
    database = RolloutDatabase(StateDatabase.at(state))
    database.start(FIRST, entry())
    assert not await follower.follow()
    start = demand("new", run=True)
    database.change("r-1", 0, Change("{}", "starting", True, (entry(),), demands=(start,)), "d", 0.0, None)
    assert await follower.follow()
    assert follower.current == (start,)
    assert not await follower.follow()
    assert follower.link is not None
    follower.link.close()
    database.database.close()


async def test_the_last_demands_stay(postgresql: PostgreSQL) -> None:
    """A database that is away stops and starts nothing."""
    state = postgresql.new_database()
    database = RolloutDatabase(StateDatabase.at(state))
    database.start(FIRST, entry())
    start = demand("new", run=True)
    database.change("r-1", 0, Change("{}", "starting", True, (entry(),), demands=(start,)), "d", 0.0, None)
    database.database.close()
    follower = await DemandFollower.read(state)
    with away(postgresql, "stopped"):
        assert not await follower.follow()
    assert follower.current == (start,)
    assert isinstance(follower.link, Link)
    follower.link.close()
