"""The verb `rollout`: start, watch and steer rollouts, and look back at them."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from config.command_line import DEFAULT_CONFIG, CommandParser, exit_codes
from config.errors import ConfigError
from config.load import load_file
from gateway.cli.admin_client import AdminClient, AdminUnavailable
from gateway.rollout.machine import FINAL, Event, Phase, Refused
from gateway.rollout.operating import GateRefused, Operator, Replacement
from gateway.rollout.plan import PlanSettings, RolloutPlan, expected_minutes, parse_seconds
from gateway.rollout.status import RolloutReader, history_rows, show_history, show_status
from serving.errors import RolloutChanged, RolloutExists, StateAway

DONE, FAILED, USAGE, GATE, LOCKED = 0, 1, 2, 3, 4
WATCH_SECONDS = 1.0
RATE_SECONDS = 3.0
CODES = exit_codes(
    0,
    2,
    code_1="failed, or not possible now",
    code_3="a gate said no",
    code_4="another rollout of the alias is active",
)
STEERING = {
    "pause": (Event.PAUSE, "keep the weight as it is; gates still end a rollout that fails"),
    "resume": (Event.RESUME, "go on after a pause"),
    "promote": (Event.PROMOTE, "begin the next step now"),
    "abort": (Event.ABORT, "go back to the old variant"),
}


def rollout_main(arguments: list[str]) -> int:
    """Run one of the verbs; exit codes as in the help."""
    options = rollout_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except ConfigError as error:
        return _problem(str(error), USAGE)
    except GateRefused as error:
        return _problem(str(error), GATE)
    except RolloutExists as error:
        return _problem(str(error), LOCKED)
    except (Refused, RolloutChanged, StateAway, AdminUnavailable) as error:
        return _problem(str(error), FAILED)
    except KeyboardInterrupt:
        return DONE


def _problem(text: str, code: int) -> int:
    for line in text.splitlines():
        print(f"quantgate rollout: {line}", file=sys.stderr)
    return code


# The verbs


def _plan(options: argparse.Namespace) -> int:
    """Print what a rollout would do; nothing is changed."""
    operator = Operator.of(options.config)
    try:
        plan = operator.plan(_target(options), _settings(options))
        problems = operator.problems(plan)
        active = operator.database.latest(plan.alias)
    finally:
        operator.close()
    rate = options.rate if options.rate is not None else _measured_rate(options.config, plan.alias)
    minutes = expected_minutes(plan.settings, rate or 0.0)
    running = active.id if active is not None and active.active else None
    if options.json:
        payload = {
            "plan": plan.model_dump(mode="json"),
            "conversations_per_second": rate,
            "expected_minutes": [each if math.isfinite(each) else None for each in minutes],
            "problems": problems,
            "active": running,
        }
        print(json.dumps(payload))
    else:
        _show_plan(plan, rate, minutes, problems)
    if running:
        return _problem(f"rollout {running} of {plan.alias} is active", LOCKED)
    return GATE if problems else DONE


def _start(options: argparse.Namespace) -> int:
    operator = Operator.of(options.config, create=True)
    try:
        plan = operator.plan(_target(options), _settings(options))
        if not plan.settings.compare:
            print(f"quantgate rollout: gates and comparison are off: nothing stops {plan.new} but you", file=sys.stderr)
        record = operator.start(plan, options.reason)
        return _begun(operator, options, record.id)
    finally:
        operator.close()


def _retry(options: argparse.Namespace) -> int:
    operator = Operator.of(options.config)
    try:
        return _begun(operator, options, operator.retry(options.alias, options.reason).id)
    finally:
        operator.close()


def _begun(operator: Operator, options: argparse.Namespace, rollout_id: str) -> int:
    if options.wait:
        return _wait(operator, options, rollout_id)
    if options.json:
        print(json.dumps({"rollout": rollout_id, "phase": Phase.PREFLIGHT.value}))
    else:
        print(f"{rollout_id} has begun; `quantgate rollout status {options.alias} -w` follows it")
    return DONE


def _status(options: argparse.Namespace) -> int:
    operator = Operator.of(options.config)
    try:
        if options.watch or options.wait:
            return _wait(operator, options, operator.latest(options.alias).id)
        status = RolloutReader(operator.database).status(operator.latest(options.alias), time.time())
        show_status(status, as_json=options.json)
        return _code(status["phase"])
    finally:
        operator.close()


def _wait(operator: Operator, options: argparse.Namespace, rollout_id: str) -> int:
    """Print a rollout whenever it changes, until it ends."""
    shown: object = None
    reader = RolloutReader(operator.database)
    while True:
        record = operator.database.get(rollout_id)
        if record is None:
            raise Refused(f"rollout {rollout_id} is gone from the state database")
        status = reader.status(record, time.time())
        mark = (record.version, status["canary_conversations"]) if options.watch else record.version
        if mark != shown:
            shown = mark
            show_status(status, as_json=options.json)
        if Phase(record.phase) in FINAL:
            return _code(record.phase)
        time.sleep(WATCH_SECONDS)


def _code(phase: str) -> int:
    return GATE if phase in (Phase.ROLLED_BACK, Phase.FAILED) else DONE


def _steer(options: argparse.Namespace) -> int:
    event = Event.PROMOTE_FULL if getattr(options, "full", False) else Event(options.event)
    operator = Operator.of(options.config)
    try:
        if event is Event.PROMOTE_FULL:
            print("quantgate rollout: promoting without gates: no comparison decides any more", file=sys.stderr)
        state = operator.steer(options.alias, event, options.reason)
    finally:
        operator.close()
    payload = {"alias": options.alias, "event": event.value, "phase": state.phase.value, "step": state.step}
    print(json.dumps(payload) if options.json else f"{options.alias}: {state.phase.value}")
    return DONE


def _undo(options: argparse.Namespace) -> int:
    operator = Operator.of(options.config)
    try:
        done = operator.undo(options.alias, options.to_revision, options.reason)
    finally:
        operator.close()
    print(json.dumps({"alias": options.alias, "undo": done}) if options.json else f"{options.alias}: {done}")
    return DONE


def _history(options: argparse.Namespace) -> int:
    operator = Operator.of(options.config)
    try:
        operator.ladder(options.alias)
        rows = history_rows(operator.database, options.alias, options.limit)
    finally:
        operator.close()
    show_history(rows, as_json=options.json)
    return DONE


# Options


def _target(options: argparse.Namespace) -> Replacement:
    ladder = tuple(filter(None, (options.ladder or "").split(",")))
    if bool(options.variant) == bool(ladder):
        raise ConfigError("name the new variant, or the new ladder with --ladder")
    return Replacement(options.alias, options.variant, options.replaces, ladder)


def _settings(options: argparse.Namespace) -> PlanSettings:
    """The plan file with the options of the command line, which come first."""
    base = load_file(options.file, PlanSettings, lambda _: ()) if options.file else PlanSettings()
    given = {
        "steps": tuple(options.steps.split(",")) if options.steps else None,
        "step_seconds": options.step_seconds,
        "stall_seconds": options.stall_seconds,
        "shadow": options.shadow,
        "on_fail": options.on_fail,
        "keep": options.keep,
        "skip": tuple(options.skip) or None,
        "compare": False if options.no_compare else None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    try:
        return PlanSettings.model_validate({**base.model_dump(), **changes})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the plan"
        raise ConfigError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def _measured_rate(config: Path, alias: str) -> float | None:
    """Requests per second of an alias now, as a running gateway counts them; None without one."""
    try:
        client = AdminClient.of(config)
        before, began = _requests(client, alias), time.monotonic()
        time.sleep(RATE_SECONDS)
        return (_requests(client, alias) - before) / (time.monotonic() - began)
    except (AdminUnavailable, ConfigError):
        return None


def _requests(client: AdminClient, alias: str) -> float:
    label = f'alias="{alias}"'

    def total(page: bytes) -> float:
        lines = page.decode().splitlines()
        counts = [line for line in lines if line.startswith("quantgate_requests_total{") and label in line]
        return sum(float(line.rpartition(" ")[2]) for line in counts)

    return client.decode(client.read("/metrics"), total)


def _show_plan(plan: RolloutPlan, rate: float | None, minutes: tuple[float, ...], problems: tuple[str, ...]) -> None:
    settings = plan.settings
    print(f"{plan.alias}: {plan.old} -> {plan.new}; ladder {', '.join(plan.stable)} -> {', '.join(plan.final)}")
    for percent, each in zip(settings.steps, minutes, strict=True):
        print(f"  {percent:g} %: {f'about {each:.0f} min' if math.isfinite(each) else 'no end without traffic'}")
    gates = ", ".join(gate.name for gate in settings.gates()) or "none"
    print(f"  gates: {gates}")
    print(f"  traffic: {'unknown; --rate N assumes one' if rate is None else f'{rate:.3g} requests/s'}")
    print(f"  on failure: {settings.on_fail}; the old variant is kept for {settings.keep / 60:.0f} min")
    for problem in problems:
        print(f"  no: {problem}")


EXAMPLES = {
    "plan": ("quantgate rollout plan qwq-32b qwq-int4-v2 --rate 2",),
    "start": ("quantgate rollout start qwq-32b qwq-int4-v2 --replaces qwq-int4 --wait",),
    "status": ("quantgate rollout status qwq-32b --watch",),
    "pause": ("quantgate rollout pause qwq-32b --reason 'incident 42'",),
    "resume": ("quantgate rollout resume qwq-32b",),
    "promote": ("quantgate rollout promote qwq-32b --full",),
    "abort": ("quantgate rollout abort qwq-32b --reason 'answers are too long'",),
    "retry": ("quantgate rollout retry qwq-32b",),
    "undo": ("quantgate rollout undo qwq-32b --to-revision 3",),
    "history": ("quantgate rollout history qwq-32b --limit 10",),
}


def rollout_parser() -> CommandParser:
    """Describe `quantgate rollout`."""
    parser = CommandParser(
        prog="quantgate rollout",
        description="Replace a variant behind an alias in steps that are gated by measurements. Gateways drive "
        "rollouts: this command records what you want, and may end.",
        examples=["quantgate rollout start qwq-32b qwq-int4-v2 --wait", "quantgate rollout status qwq-32b"],
        epilog=CODES,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_planned(_verb(verbs, "plan", _plan, "print what a rollout would do, and how long it may take"))
    verbs.choices["plan"].add_argument(
        "--rate", type=_positive, metavar="N", help="conversations per second to assume (default: requests now)"
    )
    start = _verb(verbs, "start", _start, "start a rollout")
    _add_planned(start)
    _add_wait(start)
    status = _verb(verbs, "status", _status, "show a rollout: step, gates, and what they still need")
    status.add_argument("-w", "--watch", action="store_true", help="go on until it ends")
    status.add_argument("--wait", action="store_true", help="print each transition until it ends")
    for name, (event, purpose) in STEERING.items():
        verb = _verb(verbs, name, _steer, purpose)
        verb.set_defaults(event=event.value)
        _add_reason(verb)
    verbs.choices["promote"].add_argument("--full", action="store_true", help="promote now, without gates")
    retry = _verb(verbs, "retry", _retry, "start the last rollout again")
    _add_wait(retry)
    undo = _verb(verbs, "undo", _undo, "go back to an earlier revision at once, without gates")
    undo.add_argument("--to-revision", type=int, metavar="N", help="as `history` lists them (default: the last other)")
    _add_reason(undo)
    history = _verb(verbs, "history", _history, "list revisions and events")
    history.add_argument("-n", "--limit", type=int, default=50, metavar="N", help="events (default: %(default)s)")
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], int], purpose: str) -> argparse.ArgumentParser:
    description = purpose[0].upper() + purpose[1:] + "."
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=purpose, description=description, examples=EXAMPLES[name], epilog=CODES
    )
    parser.add_argument("alias", metavar="ALIAS")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def _add_reason(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", default="", metavar="TEXT", help="why, for the log")


def _add_wait(parser: argparse.ArgumentParser) -> None:
    _add_reason(parser)
    parser.add_argument("--wait", action="store_true", help="print each transition until it ends; see the exit codes")
    parser.set_defaults(watch=False)


def _add_planned(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("variant", metavar="NEW_VARIANT", nargs="?", help="a variant of the configuration")
    parser.add_argument("--replaces", metavar="OLD", help="variant of the ladder (default: of the same precision)")
    parser.add_argument("--ladder", metavar="A,B,...", help="change the ladder to this one instead")
    parser.add_argument("--steps", metavar="1,5,...", help="percentages of conversations (default: 1,5,25,50,100)")
    parser.add_argument("--step-seconds", type=_duration, metavar="N", help="least time of a step (default: 300)")
    parser.add_argument("--stall-seconds", type=_duration, metavar="N", help="pause without data (default: 600)")
    parser.add_argument(
        "--shadow", type=_positive, metavar="SHARE", help="share of answers to score on NEW (default: 0)"
    )
    parser.add_argument("--on-fail", choices=("rollback", "pause"), help="default: rollback")
    parser.add_argument("--keep", type=_duration, metavar="TIME", help="keep the old variant for so long (default: 1h)")
    parser.add_argument("--skip", action="append", default=[], metavar="GATE", help="do not judge a gate")
    parser.add_argument("--no-compare", action="store_true", help="do not compare with the old variant: it is broken")
    parser.add_argument("--file", type=Path, metavar="PLAN", help="plan file (YAML); options replace what it says")


def _duration(text: str) -> float:
    try:
        return float(str(parse_seconds(text)))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value
