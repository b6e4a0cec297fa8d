"""Who gets which replica, and when: turns, waiting and its ends, and what is held against replicas."""

import asyncio
from collections.abc import Callable

import pytest

from config.schema import AliasSettings, QueueSettings, RetrySettings
from gateway.errors import GatewayError, Overloaded, Unavailable, UpstreamError
from gateway.routing.request import Ask
from gateway.routing.speed import SpeedProfile
from gateway.routing.target import Catalog
from serving.replica import State
from tests.fakes.running import DEADLINE_SECONDS
from tests.gateway.proxy.dispatching import HI, LO, House, end, house, settled

Task = asyncio.Task  # what `ask` gives


def error_of(task: "Task[object]") -> tuple[type[BaseException], str]:
    """What a request that got nothing was told."""
    error = task.exception()
    assert isinstance(error, GatewayError)
    return type(error), error.code


async def done(task: "Task[object]") -> None:
    """Wait for an end that a real timer brings."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.wait([task])


# Turns


async def test_a_slot_goes_on_in_the_step_in_which_it_is_free() -> None:
    """Whoever comes in between finds it taken."""
    async with house() as here:
        here.come()
        first = await here.held()
        (waiting,) = await here.asked(1, "waiting")
        end(first)
        assert here.load() == {"hi-0": 1}
        late = here.ask("late")
        await settled()
        assert (waiting.done(), late.done()) == (True, False)
        end(waiting.result())
        await settled()
        end(late.result())


async def test_keys_take_turns() -> None:
    """One key's crowd doesn't hold another up, and a key's own come first come, first served."""
    async with house() as here:
        here.come()
        held = await here.held()
        tasks = await here.asked(4, "many") + await here.asked(2, "few")
        while tasks:
            end(held)
            await settled()
            (served,) = [task for task in tasks if task.done()]
            tasks.remove(served)
            held = served.result()
        end(held)
        assert here.order == ["first", "many", "few", "many", "few", "many", "many"]


async def test_whoever_leaves_the_line_leaves_nothing() -> None:
    """Neither a place nor a turn."""
    async with house() as here:
        here.come()
        held = await here.held()
        gone, stays = await here.asked(2)
        gone.cancel()
        await settled()
        assert gone.cancelled()
        assert dict(here.dispatch.waiting()) == {"smol": 1}
        end(held)
        await settled()
        end(stays.result())


async def test_whoever_leaves_as_it_gets_its_turn_hands_it_on() -> None:
    """The slot was its own for less than a step, and is the next one's then."""
    async with house() as here:
        here.come()
        held = await here.held()
        gone, stays = await here.asked(2)
        end(held)
        gone.cancel()
        await settled()
        assert gone.cancelled()
        assert here.load() == {"hi-0": 1}
        end(stays.result())


async def test_whoever_has_left_is_passed_over() -> None:
    """Its task has not heard of it yet when a slot becomes free."""
    async with house() as here:
        here.come()
        held = await here.held()
        gone, stays = await here.asked(2)
        gone.cancel()
        end(held)
        assert here.load() == {"hi-0": 1}
        await settled()
        end(stays.result())


async def test_no_more_than_fit() -> None:
    """`max_in_flight` is never exceeded, and each slot that becomes free is used."""
    async with house() as here:
        here.come(max_in_flight=3)
        tasks = await here.asked(7)
        assert here.load() == {"hi-0": 3}
        while running := [task for task in tasks if task.done()]:
            tasks.remove(running[0])
            end(running[0].result())
            await settled()
            assert here.load().get("hi-0", 0) == min(3, len(tasks))


async def test_full_rungs_spill_to_the_next() -> None:
    """A full replica is passed over for a rung below."""
    async with house() as here:
        here.come("hi-0")
        here.come("lo-0")
        first, second = await here.held(HI, LO), await here.held(HI, LO)
        assert (first.choice.variant, second.choice.variant) == (HI, LO)
        end(first)
        end(second)


# The ends of waiting


@pytest.mark.parametrize(
    "state, told",
    [(State.READY, (Overloaded, "queue_timeout")), (State.STARTING, (Unavailable, "no_ready_replica"))],
)
async def test_waiting_has_an_end(state: State, told: tuple[type, str]) -> None:
    """Too much is asked, or nobody was there: these are two things to tell."""
    async with house() as here:
        here.come()
        held = await here.held()
        here.come(state=state)
        task = here.ask(wait_seconds=0)
        await done(task)
        assert error_of(task) == told
        assert not here.dispatch.waiting()
        end(held)


async def test_a_full_line_says_when_to_come_back() -> None:
    """Later if more wait, sooner if answers end faster; always within what clients obey."""

    async def told(waiting: int, every_seconds: float) -> float:
        async with house(QueueSettings(per_alias=waiting)) as here:
            here.come()
            held = await here.held()
            tasks = await here.asked(waiting)
            for _ in range(5):
                tasks += await here.asked(1)
                here.now[0] += every_seconds
                tasks = [task for task in tasks if not (task.done() and task.exception())]
                end(held)
                await settled()
                held = next(task.result() for task in tasks if task.done())
                tasks = [task for task in tasks if not task.done()]
            tasks += await here.asked(waiting - len(tasks))
            (refused,) = await here.asked(1)
            error = refused.exception()
            assert isinstance(error, Overloaded)
            assert error.code == "queue_full"
            seconds = dict(error.headers())[b"retry-after"]
            for task in tasks:
                task.cancel()
            end(held)
            await settled()
            return int(seconds)

    few, many = await told(8, 1), await told(40, 1)
    slow = await told(8, 10)
    assert 1 <= few < many <= 120
    assert few < slow <= 120


async def test_greed_makes_room_for_others() -> None:
    """A key that fills the line is pushed out of it, the newest first, and told that it is full."""
    async with house(QueueSettings(per_alias=4)) as here:
        here.come()
        held = await here.held()
        many = await here.asked(4, "many")
        (few,) = await here.asked(1, "few")
        assert [task.done() for task in many] == [False, False, False, True]
        assert error_of(many[3]) == (Overloaded, "queue_full")
        assert not few.done()
        for task in (*many[:3], few):
            task.cancel()
        await settled()
        end(held)


async def test_bodies_that_wait_are_bounded() -> None:
    """A line that is short enough may still be too heavy."""
    async with house(QueueSettings(body_bytes=1000)) as here:
        here.come()
        held = await here.held()
        light = here.ask(body_bytes=600)
        heavy = here.ask(body_bytes=600)
        await settled()
        assert error_of(heavy) == (Overloaded, "queue_full")
        light.cancel()
        end(held)


async def test_no_waiting_at_all() -> None:
    """A line of length 0 refuses at once."""
    async with house(QueueSettings(per_alias=0)) as here:
        here.come()
        held = await here.held()
        (task,) = await here.asked(1)
        assert error_of(task) == (Overloaded, "queue_full")
        end(held)


async def test_a_long_prompt_waits_for_a_long_context() -> None:
    """A replica that would refuse it for its length doesn't get it for having room first; others aren't held up."""
    async with house() as here:
        here.come("hi-0", max_model_len_tokens=8000)
        here.come("lo-0", max_model_len_tokens=1000)
        high, low = await here.held(HI), await here.held(LO)
        long = here.ask("long", HI, LO, prompt=Ask(prompt_tokens=5000.0))
        short = here.ask("short", HI, LO, prompt=Ask(prompt_tokens=50.0))
        await settled()
        end(low)
        await settled()
        assert (long.done(), short.done()) == (False, True)
        end(short.result())
        await settled()
        assert not long.done()
        end(high)
        await settled()
        assert long.result().choice.replica.id == "hi-0"
        end(long.result())


async def test_a_prompt_that_fits_nowhere_waits_for_anybody() -> None:
    """Also if the only one that it fits in leaves meanwhile."""
    async with house() as here:
        here.come("hi-0", max_model_len_tokens=8000)
        here.come("lo-0", max_model_len_tokens=1000)
        high, low = await here.held(HI), await here.held(LO)
        tasks = [here.ask("long", HI, LO, prompt=Ask(prompt_tokens=tokens)) for tokens in (5000.0, 50_000.0)]
        await settled()
        here.registry.remove("hi-0")
        end(high)
        for task in tasks:
            await settled()
            assert not task.done()
            end(low)
            await settled()
            low = task.result()
            assert low.choice.replica.id == "lo-0"
        end(low)


@pytest.mark.parametrize("prompt_tokens, refused", [(100.0, False), (5000.0, True)])
async def test_nobody_is_refused_for_a_moment(prompt_tokens: float, *, refused: bool) -> None:
    """Who may not wait in line for long may wait for a prompt that is just being read, and not for seconds of work."""
    speed = SpeedProfile((0.025,), (40.0,), 0.001, 64)
    async with house(speeds={"hi": speed}) as here:
        here.come(max_in_flight=9)
        ahead = here.ask("ahead", prompt=Ask(prompt_tokens=prompt_tokens))
        behind = here.ask("behind", wait_seconds=0.0)
        await settled()
        end(ahead.result())
        if refused:
            assert error_of(behind) == (Overloaded, "overloaded")
        else:
            end(behind.result())


async def test_gates_go_with_their_ladders() -> None:
    """After a reload nothing would ever close them; those that are left stay as they are."""
    async with house() as here:
        here.come("hi-0")
        here.come("lo-0", max_in_flight=9)
        held = [await here.held(HI)]
        for alias in ("smol", "gone"):
            task = here.ask("k", HI, LO, alias=alias)
            await settled()
            held.append(task.result())
        assert set(here.dispatch.scene.gates) == {("smol", "hi"), ("gone", "hi")}
        variants = {"hi": HI, "lo": LO}
        here.dispatch.keep_only(Catalog({"smol": AliasSettings(ladder=("hi", "lo"))}, variants))
        assert set(here.dispatch.scene.gates) == {("smol", "hi")}
        here.dispatch.keep_only(Catalog({"smol": AliasSettings(ladder=("lo",))}, variants))
        assert not here.dispatch.scene.gates
        for lease in held:
            end(lease)


async def test_a_replica_that_gets_ready_serves_who_waits() -> None:
    """As many as it may take, in the step in which it does."""
    async with house() as here:
        here.come(state=State.STARTING)
        tasks = await here.asked(3)
        here.come(max_in_flight=2)
        assert here.load() == {"hi-0": 2}
        here.come("hi-1")
        await settled()
        for task in tasks:
            end(task.result())


def remove(here: House) -> None:
    """The replica goes."""
    here.registry.remove("hi-0")


def drain(here: House) -> None:
    """The replica takes no more."""
    here.registry.move("hi-0", State.DRAINING)


@pytest.mark.parametrize("leave", [remove, drain])
async def test_the_last_hope_goes(leave: Callable[[House], None]) -> None:
    """Those who wait hear it at once; what runs may end."""
    async with house() as here:
        here.come()
        held = await here.held()
        tasks = await here.asked(2)
        leave(here)
        await settled()
        assert [error_of(task) for task in tasks] == [(Unavailable, "no_ready_replica")] * 2
        end(held)


async def test_hope_on_another_rung_is_hope() -> None:
    """As long as any replica of any permitted rung may come, it is waited for."""
    async with house() as here:
        here.come("hi-0")
        here.come("lo-0", State.WARMING)
        held = await here.held()
        task = here.ask("k", HI, LO)
        await settled()
        remove(here)
        await settled()
        assert not task.done()
        here.come("lo-0")
        await settled()
        assert task.result().choice.replica.id == "lo-0"
        end(task.result())
        end(held)


async def test_nothing_is_there() -> None:
    """Then nothing is waited for."""
    async with house() as here:
        (task,) = await here.asked(1)
        assert error_of(task) == (Unavailable, "no_ready_replica")


async def test_a_failure_is_told_rather_than_waited_out() -> None:
    """A request that has failed already gets another replica at once, or its failure."""
    async with house() as here:
        here.come()
        held = await here.held()
        task = here.ask(failure=UpstreamError("broken"), tried=frozenset({"hi-1"}))
        await settled()
        assert error_of(task) == (UpstreamError, "upstream_error")
        end(held)


# Full replicas


async def test_a_full_replica_is_spared() -> None:
    """Requests go to another one, or wait until its time is up; an answer of it ends that at once."""
    async with house() as here:
        here.come("hi-0", max_in_flight=9)
        first, second = await here.held(), await here.held()
        end(first, "refused")
        (waiting,) = await here.asked(1)
        assert not waiting.done()
        here.come("hi-1")
        await settled()
        assert waiting.result().choice.replica.id == "hi-1"
        end(second)
        after = await here.held()
        assert after.choice.replica.id == "hi-0"
        end(after)
        end(waiting.result())


@pytest.mark.parametrize("asked_for, seconds", [(None, 0.25), (3.0, 3.0), (600.0, 10.0)])
async def test_for_how_long_it_is_spared(asked_for: float | None, seconds: float) -> None:
    """As long as it asks for, within reason."""
    async with house() as here:
        here.come("hi-0", max_in_flight=9)
        here.come("hi-1", max_in_flight=9)
        first = await here.held()
        end(first, "refused", asked_for)
        full = first.choice.replica.id
        chosen = []
        for now in (0.0, seconds - 0.01, seconds, seconds):
            here.now[0] = now
            lease = await here.held()
            chosen.append(lease.choice.replica.id == full)
            end(lease, "abandoned")
        assert chosen[:2] == [False, False]
        assert any(chosen[2:])


async def test_what_a_replica_takes_is_learned() -> None:
    """An answer of a replica that refused sends it one more, and not the whole line."""
    async with house() as here:
        here.come(max_in_flight=99)
        leases = [await here.held() for _ in range(6)]
        for lease in leases[2:]:
            end(lease, "refused")
        tasks = await here.asked(9)
        assert here.load() == {"hi-0": 2}
        end(leases[0])
        await settled()
        assert here.load() == {"hi-0": 2}
        here.now[0] = 5.0
        end(leases[1])
        await settled()
        assert here.load() == {"hi-0": 3}
        while tasks:
            running = [task for task in tasks if task.done()]
            tasks = [task for task in tasks if not task.done()]
            for task in running:
                end(task.result())
            await settled()


async def test_a_mark_that_ends_wakes_who_waits() -> None:
    """Nothing else happens: the time alone."""
    async with house() as here:
        here.come(max_in_flight=9)
        end(await here.held(), "refused", 0.01)
        (task,) = await here.asked(1)
        assert not task.done()
        here.now[0] = 1.0
        await done(task)
        end(task.result())


# Failing replicas


async def failed(here: House, name: str, times: int = 3) -> None:
    """Have a replica fail so often in a row: leases that others get meanwhile are given back."""
    spare = []
    while times:
        lease = await here.held()
        if lease.choice.replica.id == name:
            end(lease, "failed")
            times -= 1
        else:
            spare.append(lease)
    for lease in spare:
        end(lease, "abandoned")


async def chosen(here: House, count: int = 6) -> set[str]:
    """Who gets the next requests, all at once."""
    leases = [await here.held() for _ in range(count)]
    for lease in leases:
        end(lease, "abandoned")
    return {lease.choice.replica.id for lease in leases}


async def test_a_failing_replica_is_left_out_and_comes_back() -> None:
    """After three failures; then one request finds out, and a success opens it for all."""
    async with house() as here:
        here.come("hi-0", max_in_flight=99)
        here.come("hi-1", max_in_flight=99)
        await failed(here, "hi-0", 2)
        assert await chosen(here) == {"hi-0", "hi-1"}
        await failed(here, "hi-0", 1)
        assert here.dispatch.breaker_states() == {"hi-0": "open"}
        assert await chosen(here) == {"hi-1"}
        here.now[0] = 1.0
        leases = [await here.held() for _ in range(6)]
        probes = [lease for lease in leases if lease.choice.replica.id == "hi-0"]
        assert len(probes) == 1
        for lease in leases:
            end(lease)
        assert here.dispatch.breaker_states() == {"hi-0": "closed"}
        assert await chosen(here) == {"hi-0", "hi-1"}


async def test_a_probe_that_is_given_up_makes_place_for_another() -> None:
    """Its client left before it showed anything."""
    async with house() as here:
        here.come("hi-0", max_in_flight=99)
        here.come("hi-1", max_in_flight=99)
        await failed(here, "hi-0")
        here.now[0] = 1.0
        for _ in range(3):
            leases = [await here.held() for _ in range(4)]
            assert sorted(lease.choice.replica.id for lease in leases).count("hi-0") == 1
            for lease in leases:
                end(lease, "abandoned")


async def test_another_requests_end_is_not_the_probes() -> None:
    """One that was under way before the breaker opened may leave: the probe still runs, and a second must not."""
    async with house() as here:
        here.come("hi-0", max_in_flight=99)
        here.come("hi-1", max_in_flight=99)
        early = [await here.held() for _ in range(2)]
        await failed(here, "hi-0")
        here.now[0] = 1.0
        leases = [await here.held() for _ in range(4)]
        assert [lease.choice.replica.id for lease in leases].count("hi-0") == 1
        for lease in early:
            end(lease, "abandoned")
        assert await chosen(here) == {"hi-1"}
        for lease in leases:
            end(lease, "abandoned")


async def test_waiting_for_a_probe_does_not_spin() -> None:
    """While a probe runs and everything else is full, nothing is looked at until something can change."""
    async with house() as here:
        here.come("hi-0", max_in_flight=99)
        here.come("hi-1", max_in_flight=4)
        await failed(here, "hi-0")
        here.now[0] = 1.0
        leases = [await here.held() for _ in range(5)]
        (waiting,) = await here.asked(1)
        alarm = here.dispatch._alarm
        assert alarm is not None
        assert alarm.when() - asyncio.get_running_loop().time() > 1
        waiting.cancel()
        for lease in leases:
            end(lease, "abandoned")


async def test_at_most_half_are_left_out() -> None:
    """If all fail, the least bad are asked all the same."""
    async with house() as here:
        for number in range(3):
            here.come(f"hi-{number}", max_in_flight=99)
        for number in range(3):
            here.now[0] += 0.1
            await failed(here, f"hi-{number}")
        assert set(here.dispatch.breaker_states().values()) == {"open"}
        assert len(await chosen(here)) >= 1


async def test_nothing_is_held_against_who_comes_back() -> None:
    """A replica that was gone is another one, also if requests to the old one fail while it is away."""
    async with house() as here:
        here.come("hi-0", max_in_flight=9)
        held = [await here.held() for _ in range(6)]
        for lease in held[:3]:
            end(lease, "failed")
        assert here.dispatch.breaker_states() == {"hi-0": "open"}
        here.come("hi-0", State.STARTING, 9)
        for lease in held[3:]:
            end(lease, "failed")
        here.come("hi-0", State.READY, 9)
        assert here.dispatch.breaker_states() == {}


# Trying again


async def test_why_not_again() -> None:
    """Never a third replica for a request that two didn't survive, three attempts, and a share of all requests."""
    async with house(retries=RetrySettings(share=0.5, burst=2)) as here:
        ask = here.dispatch.why_not_again
        assert [ask(0, 1), ask(1, 1), ask(2, 2), ask(0, 3)] == [None, None, "poison", "attempts"]
        for _ in range(2):
            assert ask(0, 1) is None
            here.dispatch.retried()
        assert ask(0, 1) == "budget"
        here.dispatch.arrived()
        assert ask(0, 1) == "budget"
        here.dispatch.arrived()
        assert ask(0, 1) is None
