"""Metrics of rollouts, computed at each scrape."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from gateway.observability.metrics import table
from gateway.rollout.controller import Driver
from gateway.rollout.follower import RolloutFollower
from gateway.rollout.machine import Phase, carries_traffic, split
from gateway.rollout.record import UnreadableRecord, read_plan, read_state

VERDICTS = ("pass", "fail", "more")
STUCK = frozenset({Phase.PAUSED, Phase.HOLDING})


@dataclass(frozen=True, slots=True, eq=False)
class RolloutCollector(Collector):
    """Exposes the active rollouts, the gates of those that this process drives, and whether the database is there.

    Without a state database, the families have no samples.
    """

    follower: RolloutFollower | None = None
    driver: Driver | None = None

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the families; called once per scrape."""
        up = table.STATE_DATABASE_UP.gauge_family()
        if self.follower is not None:
            up.add_metric([], float(self.follower.away is None))
        yield up
        yield from self._states()
        yield from self._gates()

    def _states(self) -> Iterator[GaugeMetricFamily]:
        step, weight = table.ROLLOUT_STEP.gauge_family(), table.ROLLOUT_WEIGHT.gauge_family()
        stuck = table.ROLLOUT_STUCK.gauge_family()
        for record in self.follower.snapshot.active if self.follower else ():
            try:
                state, plan = read_state(record), read_plan(record)
            except UnreadableRecord:
                continue  # the driver's log and the status say so
            labels = [record.alias, plan.new]
            step.add_metric(labels, state.step + 1 if carries_traffic(state) else 0)
            weight.add_metric(labels, split(state, plan).weight)
            stuck.add_metric([record.alias], float(state.phase in STUCK))
        yield from (step, weight, stuck)

    def _gates(self) -> Iterator[GaugeMetricFamily]:
        evidence, states = table.ROLLOUT_GATE_LOG_EVIDENCE.gauge_family(), table.ROLLOUT_GATE_STATE.gauge_family()
        for job in self.driver.jobs.values() if self.driver else ():
            for gate in job.progress.gates:
                labels = [job.plan.alias, gate.settings.name]
                evidence.add_metric(labels, gate.log_e)
                for verdict in VERDICTS:
                    states.add_metric([*labels, verdict], float(gate.verdict == verdict))
        yield from (evidence, states)
