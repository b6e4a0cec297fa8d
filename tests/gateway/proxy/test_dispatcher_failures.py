"""The dispatcher and replicas that are overloaded, or fail."""

import asyncio

import pytest

from config.schema import RetrySettings
from serving.replica import State
from tests.gateway.proxy.dispatching import DispatcherHarness, end, ended_by_timer, running_dispatcher, settle

# Overloaded replicas


async def test_an_overloaded_replica_is_spared() -> None:
    """Requests go to another replica or wait; an answer of the replica ends that at once."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=9)
        first, second = await harness.lease_now(), await harness.lease_now()
        end(first, "refused")
        (waiting,) = await harness.start_many(1)
        assert not waiting.done()
        harness.add("hi-1")
        await settle()
        assert waiting.result().replica.id == "hi-1"
        end(second)
        after = await harness.lease_now()
        assert after.replica.id == "hi-0"
        end(after)
        end(waiting.result())


@pytest.mark.parametrize("retry_after_seconds, seconds", [(None, 0.25), (3.0, 3.0), (600.0, 10.0)])
async def test_for_how_long_an_overloaded_replica_is_spared(retry_after_seconds: float | None, seconds: float) -> None:
    """Its Retry-After counts, up to a limit."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=9)
        harness.add("hi-1", max_in_flight=9)
        first = await harness.lease_now()
        end(first, "refused", retry_after_seconds)
        overloaded = first.replica.id
        chosen = []
        for now in (0.0, seconds - 0.01, seconds, seconds):
            harness.now[0] = now
            lease = await harness.lease_now()
            chosen.append(lease.replica.id == overloaded)
            end(lease, "abandoned")
        assert chosen[:2] == [False, False]
        assert any(chosen[2:])


async def test_the_limit_of_an_overloaded_replica_is_learned() -> None:
    """After an answer of a replica that refused, it gets one more request, and not the whole queue."""
    async with running_dispatcher() as harness:
        harness.add(max_in_flight=99)
        leases = [await harness.lease_now() for _ in range(6)]
        for lease in leases[2:]:
            end(lease, "refused")
        tasks = await harness.start_many(9)
        assert harness.in_flight() == {"hi-0": 2}
        end(leases[0])
        await settle()
        assert harness.in_flight() == {"hi-0": 2}
        harness.now[0] = 5.0
        end(leases[1])
        await settle()
        assert harness.in_flight() == {"hi-0": 3}
        while tasks:
            running = [task for task in tasks if task.done()]
            tasks = [task for task in tasks if not task.done()]
            for task in running:
                end(task.result())
            await settle()


async def test_the_end_of_an_overload_serves_the_queue() -> None:
    """The timer alone does it; nothing else happens."""
    async with running_dispatcher() as harness:
        harness.add(max_in_flight=9)
        end(await harness.lease_now(), "refused", 0.01)
        (task,) = await harness.start_many(1)
        assert not task.done()
        harness.now[0] = 1.0
        await ended_by_timer(task)
        end(task.result())


# Failing replicas


async def fail(harness: DispatcherHarness, name: str, times: int = 3) -> None:
    """Have a replica fail several times in a row; leases that other replicas get meanwhile are abandoned."""
    others = []
    while times:
        lease = await harness.lease_now()
        if lease.replica.id == name:
            end(lease, "failed")
            times -= 1
        else:
            others.append(lease)
    for lease in others:
        end(lease, "abandoned")


async def chosen_replicas(harness: DispatcherHarness, count: int = 6) -> set[str]:
    """The replicas that get the next requests, all at once."""
    leases = [await harness.lease_now() for _ in range(count)]
    for lease in leases:
        end(lease, "abandoned")
    return {lease.replica.id for lease in leases}


async def test_a_failing_replica_is_barred_and_comes_back() -> None:
    """Three failures open its breaker; later one request probes it, and a success closes it."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=99)
        harness.add("hi-1", max_in_flight=99)
        await fail(harness, "hi-0", 2)
        assert await chosen_replicas(harness) == {"hi-0", "hi-1"}
        await fail(harness, "hi-0", 1)
        assert harness.dispatcher.breaker_states() == {"hi-0": "open"}
        assert await chosen_replicas(harness) == {"hi-1"}
        harness.now[0] = 1.0
        leases = [await harness.lease_now() for _ in range(6)]
        probes = [lease for lease in leases if lease.replica.id == "hi-0"]
        assert len(probes) == 1
        for lease in leases:
            end(lease)
        assert harness.dispatcher.breaker_states() == {"hi-0": "closed"}
        assert await chosen_replicas(harness) == {"hi-0", "hi-1"}


async def test_an_abandoned_probe_is_followed_by_another() -> None:
    """A client that leaves before its probe has an outcome leaves the breaker half-open."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=99)
        harness.add("hi-1", max_in_flight=99)
        await fail(harness, "hi-0")
        harness.now[0] = 1.0
        for _ in range(3):
            leases = [await harness.lease_now() for _ in range(4)]
            assert sorted(lease.replica.id for lease in leases).count("hi-0") == 1
            for lease in leases:
                end(lease, "abandoned")


async def test_the_end_of_another_request_does_not_end_the_probe() -> None:
    """A request from before the breaker opened may end while the probe runs: no second probe is sent."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=99)
        harness.add("hi-1", max_in_flight=99)
        early = [await harness.lease_now() for _ in range(2)]
        await fail(harness, "hi-0")
        harness.now[0] = 1.0
        leases = [await harness.lease_now() for _ in range(4)]
        assert [lease.replica.id for lease in leases].count("hi-0") == 1
        for lease in early:
            end(lease, "abandoned")
        assert await chosen_replicas(harness) == {"hi-1"}
        for lease in leases:
            end(lease, "abandoned")


async def test_waiting_for_a_probe_does_not_spin() -> None:
    """While a probe runs and all other replicas are full, the timer is set to when something can change."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=99)
        harness.add("hi-1", max_in_flight=4)
        await fail(harness, "hi-0")
        harness.now[0] = 1.0
        leases = [await harness.lease_now() for _ in range(5)]
        (waiting,) = await harness.start_many(1)
        timer = harness.dispatcher._timer
        assert timer is not None
        assert timer.when() - asyncio.get_running_loop().time() > 1
        waiting.cancel()
        for lease in leases:
            end(lease, "abandoned")


async def test_replicas_behind_open_breakers_are_the_last_resort() -> None:
    """If all replicas fail, the least bad of them is asked all the same."""
    async with running_dispatcher() as harness:
        for number in range(3):
            harness.add(f"hi-{number}", max_in_flight=99)
        for number in range(3):
            harness.now[0] += 0.1
            await fail(harness, f"hi-{number}")
        assert set(harness.dispatcher.breaker_states().values()) == {"open"}
        assert len(await chosen_replicas(harness)) >= 1


async def test_a_replica_that_comes_back_has_no_breaker() -> None:
    """Failures of requests to the old replica count for nothing while it is away."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_in_flight=9)
        leases = [await harness.lease_now() for _ in range(6)]
        for lease in leases[:3]:
            end(lease, "failed")
        assert harness.dispatcher.breaker_states() == {"hi-0": "open"}
        harness.add("hi-0", State.STARTING, 9)
        for lease in leases[3:]:
            end(lease, "failed")
        harness.add("hi-0", State.READY, 9)
        assert harness.dispatcher.breaker_states() == {}


# Retries


async def test_retry_refusal() -> None:
    """No third replica for a request that two died of, at most three attempts, and a share of all requests."""
    async with running_dispatcher(retries=RetrySettings(share=0.5, burst=2)) as harness:
        refusal = harness.dispatcher.retries.refusal
        assert [refusal(0, 1), refusal(1, 1), refusal(2, 2), refusal(0, 3)] == [None, None, "poison", "attempts"]
        for _ in range(2):
            assert refusal(0, 1) is None
            harness.dispatcher.retries.spend()
        assert refusal(0, 1) == "budget"
        harness.dispatcher.next_turn()
        assert refusal(0, 1) == "budget"
        harness.dispatcher.next_turn()
        assert refusal(0, 1) is None
