"""Rungs with several members: requests wait for the member that they are drawn to."""

import asyncio

from config.schema import NO_FLOOR
from gateway.proxy.leases import Lease
from gateway.routing.request import RoutingRequest
from gateway.routing.split import Rung, RungWeights, choose_member
from gateway.routing.target import Target
from tests.gateway.proxy.dispatching import HI, LO, DispatcherHarness, end, lease_or_wait, running_dispatcher, settle

SPLIT = Rung("best", ((HI, 0.5), (LO, 0.5)))
SPLIT_TARGET = Target("smol", (SPLIT,), NO_FLOOR, pinned=False)
ON_HI = next(str(number) for number in range(99) if choose_member(SPLIT, str(number)) is HI)
ON_LO = next(str(number) for number in range(99) if choose_member(SPLIT, str(number)) is LO)


def split_lease(harness: DispatcherHarness, session: str) -> "asyncio.Task[Lease]":
    """Ask for a replica of a rung with two members."""
    dispatcher = harness.dispatcher
    request = RoutingRequest(SPLIT_TARGET, (SPLIT,), dispatcher.next_turn(), session=session, key=session)
    return asyncio.get_running_loop().create_task(lease_or_wait(dispatcher, request, 100.0))


async def test_requests_wait_for_the_member_that_they_are_drawn_to() -> None:
    """A free slot of one member goes past the requests of the other one, whoever came first."""
    async with running_dispatcher() as harness:
        harness.add("hi-0")
        harness.add("lo-0")
        running = [split_lease(harness, ON_HI), split_lease(harness, ON_LO)]
        await settle()
        waiting = [split_lease(harness, ON_HI), split_lease(harness, ON_LO)]
        await settle()
        end(running[1].result())
        await settle()
        assert [task.done() for task in waiting] == [False, True]
        assert waiting[1].result().replica.id == "lo-0"
        end(running[0].result())
        await settle()
        assert waiting[0].result().replica.id == "hi-0"
        for task in waiting:
            end(task.result())


async def test_a_waiting_request_follows_new_weights() -> None:
    """A request that waits for a member whose weight becomes 0 is leased the other one."""
    live = [RungWeights()]
    async with running_dispatcher(weights=lambda: live[0]) as harness:
        harness.add("hi-0")
        harness.add("lo-0")
        running = [split_lease(harness, ON_HI), split_lease(harness, ON_LO)]
        await settle()
        waiting = split_lease(harness, ON_LO)
        await settle()
        live[0] = RungWeights(1, {("smol", "best"): {"hi": 1.0}})
        end(running[1].result())  # a slot of the member that is no longer drawn
        await settle()
        assert not waiting.done()
        end(running[0].result())
        await settle()
        assert waiting.result().replica.id == "hi-0"
        end(waiting.result())
