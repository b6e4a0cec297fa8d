"""What `rollout status` and `rollout history` print."""

import json
from collections.abc import Container
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from gateway.rollout.controller import REREAD_SECONDS
from gateway.rollout.gates import MAX_NEEDED, EventGate, Gate, MeanGate
from gateway.rollout.machine import FINAL, Phase, RolloutState, deadline, split
from gateway.rollout.plan import RolloutPlan
from gateway.rollout.progress import Progress, missing_for_shadow, missing_for_step
from gateway.rollout.record import UnreadableRecord, read_plan, read_state, unreadable
from gateway.rollout.revision import read_revision
from serving.state.rollout_records import RolloutRecord
from serving.state.rollouts import RolloutDatabase


@dataclass(slots=True)
class Evidence:
    """The evidence of a rollout that has been read; `problem` is why it cannot be."""

    progress: Progress
    read_until: float = 0.0
    problem: str = ""


@dataclass(slots=True, eq=False)
class RolloutReader:
    """Describes rollouts. It keeps their evidence, so that each further look reads only blocks written since."""

    database: RolloutDatabase
    _evidence: dict[str, Evidence] = field(default_factory=dict, init=False)

    def status(self, record: RolloutRecord, now: float) -> dict[str, Any]:
        """Describe a rollout: from its record, and from the evidence that all workers wrote. UnreadableRecord."""
        plan, state = read_plan(record), read_state(record)
        progress = self._progress(record.id, plan, now)
        return _status(record, plan, state, progress, self.database.lease_holder(record.alias, now), now)

    def keep(self, rollouts: Container[str]) -> None:
        """Forget the evidence of all rollouts but these."""
        self._evidence = {name: each for name, each in self._evidence.items() if name in rollouts}

    def _progress(self, rollout_id: str, plan: RolloutPlan, now: float) -> Progress:
        evidence = self._evidence.setdefault(rollout_id, Evidence(Progress(plan)))
        if evidence.problem:
            raise UnreadableRecord(evidence.problem)
        since = evidence.read_until - REREAD_SECONDS if evidence.read_until else 0.0
        try:
            evidence.progress.add(self.database.blocks(rollout_id, since))
        except (msgspec.DecodeError, IndexError) as error:
            problem = unreadable(f"the evidence of rollout {rollout_id}", str(error))
            evidence.problem = str(problem)
            raise problem from error
        evidence.read_until = now
        return evidence.progress


def unreadable_status(record: RolloutRecord, error: UnreadableRecord) -> dict[str, Any]:
    """Describe a rollout that this version cannot read, with the fields of any other; unknown ones are empty."""
    return {
        "rollout": record.id,
        "alias": record.alias,
        "old": "unknown",
        "new": "unknown",
        "phase": record.phase,
        "phase_seconds": None,
        "deadline_seconds": None,
        "step": 0,
        "steps": [],
        "weight": 0.0,
        "failure": f"unreadable: {error}",
        "pause": "",
        "stuck": False,
        "driver": None,
        "canary_conversations": 0,
        "stable_conversations": 0,
        "waits_for": "",
        "gates": [],
    }


def _status(
    record: RolloutRecord, plan: RolloutPlan, state: RolloutState, progress: Progress, driver: str | None, now: float
) -> dict[str, Any]:
    seconds = max(now - state.step_since, 1.0) if state.step_since else 0.0
    rate = progress.canary_by_step.get(state.step, 0) / seconds if seconds else 0.0
    final = state.phase in FINAL
    return {
        "rollout": record.id,
        "alias": record.alias,
        "old": plan.old,
        "new": plan.new,
        "phase": state.phase.value,
        "phase_seconds": round(now - state.since, 1),
        "deadline_seconds": None if final else round(deadline(state, plan) - now, 1),
        "step": state.step,
        "steps": list(plan.settings.steps),
        "weight": split(state, plan).weight,
        "failure": state.failure,
        "pause": state.pause,
        "stuck": state.stuck,
        "driver": driver,
        "canary_conversations": progress.canary,
        "stable_conversations": progress.stable,
        "waits_for": _missing(state, plan, progress, now),
        "gates": [_gate(gate, rate) for gate in progress.gates],
    }


def _missing(state: RolloutState, plan: RolloutPlan, progress: Progress, now: float) -> str:
    if state.phase is Phase.SHADOW:
        return missing_for_shadow(plan, progress)
    return missing_for_step(state, plan, progress, now) if state.phase is Phase.CANARY else ""


def _gate(gate: Gate, conversations_per_second: float) -> dict[str, Any]:
    payload: dict[str, Any] = {
        "name": gate.settings.name,
        "verdict": gate.verdict,
        "log_evidence": round(gate.log_e, 3),
    }
    if gate.verdict == "more":
        count = gate.needed_conversations()
        needed = count if count < MAX_NEEDED else None  # None: nothing is known of its variance yet
        minutes = needed / conversations_per_second / 60 if needed and conversations_per_second else None
        payload |= {"needs_conversations": needed, "needs_minutes": None if minutes is None else round(minutes, 1)}
    if isinstance(gate, EventGate):
        return payload | {"canary": list(gate.canary), "stable": list(gate.stable)}
    assert isinstance(gate, MeanGate)
    return payload | {"ratio": None if gate.interval is None else [round(each, 4) for each in gate.interval]}


def show_status(status: dict[str, Any], *, as_json: bool) -> None:
    """Print a status: one line of JSON, or a table."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if as_json:
        console.print(json.dumps(status))
        return
    step = f"step {status['step'] + 1} of {len(status['steps'])}, {100 * status['weight']:g} %"
    console.print(f"{status['rollout']} {status['alias']}: {status['old']} -> {status['new']}")
    console.print(f"{status['phase']} for {status['phase_seconds']:.0f} s, {step}")
    arms = f"{status['canary_conversations']} canary, {status['stable_conversations']} stable"
    console.print(f"conversations: {arms}; driver: {status['driver'] or 'none (no gateway runs)'}")
    for name in ("failure", "pause", "waits_for"):
        if status[name]:
            console.print(f"{name.replace('_', ' ')}: {status[name]}")
    if status["canary_conversations"]:
        console.print(_gates_table(status["gates"]))


def _gates_table(gates: list[dict[str, Any]]) -> Table:
    table = Table("gate", "verdict", "canary", "stable", "ratio", "needs", box=None, pad_edge=False)
    for gate in gates:
        canary, stable = (_share(gate.get(arm)) for arm in ("canary", "stable"))
        ratio = gate.get("ratio")
        needs = f"{gate['needs_conversations'] or 'many'} more conversations" if "needs_conversations" in gate else ""
        if gate.get("needs_minutes") is not None:
            needs += f", about {gate['needs_minutes']:.0f} min"
        interval = "" if ratio is None else f"{ratio[1]:.3f} ({ratio[0]:.3f} to {ratio[2]:.3f})"
        table.add_row(gate["name"], gate["verdict"], canary, stable, interval, needs)
    return table


def _share(counts: list[int] | None) -> str:
    return "" if counts is None else f"{counts[0]} of {counts[1]}"


def history_rows(database: RolloutDatabase, alias: str, limit: int) -> dict[str, Any]:
    """The revisions of an alias, newest first, and the latest entries of its log, oldest first."""
    revisions = []
    for record in database.revisions(alias, limit):
        revision = read_revision(record)
        revisions.append(
            {
                "revision": record.number,
                "ladder": list(revision.stable),
                "canary": None if revision.canary is None else list(revision.canary),
                "weight": revision.weight,
                "rollout": record.rollout,
                "cause": record.cause,
                "by": record.created_by,
                "at": _time(record.created_at),
            }
        )
    events = [
        {
            "at": _time(entry.at),
            "by": entry.by,
            "rollout": entry.rollout,
            "event": entry.event,
            "phase": entry.phase,
            "why": entry.why,
            "figures": json.loads(entry.figures),
        }
        for entry in database.entries(alias, limit)
    ]
    return {"alias": alias, "revisions": revisions, "events": events}


def show_history(rows: dict[str, Any], *, as_json: bool) -> None:
    """Print revisions and events."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if as_json:
        console.print(json.dumps(rows))
        return
    for each in rows["revisions"]:
        share = "" if each["canary"] is None else f", {100 * each['weight']:g} % {each['canary'][0]}..."
        console.print(f"revision {each['revision']}: {', '.join(each['ladder'])}{share} ({each['at']}, {each['by']})")
    for each in rows["events"]:
        console.print(f"{each['at']} {each['rollout'] or '-'} {each['event']} -> {each['phase']}: {each['why']}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
