"""Which request gets which replica, and when: turns, queues and their ends, breakers, overloads and retries."""

import asyncio
from collections.abc import Callable

import pytest

from config.schema import AliasSettings, QueueSettings
from gateway.errors import GatewayError, Overloaded, QueueFull, QueueTimeout, Unavailable, UpstreamError
from gateway.proxy.leases import Lease
from gateway.routing.speed import SpeedProfile
from gateway.routing.target import Catalog
from serving.replica import State
from tests.gateway.proxy.dispatching import HI, LO, DispatcherHarness, end, ended_by_timer, running_dispatcher, settle


def error_of(task: "asyncio.Task[Lease]") -> tuple[type[BaseException], str]:
    """The type and code of the error that a request was refused with."""
    error = task.exception()
    assert isinstance(error, GatewayError)
    return type(error), error.code


# Turns


async def test_a_free_slot_is_leased_in_the_same_step() -> None:
    """A request that arrives between the release and the waiting task's next step finds the slot taken."""
    async with running_dispatcher() as harness:
        harness.add()
        first = await harness.lease_now()
        (waiting,) = await harness.start_many(1, "waiting")
        end(first)
        assert harness.in_flight() == {"hi-0": 1}
        late = harness.start("late")
        await settle()
        assert (waiting.done(), late.done()) == (True, False)
        end(waiting.result())
        await settle()
        end(late.result())


async def test_busy_replicas_are_polled_often_by_a_single_gateway_only() -> None:
    """Where others answer turns of the same conversations, too, they also poll."""
    async with running_dispatcher() as harness:
        harness.add(max_in_flight=9)
        assert not harness.dispatcher.busy("hi-0")
        lease = await harness.lease_now()
        assert harness.dispatcher.busy("hi-0")
        for number in range(5):
            task = harness.start(session=f"elsewhere {number}", later=True)
            await settle()
            end(task.result())
        assert not harness.dispatcher.busy("hi-0")
        end(lease)


async def test_keys_take_turns() -> None:
    """Many requests of one key do not delay another key; those of one key are served in their order."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        tasks = await harness.start_many(4, "many") + await harness.start_many(2, "few")
        while tasks:
            end(lease)
            await settle()
            (served,) = [task for task in tasks if task.done()]
            tasks.remove(served)
            lease = served.result()
        end(lease)
        assert harness.order == ["first", "many", "few", "many", "few", "many", "many"]


async def test_a_client_that_leaves_the_queue_leaves_nothing() -> None:
    """It frees its place and its turn."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        gone, stays = await harness.start_many(2)
        gone.cancel()
        await settle()
        assert gone.cancelled()
        assert dict(harness.dispatcher.waiting()) == {"smol": 1}
        end(lease)
        await settle()
        end(stays.result())


async def test_a_client_that_leaves_as_it_gets_its_lease_passes_it_on() -> None:
    """The lease of a cancelled task is released at once, and its slot is leased to the next request."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        gone, stays = await harness.start_many(2)
        end(lease)
        gone.cancel()
        await settle()
        assert gone.cancelled()
        assert harness.in_flight() == {"hi-0": 1}
        end(stays.result())


async def test_a_client_that_has_left_is_passed_over() -> None:
    """Its task is cancelled, but has not run since, when a slot becomes free."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        gone, stays = await harness.start_many(2)
        gone.cancel()
        end(lease)
        assert harness.in_flight() == {"hi-0": 1}
        await settle()
        end(stays.result())


async def test_max_in_flight() -> None:
    """`max_in_flight` is never exceeded, and each slot that becomes free is used."""
    async with running_dispatcher() as harness:
        harness.add(max_in_flight=3)
        tasks = await harness.start_many(7)
        assert harness.in_flight() == {"hi-0": 3}
        while running := [task for task in tasks if task.done()]:
            tasks.remove(running[0])
            end(running[0].result())
            await settle()
            assert harness.in_flight().get("hi-0", 0) == min(3, len(tasks))


async def test_full_rungs_spill_to_the_next() -> None:
    """A full replica is passed over for a rung below."""
    async with running_dispatcher() as harness:
        harness.add("hi-0")
        harness.add("lo-0")
        first, second = await harness.lease_now(HI, LO), await harness.lease_now(HI, LO)
        assert (first.candidate.variant, second.candidate.variant) == (HI, LO)
        end(first)
        end(second)


# The ends of waiting


@pytest.mark.parametrize(
    "state, error",
    [(State.READY, (QueueTimeout, "queue_timeout")), (State.STARTING, (Unavailable, "no_ready_replica"))],
)
async def test_waiting_has_an_end(state: State, error: tuple[type, str]) -> None:
    """The error says whether every replica was busy, or none became ready."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        harness.add(state=state)
        task = harness.start(wait_seconds=0)
        await ended_by_timer(task)
        assert error_of(task) == error
        assert not harness.dispatcher.waiting()
        end(lease)


async def test_retry_after_of_a_full_queue() -> None:
    """It grows with the queue, shrinks as answers end faster, and stays within what clients obey."""

    async def retry_after(waiting: int, every_seconds: float) -> float:
        async with running_dispatcher(QueueSettings(per_alias=waiting)) as harness:
            harness.add()
            lease = await harness.lease_now()
            tasks = await harness.start_many(waiting)
            for _ in range(5):
                tasks += await harness.start_many(1)
                harness.now[0] += every_seconds
                tasks = [task for task in tasks if not (task.done() and task.exception())]
                end(lease)
                await settle()
                lease = next(task.result() for task in tasks if task.done())
                tasks = [task for task in tasks if not task.done()]
            tasks += await harness.start_many(waiting - len(tasks))
            (refused,) = await harness.start_many(1)
            error = refused.exception()
            assert isinstance(error, QueueFull)
            assert error.code == "queue_full"
            seconds = dict(error.headers())[b"retry-after"]
            for task in tasks:
                task.cancel()
            end(lease)
            await settle()
            return int(seconds)

    few, many = await retry_after(8, 1), await retry_after(40, 1)
    slow = await retry_after(8, 10)
    assert 1 <= few < many <= 120
    assert few < slow <= 120


async def test_a_key_that_fills_the_queue_makes_room_for_others() -> None:
    """Its newest request is evicted from the queue, and refused with `queue_full`."""
    async with running_dispatcher(QueueSettings(per_alias=4)) as harness:
        harness.add()
        lease = await harness.lease_now()
        many = await harness.start_many(4, "many")
        (few,) = await harness.start_many(1, "few")
        assert [task.done() for task in many] == [False, False, False, True]
        assert error_of(many[3]) == (QueueFull, "queue_full")
        assert not few.done()
        for task in (*many[:3], few):
            task.cancel()
        await settle()
        end(lease)


async def test_bodies_that_wait_are_bounded() -> None:
    """A queue of few requests may still hold too many bytes."""
    async with running_dispatcher(QueueSettings(body_bytes=1000)) as harness:
        harness.add()
        lease = await harness.lease_now()
        accepted = harness.start(body_bytes=600)
        refused = harness.start(body_bytes=600)
        await settle()
        assert error_of(refused) == (QueueFull, "queue_full")
        accepted.cancel()
        end(lease)


async def test_a_queue_of_length_0() -> None:
    """It refuses at once."""
    async with running_dispatcher(QueueSettings(per_alias=0)) as harness:
        harness.add()
        lease = await harness.lease_now()
        (task,) = await harness.start_many(1)
        assert error_of(task) == (QueueFull, "queue_full")
        end(lease)


async def test_requests_wait_for_the_variants_that_may_answer() -> None:
    """A free slot of one variant goes past the requests that need another one, whoever came first."""
    async with running_dispatcher() as harness:
        harness.add("hi-0")
        harness.add("lo-0")
        high, low = await harness.lease_now(HI), await harness.lease_now(LO)
        on_high, on_low = harness.start("k", HI), harness.start("k", LO)
        await settle()
        end(low)
        await settle()
        assert (on_high.done(), on_low.done()) == (False, True)
        end(high)
        await settle()
        assert [task.result().replica.id for task in (on_high, on_low)] == ["hi-0", "lo-0"]
        for task in (on_high, on_low):
            end(task.result())


async def test_a_long_prompt_waits_for_a_long_context() -> None:
    """A replica with room whose context is too short does not get it; shorter prompts are not delayed by it."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_model_len_tokens=8000)
        harness.add("lo-0", max_model_len_tokens=1000)
        high, low = await harness.lease_now(HI), await harness.lease_now(LO)
        long = harness.start("long", HI, LO, prompt_tokens=5000.0)
        short = harness.start("short", HI, LO, prompt_tokens=50.0)
        await settle()
        end(low)
        await settle()
        assert (long.done(), short.done()) == (False, True)
        end(short.result())
        await settle()
        assert not long.done()
        end(high)
        await settle()
        assert long.result().replica.id == "hi-0"
        end(long.result())


async def test_a_prompt_that_fits_no_context_waits_for_any_replica() -> None:
    """So does one whose only fitting replica leaves while it waits."""
    async with running_dispatcher() as harness:
        harness.add("hi-0", max_model_len_tokens=8000)
        harness.add("lo-0", max_model_len_tokens=1000)
        high, low = await harness.lease_now(HI), await harness.lease_now(LO)
        tasks = [harness.start("long", HI, LO, prompt_tokens=tokens) for tokens in (5000.0, 50_000.0)]
        await settle()
        harness.registry.remove("hi-0")
        end(high)
        for task in tasks:
            await settle()
            assert not task.done()
            end(low)
            await settle()
            low = task.result()
            assert low.replica.id == "lo-0"
        end(low)


@pytest.mark.parametrize("prompt_tokens, refused", [(100.0, False), (5000.0, True)])
async def test_a_short_wait_refuses_no_request(prompt_tokens: float, *, refused: bool) -> None:
    """With `wait_seconds` 0 a prompt that is being read may be waited for, but not seconds of work."""
    speed = SpeedProfile((0.025,), (40.0,), 0.001, 64)
    async with running_dispatcher(speeds={"hi": speed}) as harness:
        harness.add(max_in_flight=9)
        ahead = harness.start("ahead", prompt_tokens=prompt_tokens)
        behind = harness.start("behind", wait_seconds=0.0)
        await settle()
        end(ahead.result())
        if refused:
            assert error_of(behind) == (Overloaded, "overloaded")
        else:
            end(behind.result())


async def test_gates_are_forgotten_with_their_ladders() -> None:
    """A reload drops the gates of rungs that are gone, because nothing would close them, and keeps the others."""
    async with running_dispatcher() as harness:
        harness.add("hi-0")
        harness.add("lo-0", max_in_flight=9)
        leases = [await harness.lease_now(HI)]
        for alias in ("smol", "gone"):
            task = harness.start("k", HI, LO, alias=alias)
            await settle()
            leases.append(task.result())
        gates = harness.dispatcher.cluster.gates
        assert set(gates) == {("smol", "hi"), ("gone", "hi")}
        variants = {"hi": HI, "lo": LO}
        harness.dispatcher.keep_only(Catalog({"smol": AliasSettings(ladder=("hi", "lo"))}, variants))
        assert set(gates) == {("smol", "hi")}
        harness.dispatcher.keep_only(Catalog({"smol": AliasSettings(ladder=("lo",))}, variants))
        assert not gates
        for lease in leases:
            end(lease)


async def test_a_replica_that_becomes_ready_serves_the_queue() -> None:
    """It gets as many requests as it takes, in the step in which it becomes ready."""
    async with running_dispatcher() as harness:
        harness.add(state=State.STARTING)
        tasks = await harness.start_many(3)
        harness.add(max_in_flight=2)
        assert harness.in_flight() == {"hi-0": 2}
        harness.add("hi-1")
        await settle()
        for task in tasks:
            end(task.result())


def remove(harness: DispatcherHarness) -> None:
    """Remove the replica."""
    harness.registry.remove("hi-0")


def drain(harness: DispatcherHarness) -> None:
    """Let the replica drain."""
    harness.registry.move("hi-0", State.DRAINING)


@pytest.mark.parametrize("leave", [remove, drain])
async def test_the_last_replica_leaves(leave: Callable[[DispatcherHarness], None]) -> None:
    """Requests that wait are refused at once; those that run go on."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        tasks = await harness.start_many(2)
        leave(harness)
        await settle()
        assert [error_of(task) for task in tasks] == [(Unavailable, "no_ready_replica")] * 2
        end(lease)


async def test_a_replica_of_another_rung_may_become_ready() -> None:
    """A request waits as long as any replica of any permitted rung may become ready."""
    async with running_dispatcher() as harness:
        harness.add("hi-0")
        harness.add("lo-0", State.WARMING)
        lease = await harness.lease_now()
        task = harness.start("k", HI, LO)
        await settle()
        remove(harness)
        await settle()
        assert not task.done()
        harness.add("lo-0")
        await settle()
        assert task.result().replica.id == "lo-0"
        end(task.result())
        end(lease)


async def test_no_replica() -> None:
    """Without any replica a request is refused at once."""
    async with running_dispatcher() as harness:
        (task,) = await harness.start_many(1)
        assert error_of(task) == (Unavailable, "no_ready_replica")


async def test_a_failed_request_does_not_wait() -> None:
    """It gets another replica at once, or its failure is raised."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        task = harness.start(failure=UpstreamError("broken"), tried=frozenset({"hi-1"}))
        await settle()
        assert error_of(task) == (UpstreamError, "upstream_error")
        end(lease)


async def test_a_request_that_waits_may_get_a_replica_that_it_tried() -> None:
    """The queue is served when any replica has room; after a wait the request forgets what it tried."""
    async with running_dispatcher() as harness:
        harness.add()
        lease = await harness.lease_now()
        task = harness.start(tried=frozenset({"hi-0"}))
        await settle()
        assert not task.done()
        end(lease)
        await settle()
        assert task.result().replica.id == "hi-0"
        end(task.result())
