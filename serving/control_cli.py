"""The verbs that reach running processes of this home: status, reload, restart, stop."""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from config.command_line import CommandParser, add_config, exit_codes, given_config
from config.load import home_directory
from serving.control import ControlReply, ControlRequest, ProcessStatus
from serving.control_client import ControlClient, running_processes
from serving.duration import duration
from serving.errors import NoAnswer
from serving.reload import ReloadResult
from serving.replica import State

DONE, FAILED, USAGE, TIMED_OUT, UNREACHABLE = 0, 1, 2, 5, 7
STOP_SECONDS = 600.0
# How long the outcome of a reload is waited for: new replicas may take minutes to start.
OUTCOME_SECONDS = 10.0
OUTCOME_POLL_SECONDS = 0.05
# Workers do not report outcomes to their parent. Between two SIGHUPs they have time to read and refuse the
# configuration; the second one has to come within 10 s.
WORKERS_SECONDS = 2.0
Answers = list[tuple[ControlClient, ControlReply]]
NOT_RUNNING = "nothing runs in this home"


def status_main(arguments: list[str]) -> int:
    """Show the running processes of this home."""
    parser = status_parser()
    options = parser.parse_args(arguments)

    def show(answers: Answers) -> int:
        statuses = [reply.status for _, reply in answers]
        if options.json:
            print(json.dumps(msgspec.to_builtins(statuses), indent=2))
        else:
            print("\n".join(map(status_text, statuses)))
        ready = all(each.state == State.READY for status in statuses for each in status.replicas)
        return DONE if ready else FAILED

    return _ask(ControlRequest("status"), given_config(parser, options), show)


def status_parser() -> CommandParser:
    """Describe `quantgate status`."""
    parser = _parser(
        "status",
        "Show the running `quantgate up`, `serve`, `gateway` and `demo` of this home ($QUANTGATE_HOME): process, "
        "configuration, addresses, and which replicas are ready or what they wait for.",
        exit_codes(2, code_0="all replicas are ready", code_1="a replica is not ready", code_7=NOT_RUNNING),
        "quantgate status --json",
    )
    add_config(parser, "only processes with this configuration file")
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    return parser


def reload_main(arguments: list[str]) -> int:
    """Have running processes read their configuration again."""
    parser = reload_parser()
    options = parser.parse_args(arguments)

    def show(answers: Answers) -> int:
        results = [(reply, _reloaded(client, reply, force=options.force)) for client, reply in answers]
        if options.json:
            print(json.dumps([_reload_object(reply, result) for reply, result in results], indent=2))
        code = DONE
        for reply, result in results:
            applied = result is None or result.outcome == "applied"
            if options.json and applied:
                continue
            if result is None:
                print(f"{_name(reply.status)}: reads {reply.status.config} again; its log has the outcome")
            elif result.outcome == "applied":
                print(f"{_name(reply.status)}: {reply.status.config} is in force")
            else:
                code = FAILED
                _complain(ControlRequest("reload"), f"{_name(reply.status)}: {result.message}")
        return code

    return _ask(ControlRequest("reload"), given_config(parser, options), show)


def _reload_object(reply: ControlReply, result: ReloadResult | None) -> dict[str, object]:
    """A process of `reload --json`; without a result its outcome is `requested`."""
    outcome, message = ("requested", "") if result is None else (result.outcome, result.message)
    status = reply.status
    return {
        "command": status.command,
        "pid": status.pid,
        "config": status.config,
        "outcome": outcome,
        "message": message,
    }


def reload_parser() -> CommandParser:
    """Describe `quantgate reload`."""
    parser = _parser(
        "reload",
        "Have the running processes of this home ($QUANTGATE_HOME) read their configuration again, as SIGHUP does. "
        "Replicas that wait for their next start are started at once. Waits up to 10 s for the outcome; new replicas "
        "may take longer to start, and workers do not report it: then the log has it.",
        exit_codes(2, code_0="applied, or requested", code_1="refused, failed, or no answer", code_7=NOT_RUNNING),
        "quantgate reload quantgate.yaml",
    )
    add_config(parser, "only processes with this configuration file")
    parser.add_argument(
        "--force", action="store_true", help="as two SIGHUPs: apply what was refused because nothing would remain"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array")
    return parser


def _reloaded(client: ControlClient, reply: ControlReply, *, force: bool) -> ReloadResult | None:
    """Wait for the outcome of a reload, and request it again if `force` and it may be confirmed; None: not known."""
    before = reply.status.reload
    if before is None:
        if force:
            time.sleep(WORKERS_SECONDS)
            client.ask(ControlRequest("reload"))
        return None
    result = _outcome(client, before.handled)
    if force and result is not None and result.confirmable:
        client.ask(ControlRequest("reload"))
        return _outcome(client, result.handled)
    return result


def _outcome(client: ControlClient, handled: int) -> ReloadResult | None:
    """Wait until a process has handled more SIGHUPs than that."""
    deadline = time.monotonic() + OUTCOME_SECONDS
    while time.monotonic() < deadline:
        result = client.ask(ControlRequest("status")).status.reload
        if result is None or result.handled > handled:
            return result
        time.sleep(OUTCOME_POLL_SECONDS)
    return None


def restart_main(arguments: list[str]) -> int:
    """Start a replica again."""
    replica: str = restart_parser().parse_args(arguments).replica

    def show(answers: Answers) -> int:
        for _, reply in answers:
            print(f"{replica}: {reply.message}")
        return DONE

    return _ask(ControlRequest("restart", replica), None, show)


def restart_parser() -> CommandParser:
    """Describe `quantgate restart`."""
    parser = _parser(
        "restart",
        "Start a replica again: at once if it waits after a failure; if it is ready, it finishes its requests first. "
        "`quantgate ps --watch` shows how it goes on.",
        exit_codes(code_0="requested", code_1="no answer", code_2="no such replica", code_7=NOT_RUNNING),
        "quantgate restart qwq-int4-1",
    )
    parser.add_argument("replica", metavar="REPLICA", help="as `quantgate ps` names it")
    return parser


def stop_main(arguments: list[str]) -> int:
    """Stop running processes, and wait until they have ended."""
    parser = stop_parser()
    options = parser.parse_args(arguments)

    def wait(answers: Answers) -> int:
        ended = True
        for client, reply in answers:
            if client.ended_within(options.timeout):
                print(f"{_name(reply.status)}: stopped")
            else:
                ended = False
                _complain(
                    ControlRequest("stop"),
                    f"{_name(reply.status)} still runs after {options.timeout:g} s; it goes on stopping",
                )
        return DONE if ended else TIMED_OUT

    return _ask(ControlRequest("stop"), given_config(parser, options), wait)


def stop_parser() -> CommandParser:
    """Describe `quantgate stop`."""
    parser = _parser(
        "stop",
        "Stop the running processes of this home ($QUANTGATE_HOME), as SIGTERM does, and wait until they have ended: "
        "running requests finish first, for at most drain_seconds, then replicas stop.",
        exit_codes(2, code_0="stopped", code_1="no answer", code_5="still stopping", code_7=NOT_RUNNING),
        "quantgate stop --timeout 60",
    )
    add_config(parser, "only processes with this configuration file")
    parser.add_argument(
        "--timeout", type=_seconds, default=STOP_SECONDS, metavar="SECONDS", help="how long to wait (default: 600)"
    )
    return parser


def _ask(request: ControlRequest, config: Path | None, show: Callable[[Answers], int]) -> int:
    """Send a request to the processes of this home, or to those that run a configuration; return the exit code.

    `show` prints the replies of those that obey.
    """
    home = home_directory()
    try:
        with running_processes(home) as clients:
            chosen = [client for client in clients if _runs(client, config)]
            if not chosen:
                what = f"with {config} " if config else ""
                _complain(request, f"no process {what}runs in {home}; QUANTGATE_HOME chooses another home")
                return UNREACHABLE
            answers = [(client, client.ask(request)) for client in chosen]
            return _shown(request, answers, show)
    except NoAnswer as error:
        _complain(request, str(error))
        return FAILED


def _shown(request: ControlRequest, answers: Answers, show: Callable[[Answers], int]) -> int:
    """Show the replies, refusals on stderr. Only one process has a replica: other processes refuse its restart."""
    refused = [reply for _, reply in answers if reply.error]
    obeyed = [(client, reply) for client, reply in answers if not reply.error]
    code = show(obeyed) if obeyed else DONE
    if not refused or (obeyed and request.action == "restart"):
        return code
    for reply in refused:
        _complain(request, f"{_name(reply.status)}: {reply.error}")
    return code or (USAGE if request.action == "restart" else FAILED)


def _runs(client: ControlClient, config: Path | None) -> bool:
    return config is None or client.ask(ControlRequest("status")).status.config == str(config.resolve())


def status_text(status: ProcessStatus) -> str:
    """Describe a process: one line for it, one for its addresses, one for each replica that is not ready."""
    lines = [f"{_name(status)}, {status.config or 'its own configuration'}, for {duration(status.seconds)}"]
    lines += [f"  {name}: {address}" for name, address in status.addresses.items()]
    counts = Counter(each.state for each in status.replicas)
    if counts:
        lines.append("  replicas: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))
    waiting = [each for each in status.replicas if each.state != State.READY]
    lines += [f"    {each.id}: {each.state} for {duration(each.seconds)}: {each.reason}" for each in waiting]
    return "\n".join(lines)


def _name(status: ProcessStatus) -> str:
    return f"quantgate {status.command} (process {status.pid})"


def _parser(verb: str, description: str, epilog: str, *examples: str) -> CommandParser:
    return CommandParser(prog=f"quantgate {verb}", description=description, epilog=epilog, examples=examples)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise ValueError
    return seconds


def _complain(request: ControlRequest, line: str) -> None:
    print(f"quantgate {request.action}: {line}", file=sys.stderr)
