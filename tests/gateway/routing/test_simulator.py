"""The simulator of the routing tests: its engines schedule as vLLM does, and a seed determines the run."""

import asyncio
import socket
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.routing.engine_metrics import EngineMetrics, parse_metrics
from tests.benchmarks.overhead.loads import Contender
from tests.benchmarks.routing.asking import ask
from tests.benchmarks.routing.blocks import Blocks
from tests.benchmarks.routing.calibration import measured
from tests.benchmarks.routing.engine import Engine, Job
from tests.benchmarks.routing.engine_server import MODEL, Replica
from tests.benchmarks.routing.figures import Objective, figures_of
from tests.benchmarks.routing.policies import CacheAware, LeastInFlight, RoundRobin, StaticLadder
from tests.benchmarks.routing.policy import NOBODY, Decision, Policy, Refused
from tests.benchmarks.routing.profiles import MODELS, Fleet, Profile, fleet_of
from tests.benchmarks.routing.runs import Fault, Run, Scenario
from tests.benchmarks.routing.scenarios import burst
from tests.benchmarks.routing.simulation import simulate as simulated
from tests.benchmarks.routing.texts import TOKEN_BYTES, messages_of
from tests.benchmarks.routing.workloads import Rate, Turn, constant, conversations, ramp, square
from tests.fakes.http_server import Server

BLOCK = 4
SMALL = Profile("bf16", 1.0, 0.01, 0.001, 0.0001, kv_blocks=12, max_num_seqs=3, max_num_batched_tokens=8)
SMALL = replace(SMALL, block_tokens=BLOCK)
FLEET = fleet_of("32b", {"bf16": 2, "int8": 1, "int4": 1})

lengths = st.tuples(st.integers(1, 30), st.integers(1, 18))


def job(key: int, prompt: int, answer: int, text: int = 0) -> Job:
    """A request; requests with the same `text` share a prefix."""
    count = (prompt + answer) // BLOCK
    return Job(key, prompt, answer, tuple(text * 1000 + number for number in range(count)) if text else ())


def run(engine: Engine) -> tuple[Counter[int], Counter[int]]:
    """Step until the engine is idle, checking its limits; returns how often each request began and ended."""
    first, ended = Counter[int](), Counter[int]()
    while engine.begin() is not None:
        assert len(engine.running) <= engine.profile.max_num_seqs
        assert 0 <= engine.blocks.held <= engine.blocks.total
        made = engine.end()
        first.update(each.key for each in made.first)
        ended.update(each.key for each in made.ended)
    return first, ended


@given(st.lists(st.tuples(lengths, st.integers(0, 2)), min_size=1, max_size=12))
def test_every_token_is_made_once_within_places_and_memory(asked: list[tuple[tuple[int, int], int]]) -> None:
    """Every request begins once and ends once, all tokens are counted, and at the end no block is in use."""
    engine = Engine(SMALL)
    jobs = [job(key, *each, text) for key, (each, text) in enumerate(asked)]
    for each in jobs:
        engine.submit(each)
    first, ended = run(engine)
    everyone = {each.key: 1 for each in jobs}
    assert (first, ended) == (everyone, everyone)
    assert engine.gauges.generated_tokens == sum(each.answer_tokens for each in jobs)
    assert engine.gauges.prompt_tokens == sum(each.prompt_tokens for each in jobs)
    assert (engine.blocks.held, engine.gauges.running, engine.gauges.waiting, engine.gauges.kv_usage) == (0, 0, 0, 0)
    assert all(each.made == each.answer_tokens for each in jobs)


@given(st.lists(lengths, min_size=2, max_size=8), st.integers(0, 7), st.integers(1, 12))
def test_who_leaves_takes_nothing_along(asked: list[tuple[int, int]], leaver: int, steps: int) -> None:
    """A request that is aborted frees its blocks, and the others are answered whole."""
    engine = Engine(SMALL)
    jobs = [job(key, *each) for key, each in enumerate(asked)]
    for each in jobs:
        engine.submit(each)
    left = jobs[leaver % len(jobs)]
    for _ in range(steps):
        if engine.begin() is not None:
            engine.end()
    if left in engine.running or left in engine.waiting:
        engine.give_up(left)
        run(engine)
        assert left.made < left.answer_tokens
    else:
        run(engine)
    assert engine.blocks.held == 0
    assert sum(each.made == each.answer_tokens for each in jobs) >= len(jobs) - 1


def test_a_step_does_what_vllm_s_scheduler_does() -> None:
    """Decodes first, then prompts in chunks up to the token budget of a step; gauges change at its end."""
    engine = Engine(SMALL)
    engine.submit(job(0, 12, 3))
    engine.submit(job(1, 5, 2))
    # Eight tokens of the first prompt; then its other four and four of the second; then an answer and one token.
    took = [(engine.begin(), engine.end()) for _ in range(3)]
    assert [seconds for seconds, _ in took] == pytest.approx([1.08, 1.08, 1.0 + 0.01 + 0.001 + 12 * 0.0001])
    assert [[each.key for each in made.first] for _, made in took] == [[], [0], [1]]
    assert engine.gauges.running == 2
    engine.submit(job(2, 1, 1))
    assert engine.gauges.waiting == 0  # the scheduler has not run yet
    engine.begin()
    assert [each.key for each in engine.end().ended] == [0, 1, 2]


def test_who_came_last_makes_room_and_begins_anew() -> None:
    """When KV memory runs out, the newest request is preempted once and its tokens are made again."""
    engine = Engine(replace(SMALL, kv_blocks=8))
    first, last = job(0, 12, 16), job(1, 12, 8)
    engine.submit(first)
    engine.submit(last)
    _, ended = run(engine)
    assert engine.gauges.preemptions == 1
    assert list(ended) == [0, 1]
    assert engine.gauges.generated_tokens == 24


def test_what_was_read_before_is_not_read_again() -> None:
    """A cached prefix is a hit, except its last token; the next turn finds the answer cached, too."""
    engine = Engine(replace(SMALL, kv_blocks=40))
    for key, prompt in enumerate((8, 8, 20)):
        engine.submit(job(key, prompt, 9, text=1))
        turn = engine.waiting[0]
        run(engine)
        assert turn.cached_tokens == (0, 4, 16)[key]
    assert engine.gauges.hit_tokens == 20


def test_the_tail_of_what_was_let_go_first_goes_first() -> None:
    """Eviction takes the last block of the sequence that was freed first; blocks in use are never evicted."""
    blocks = Blocks(6)
    assert blocks.take(3)
    assert all(blocks.name(number) for number in (1, 2, 3))
    blocks.let_go((1, 2, 3), 0)
    assert blocks.known((1, 2, 3)) == 3
    assert blocks.take(4)
    assert blocks.known((1, 2, 3)) == 2
    assert (blocks.price((1, 2), 1), blocks.free) == (3, 2)
    assert not blocks.take(3)
    blocks.hold((1, 2))
    assert (blocks.held, blocks.usage) == (6, 1.0)


def test_what_can_never_fit_is_refused() -> None:
    """A request longer than all KV memory is an error, as in vLLM."""
    with pytest.raises(ValueError, match="longer than the KV memory"):
        Engine(SMALL).submit(job(0, 40, 20))


@pytest.mark.parametrize("precision, low, high", [("int8", 1.5, 1.7), ("int4", 2.1, 2.4)])
def test_lower_precisions_decode_faster_and_read_no_faster(precision: str, low: float, high: float) -> None:
    """Quantized weights speed up decoding by these factors, prefill by hardly anything."""
    parent, child = (measured(MODELS["32b"][each], requests=20) for each in ("bf16", precision))
    assert low < child.decode_tokens_per_second(1) / parent.decode_tokens_per_second(1) < high
    assert 0.9 < child.prefill_tokens_per_second(1) / parent.prefill_tokens_per_second(1) < 1.2
    together = [load.output_tokens_per_second for load in child.loads]
    assert together[:5] == sorted(together[:5])  # more at once, more together, as long as KV lasts


def scenario(fleet: Fleet = FLEET, rate: float = 6.0, seconds: float = 40.0, *faults: Fault, seed: int = 1) -> Scenario:
    """A short scenario."""
    asked = conversations(constant(rate), rate, seconds, seed=seed)
    return Scenario(fleet, asked, seconds, faults, seed=seed)


def simulate(of: Scenario, policy: Policy) -> Run:
    """Simulate a policy that needs no event loop."""
    return simulated(of, lambda _: policy)


def timeline(policy: RoundRobin, of: Scenario) -> list[tuple[int, str, float | None, float | None]]:
    """Key, replica, first token and end of every turn."""
    return [(each.turn.key, each.replica, each.first_at, each.ended_at) for each in simulate(of, policy).outcomes]


def test_the_same_seed_says_the_same() -> None:
    """Two runs with one seed agree in every turn; another seed differs."""
    assert timeline(RoundRobin(FLEET), scenario()) == timeline(RoundRobin(FLEET), scenario())
    assert timeline(RoundRobin(FLEET), scenario()) != timeline(RoundRobin(FLEET), scenario(seed=2))


class Watching(LeastInFlight):
    """Records polls, beside its own count of requests in flight."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self.polls: list[tuple[str, EngineMetrics, int]] = []

    def polled(self, replica: str, poll: EngineMetrics) -> None:
        self.polls.append((replica, poll, self.in_flight[replica]))


def test_polls_say_what_is_so() -> None:
    """Running plus waiting is what is in flight, but for arrivals since the last step; counters end at the sums."""
    policy = Watching(FLEET)
    found = simulate(scenario(rate=20.0), policy)
    assert all(each.ended_at is not None for each in found.outcomes)
    seen = [(poll.running or 0) + (poll.waiting or 0) - in_flight for _, poll, in_flight in policy.polls]
    assert max(map(abs, seen)) <= 3
    assert sum(each == 0 for each in seen) > 0.7 * len(seen)
    assert any(poll.waiting for _, poll, _ in policy.polls)
    last = {replica: poll for replica, poll, _ in policy.polls}
    assert (
        0
        < sum(poll.generated_tokens or 0 for poll in last.values())
        <= sum(each.turn.answer_tokens for each in found.outcomes)
    )


def test_faults_befall_one_replica() -> None:
    """Each fault does what it says: no answers when killed, no polls when stopped, None for a lost metric, slow."""
    victim = FLEET.members[0].id
    faults = [
        Fault(10, victim, "kill"),
        Fault(20, victim, "restart"),
        Fault(24, victim, "lose metric", metric="waiting"),
        Fault(30, victim, "stop polls"),
    ]
    policy = Watching(FLEET)
    found = simulate(scenario(FLEET, 6.0, 40.0, *faults), policy)
    sent = [each.sent_at for each in found.outcomes if each.replica == victim and each.sent_at and not each.failed]
    assert not [at for at in sent if 10 < at < 20]
    assert [at for at in sent if at > 21]
    of_victim = [poll for replica, poll, _ in policy.polls if replica == victim]
    assert not [poll for poll in of_victim if 10 < poll.at_seconds < 20 or poll.at_seconds > 30]
    assert all((poll.waiting is None) == (poll.at_seconds > 24) for poll in of_victim)
    assert policy.in_flight.total() == 0
    slow = simulate(scenario(FLEET.only("bf16"), 2.0, 40.0, Fault(0, victim, "slow", factor=5)), RoundRobin(FLEET))
    gaps = {
        name: sum((each.ended_at or 0) - (each.first_at or 0) for each in slow.outcomes if each.replica == name)
        for name in (victim, FLEET.members[1].id)
    }
    assert gaps[victim] > 3 * gaps[FLEET.members[1].id]


class Moody(RoundRobin):
    """Refuses every turn from second 10 to 15, with a Retry-After of 7 seconds."""

    async def choose(self, turn: Turn, now: float, tried: frozenset[str] = NOBODY) -> Decision:
        return await super().choose(turn, now, tried) if self.would_take(turn, now) else Refused(7.0)

    def would_take(self, turn: Turn, now: float) -> bool:
        return not 10 <= now < 15


def test_a_retry_after_is_held_against_what_would_have_been() -> None:
    """A refused turn returns after its Retry-After; the error is Retry-After minus the time until there was room."""
    found = simulate(scenario(), Moody(FLEET))
    refused = [each for each in found.outcomes if each.refusals]
    assert refused
    for each in refused:
        (refusal,) = each.refusals
        assert 10 <= refusal.at_seconds < 15
        assert each.sent_at == pytest.approx(refusal.at_seconds + 7.0)
        if refusal.really_seconds is not None:
            assert 0 <= refusal.at_seconds + refusal.really_seconds - 15 <= 0.25
    figures = figures_of(found, Objective())
    assert figures.refused == len(refused)
    assert 2.0 <= figures.retry_error_seconds <= 7.0
    assert figures.good_share < 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_turns_of_a_conversation_share_their_beginning(seed: int) -> None:
    """Each turn's prompt contains the last turn's prompt and answer, under the same session and block hashes."""
    for each in conversations(constant(2.0), 2.0, 20.0, seed=seed):
        for before, after in zip(each.turns, each.turns[1:], strict=False):
            assert after.prompt_tokens > before.prompt_tokens + before.answer_tokens
            assert after.chain[: len(before.chain)] == before.chain
            assert after.session == before.session


@pytest.mark.parametrize(
    "rate, mean", [(constant(20.0), 20), (square(10.0, 30.0, 20.0), 20), (ramp(0.0, 40.0, 200.0), 16)]
)
def test_rates_are_kept(rate: Rate, mean: float) -> None:
    """Constant, square and ramp loads give their mean rate of turns within 10 %."""
    turns = sum(len(each.turns) for each in conversations(rate, 40.0, 200.0))
    assert turns == pytest.approx(mean * 200, rel=0.1)


def test_a_burst_spreads_where_nothing_but_the_cache_is_looked_at_it_does_not() -> None:
    """Least requests in flight spreads 64 equal prompts evenly; a policy that follows the prefix cache does not."""
    at_once = burst(FLEET)
    assert figures_of(simulate(at_once, LeastInFlight(at_once.fleet)), Objective()).spread == 1.0
    assert figures_of(simulate(at_once, CacheAware(at_once.fleet)), Objective()).spread > 1.3


def test_a_static_ladder_fills_the_best_rung_first() -> None:
    """With slots per rung, most turns take bf16, and quality is higher than round robin's."""
    found = simulate(scenario(rate=5.0), StaticLadder(FLEET, slots={"bf16": 8, "int8": 4}))
    figures = figures_of(found, Objective())
    assert figures.shares["bf16"] > 0.5 > figures.shares["int8"] > 0 < figures.shares["int4"]
    assert figures.agreement > figures_of(simulate(scenario(), RoundRobin(FLEET)), Objective()).agreement


async def test_over_sockets_an_engine_streams_a_chunk_for_each_token_and_knows_what_was_said_before() -> None:
    """Prefix caching follows the text: the second turn finds the first prompt and its answer cached."""
    member = replace(FLEET.members[0], profile=FLEET.members[0].profile.slowed(0.02))
    replica, bound = Replica(member, []), socket.create_server(("127.0.0.1", 0))
    server = Server(replica.handle, keep_alive_seconds=5, piece_bytes=None)
    await server.listen(bound)
    there = Contender("engine", "127.0.0.1", bound.getsockname()[1], MODEL, "none")
    first = Turn(0, "s", 0, 400, 40, 64, (), 1.0)
    try:
        asked = messages_of(first, [])
        answer = await ask(there, first, asked)
        said = [*asked, {"role": "assistant", "content": answer.text}]
        second = replace(first, number=1, prompt_tokens=600, answer_tokens=1)
        again = await ask(there, second, messages_of(second, said))
        page = await engine_page(there)
    finally:
        await server.stop()
    assert (answer.whole, answer.replica, len(answer.text)) == (True, member.id, 40 * TOKEN_BYTES)
    assert (again.whole, len(again.text)) == (True, TOKEN_BYTES)
    poll, missing = parse_metrics(page, 0.0)
    assert missing == frozenset()
    assert (poll.running, poll.waiting, poll.read_tokens, poll.generated_tokens) == (0, 0, 1000, 41)
    assert poll.kv_capacity_tokens == member.profile.kv_capacity_tokens
    # All blocks that were full: 439 tokens were kept, the answer's last one never was read.
    assert replica.engine.gauges.hit_tokens == 432


async def engine_page(there: Contender) -> bytes:
    """Read /metrics."""
    reader, writer = await asyncio.open_connection(there.host, there.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n\r\n")
    page = await reader.read()
    writer.close()
    return page
