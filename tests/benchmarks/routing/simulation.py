"""A fleet of simulated engines under a workload, a policy and faults: events in the order of their times."""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from gateway.routing.polls import Poll
from tests.benchmarks.routing.engine import Engine, Gauges, Job
from tests.benchmarks.routing.policy import NOBODY, Held, Policy, Refused, Usage
from tests.benchmarks.routing.profiles import Member
from tests.benchmarks.routing.runs import Fault, Metric, Outcome, Refusal, Run, Scenario
from tests.benchmarks.routing.workloads import Conversation, Turn

DRAIN_SECONDS = 180.0  # how long answers may still take once nobody asks any more
PROBE_SECONDS, MOST_PROBED, LONGEST_PROBE_SECONDS = 0.25, 32, 60.0


@dataclass(slots=True)
class _Replica:
    member: Member
    engine: Engine
    jobs: dict[Job, Outcome] = field(default_factory=dict)
    alive: bool = True
    stepping: bool = False
    life: int = 0  # a step that a dead engine had planned is nobody's
    polled: bool = True
    lost: set[Metric] = field(default_factory=set)


class Simulation:
    """Owns the clock and the replicas."""

    def __init__(self, scenario: Scenario, policy: Policy) -> None:
        self.scenario, self.policy = scenario, policy
        self.now = 0.0
        self.outcomes: list[Outcome] = []
        self.replicas = {member.id: _Replica(member, Engine(member.profile)) for member in scenario.fleet.members}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = 0
        self._chance = random.Random(scenario.seed)
        self._held: dict[Outcome, frozenset[str]] = {}  # and who was tried already
        self._probed: list[tuple[Turn, Refusal]] = []
        self._places: dict[Outcome, Conversation] = {}  # of turns that are not over
        self._total = Gauges()

    def run(self) -> Run:
        """Run until all is answered, or nobody waits any longer for it."""
        self._begin()
        ends_at = self.scenario.seconds + DRAIN_SECONDS
        while self._events:
            at, _, happen = heapq.heappop(self._events)
            if at > ends_at or (at > self.scenario.seconds and not self._busy()):
                break
            self.now = at
            happen()
        for replica in self.replicas.values():
            self._count(replica.engine.gauges)
        total = self._total
        hits = total.hit_tokens / max(total.queried_tokens, 1)
        return Run(
            self.policy.name, self.scenario, self.outcomes, tuple(self.policy.switches()), total.preemptions, hits
        )

    def _busy(self) -> bool:
        return bool(self._places or self._probed)

    def _begin(self) -> None:
        self.policy.ready(tuple(self.replicas), 0.0)
        for conversation in self.scenario.conversations:
            self._at(conversation.at_seconds, partial(self._arrive, conversation, 0))
        for fault in self.scenario.faults:
            self._at(fault.at_seconds, partial(self._befall, fault))
        for replica in self.replicas.values():
            self._at(self._chance.random() * self.scenario.poll_seconds, partial(self._poll, replica))

    def _at(self, seconds: float, happen: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (seconds, self._numbers, happen))

    # Turns: asked, sent or held or refused, and what follows them.

    def _arrive(self, conversation: Conversation, number: int) -> None:
        if self.now > self.scenario.seconds:
            return
        outcome = Outcome(conversation.turns[number], self.now)
        self.outcomes.append(outcome)
        self._places[outcome] = conversation
        self._ask(outcome)

    def _ask(self, outcome: Outcome, tried: frozenset[str] = NOBODY) -> None:
        while True:
            decision = self.policy.choose(outcome.turn, self.now, tried)
            if isinstance(decision, Refused):
                self._refuse(outcome, decision)
                return
            if isinstance(decision, Held):
                self._hold(outcome, tried, decision)
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
            if not isinstance(self.policy.choose(turn, self.now), Refused):
                refusal.really_seconds = self.now - refusal.at_seconds
            elif self.now - refusal.at_seconds < LONGEST_PROBE_SECONDS:
                left.append((turn, refusal))
        self._probed = left
        if left:
            self._at(self.now + PROBE_SECONDS, self._probe)

    def _hold(self, outcome: Outcome, tried: frozenset[str], held: Held) -> None:
        self._held[outcome] = tried
        self._at(max(held.until_seconds, self.now + 1e-3), partial(self._decide_again, outcome))

    def _decide_again(self, outcome: Outcome) -> None:
        tried = self._held.pop(outcome, None)
        if tried is not None:
            self._ask(outcome, tried)

    def _give_up(self, outcome: Outcome) -> None:
        outcome.failed = True
        self._follow(outcome)

    def _follow(self, outcome: Outcome) -> None:
        """The next turn comes when this one was read; whoever got no answer goes on all the same."""
        conversation, number = self._places.pop(outcome), outcome.turn.number + 1
        if number < len(conversation.turns):
            self._at(self.now + outcome.turn.think_seconds, partial(self._arrive, conversation, number))

    # Engines: steps, polls, faults.

    def _step(self, replica: _Replica) -> None:
        seconds = replica.engine.begin()
        replica.stepping = seconds is not None
        if seconds is not None:
            self._at(self.now + seconds, partial(self._end_step, replica, replica.life))

    def _end_step(self, replica: _Replica, life: int) -> None:
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
        if made.ended and self._held:
            for outcome in list(self._held):
                self._decide_again(outcome)
        self._step(replica)

    def _poll(self, replica: _Replica) -> None:
        apart = self.scenario.poll_seconds * (1 + self.scenario.poll_jitter * (2 * self._chance.random() - 1))
        if self.now < self.scenario.seconds + DRAIN_SECONDS:
            self._at(self.now + apart, partial(self._poll, replica))
        if replica.alive and replica.polled:
            self.policy.polled(replica.member.id, _read(replica, self.now))

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

    def _kill(self, replica: _Replica) -> None:
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


def _read(replica: _Replica, now: float) -> Poll:
    """What the gateway reads off /metrics now."""
    gauges, lost = replica.engine.gauges, replica.lost
    return Poll(
        at_seconds=now,
        running=None if "running" in lost else float(gauges.running),
        waiting=None if "waiting" in lost else float(gauges.waiting),
        kv_usage=None if "kv_usage" in lost else gauges.kv_usage,
        kv_capacity_tokens=replica.member.profile.kv_capacity_tokens,
        read_tokens=float(gauges.prompt_tokens),
        generated_tokens=float(gauges.generated_tokens),
    )


def simulate(scenario: Scenario, policy: Policy) -> Run:
    """Run a policy through a scenario."""
    return Simulation(scenario, policy).run()
