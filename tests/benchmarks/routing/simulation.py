"""A fleet of simulated engines under a workload, a policy and faults, in virtual time: one event after the other."""

import asyncio
import random
from collections.abc import Callable
from functools import partial

from gateway.proxy.load.polling import first_poll_seconds, next_poll_seconds
from tests.benchmarks.routing.engine import Engine, Gauges, Job
from tests.benchmarks.routing.policy import NOBODY, MetricsReader, Policy, Refused, Usage
from tests.benchmarks.routing.replica import Replica
from tests.benchmarks.routing.runs import Fault, Outcome, Refusal, Run, Scenario
from tests.benchmarks.routing.virtual_time import VirtualLoop, run_in_virtual_time
from tests.benchmarks.routing.workloads import Conversation, Turn

DRAIN_SECONDS = 180.0  # how long answers may still take once nobody asks any more
PROBE_SECONDS, MOST_PROBED, LONGEST_PROBE_SECONDS = 0.25, 32, 60.0


class Simulation:
    """Owns the replicas, on a loop whose time is virtual."""

    def __init__(self, scenario: Scenario, policy: Policy, loop: VirtualLoop) -> None:
        self.scenario, self.policy = scenario, policy
        self.outcomes: list[Outcome] = []
        self.replicas = {member.id: Replica(member, Engine(member.profile)) for member in scenario.fleet.members}
        self._loop = loop
        self._over = asyncio.Event()
        self._tasks = set[asyncio.Task[None]]()
        self._chance = random.Random(scenario.seed)
        self._probed: list[tuple[Turn, Refusal]] = []
        self._places: dict[Outcome, Conversation] = {}  # of turns that are not over
        self._total = Gauges()

    @property
    def now(self) -> float:
        """Seconds since the start."""
        return self._loop.time()

    async def run(self) -> Run:
        """Run until all is answered, or nobody waits any longer for it."""
        self._begin()
        await self._over.wait()
        for replica in self.replicas.values():
            self._count(replica.engine.gauges)
        total = self._total
        hits = total.hit_tokens / max(total.queried_tokens, 1)
        return Run(
            self.policy.name, self.scenario, self.outcomes, tuple(self.policy.switches()), total.preemptions, hits
        )

    def _look_for_end(self) -> None:
        if self.now >= self.scenario.seconds and not self._places and not self._probed:
            self._over.set()

    def _begin(self) -> None:
        self.policy.ready(tuple(self.replicas), 0.0)
        for conversation in self.scenario.conversations:
            self._at(conversation.at_seconds, partial(self._arrive, conversation, 0))
        for fault in self.scenario.faults:
            self._at(fault.at_seconds, partial(self._befall, fault))
        for reader in self.policy.readers():
            for number, replica in enumerate(self.replicas.values(), 1):
                first = first_poll_seconds(number, self._chance.random(), reader.intervals)
                self._at(first, partial(self._poll, reader, replica))
        self._at(self.scenario.seconds, self._look_for_end)
        self._at(self.scenario.seconds + DRAIN_SECONDS, self._over.set)

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        self._loop.call_at(seconds, happen)

    # Turns: asked, sent or refused, and what follows them.

    def _arrive(self, conversation: Conversation, number: int) -> None:
        if self.now > self.scenario.seconds:
            return
        outcome = Outcome(conversation.turns[number], self.now)
        self.outcomes.append(outcome)
        self._places[outcome] = conversation
        self._ask(outcome)

    def _ask(self, outcome: Outcome, tried: frozenset[str] = NOBODY) -> None:
        task = self._loop.create_task(self._asked(outcome, tried))
        self._tasks.add(task)
        task.add_done_callback(self._asking_ended)

    def _asking_ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    async def _asked(self, outcome: Outcome, tried: frozenset[str]) -> None:
        while True:
            decision = await self.policy.choose(outcome.turn, self.now, tried)
            if isinstance(decision, Refused):
                self._refuse(outcome, decision)
                return
            if self._send(outcome, decision):
                return
            tried |= {decision}
            if outcome.tries >= self.scenario.most_tries:
                self._give_up(outcome)
                return

    def _send(self, outcome: Outcome, name: str) -> bool:
        """Send a turn; False if nobody is there any more."""
        replica, turn = self.replicas[name], outcome.turn
        outcome.tries += 1
        self.policy.sent(turn, name, self.now)
        if not replica.alive:
            self.policy.failed(turn, name, self.now)
            return False
        job = Job(turn.key, turn.prompt_tokens, turn.answer_tokens, turn.chain)
        outcome.replica, outcome.precision = name, replica.member.precision
        outcome.agreement, outcome.sent_at = replica.member.agreement, self.now
        replica.jobs[job] = outcome
        replica.engine.submit(job)
        if not replica.stepping:
            self._step(replica)
        return True

    def _refuse(self, outcome: Outcome, refused: Refused) -> None:
        refusal = Refusal(self.now, refused.retry_after_seconds)
        outcome.refusals.append(refusal)
        if len(self._probed) < MOST_PROBED:
            self._probed.append((outcome.turn, refusal))
            if len(self._probed) == 1:
                self._at(self.now + PROBE_SECONDS, self._probe)
        if len(outcome.refusals) < self.scenario.most_asks:
            self._at(self.now + refused.retry_after_seconds, partial(self._ask, outcome))
        else:
            self._give_up(outcome)

    def _probe(self) -> None:
        """Ask for those that were refused whether they would be taken by now; nothing is sent."""
        left = []
        for turn, refusal in self._probed:
            if self.policy.would_take(turn, self.now):
                refusal.really_seconds = self.now - refusal.at_seconds
            elif self.now - refusal.at_seconds < LONGEST_PROBE_SECONDS:
                left.append((turn, refusal))
        self._probed = left
        if left:
            self._at(self.now + PROBE_SECONDS, self._probe)
        else:
            self._look_for_end()

    def _give_up(self, outcome: Outcome) -> None:
        outcome.failed = True
        self._follow(outcome)

    def _follow(self, outcome: Outcome) -> None:
        """The next turn comes when this one was read; whoever got no answer goes on all the same."""
        conversation, number = self._places.pop(outcome), outcome.turn.number + 1
        if number < len(conversation.turns):
            self._at(self.now + outcome.turn.think_seconds, partial(self._arrive, conversation, number))
        self._look_for_end()

    # Engines: steps, polls, faults.

    def _step(self, replica: Replica) -> None:
        seconds = replica.engine.begin()
        replica.stepping = seconds is not None
        if seconds is not None:
            self._at(self.now + seconds, partial(self._end_step, replica, replica.life))

    def _end_step(self, replica: Replica, life: int) -> None:
        if life != replica.life:
            return
        made = replica.engine.end()
        for job in made.first:
            outcome = replica.jobs[job]
            outcome.first_at, outcome.cached_tokens = self.now, job.cached_tokens
            self.policy.first_token(outcome.turn, replica.member.id, self.now)
        for job in made.ended:
            outcome = replica.jobs.pop(job)
            outcome.ended_at = self.now
            usage = Usage(job.prompt_tokens, job.cached_tokens, job.answer_tokens)
            self.policy.finished(outcome.turn, replica.member.id, usage, self.now)
            self._follow(outcome)
        self._step(replica)

    def _poll(self, reader: MetricsReader, replica: Replica) -> None:
        """Read its metrics as often as our gateway does."""
        name, jitter = replica.member.id, self._chance.random()
        apart = next_poll_seconds(busy=reader.busy(name), jitter=jitter, intervals=reader.intervals)
        self._at(self.now + apart, partial(self._poll, reader, replica))
        if replica.alive and replica.polled:
            reader.polled(name, replica.poll(self.now))
        else:
            reader.unanswered(name, self.now)

    def _befall(self, fault: Fault) -> None:
        replica = self.replicas[fault.replica]
        if fault.kind == "kill":
            self._kill(replica)
        elif fault.kind == "restart":
            replica.alive = True
            self._at(self.now + self.scenario.detection_seconds, self._tell_health)
        elif fault.kind == "slow":
            replica.engine.slowness = fault.factor
        elif fault.kind == "lose metric":
            replica.lost.add(fault.metric)
        else:
            replica.polled = fault.kind == "resume polls"

    def _kill(self, replica: Replica) -> None:
        """What it was answering fails: anew elsewhere where no token was sent yet."""
        lost, replica.jobs = replica.jobs, {}
        self._count(replica.engine.gauges)
        replica.engine = Engine(replica.member.profile)
        replica.alive, replica.stepping, replica.life = False, False, replica.life + 1
        self._at(self.now + self.scenario.detection_seconds, self._tell_health)
        for outcome in lost.values():
            self.policy.failed(outcome.turn, replica.member.id, self.now)
            if outcome.first_at is None and outcome.tries < self.scenario.most_tries:
                self._ask(outcome, frozenset({replica.member.id}))
            else:
                self._give_up(outcome)

    def _tell_health(self) -> None:
        self.policy.ready([name for name, replica in self.replicas.items() if replica.alive], self.now)

    def _count(self, gauges: Gauges) -> None:
        self._total.preemptions += gauges.preemptions
        self._total.hit_tokens += gauges.hit_tokens
        self._total.queried_tokens += gauges.queried_tokens


def simulate(scenario: Scenario, make: Callable[[Scenario], Policy]) -> Run:
    """Run a policy, which is made on the loop that it runs on, through a scenario."""
    loop = VirtualLoop()

    async def run() -> Run:
        return await Simulation(scenario, make(scenario), loop).run()

    return run_in_virtual_time(loop, run())
