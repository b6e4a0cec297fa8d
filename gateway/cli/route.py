"""The verb `route`: explain a decision, or print the state that decisions are made on."""

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from config.command_line import DEFAULT_CONFIG, CommandParser, exit_codes
from config.errors import ConfigError
from gateway.cli.admin_client import AdminClient, AdminUnavailable
from gateway.cli.route_table import show
from gateway.errors import GatewayError, RequestError
from gateway.keys import Caller
from gateway.openai.constraints import FLOOR_HEADER, PRECISION_HEADER, parse_floor, parse_precisions
from gateway.proxy.routing_features import SESSION_HEADER, session_from_name
from gateway.routing.explain import Explanation, explain, explain_recorded
from gateway.routing.request import RoutingRequest
from gateway.routing.snapshot import Snapshot, floor_from, read_snapshot
from serving.foreground import USAGE

DONE, FAILED, GATE = 0, 1, 3
ROUTING = "/admin/routing"
ANSWER = "the gateway's answer"
ROUTING_HEADERS = frozenset({SESSION_HEADER, FLOOR_HEADER.encode(), PRECISION_HEADER.encode()})
SECRET_HEADERS = frozenset({b"authorization", b"x-api-key", b"api-key"})
CODES = exit_codes(
    0, 2, code_1="no replica can answer now, or no gateway does", code_3="no variant that is good enough can answer"
)


def route_main(arguments: list[str]) -> int:
    """Exit codes: 0; 1 no replica can answer now, or no gateway does; 2 usage; 3 no variant is good enough."""
    parser = route_parser()
    options = parser.parse_args(arguments)
    if options.verb == "explain" and (what := _misuse(options)):
        parser.error(what)
    try:
        return _explain(options) if options.verb == "explain" else _state(options)
    except AdminUnavailable as error:
        print(f"quantgate route: {error}", file=sys.stderr)
        return FAILED
    except (ConfigError, GatewayError) as error:
        print(f"quantgate route: {error}", file=sys.stderr)
        return USAGE


def explain_hypothetical(
    snapshot: Snapshot, model: str, headers: dict[bytes, bytes], key: str | None, prompt_tokens: int, length: int | None
) -> Explanation:
    """Explain the decision on a request that was not sent; errors are those that the request would get."""
    caller = _caller(snapshot, key)
    caller.check_model(model)
    target = snapshot.target(model)
    floors, precisions = (caller.floor, parse_floor(headers)), parse_precisions({}, headers)
    name = headers.get(SESSION_HEADER)
    session = None if name is None else session_from_name(name, caller.name)
    request = RoutingRequest(
        target,
        target.filter(floors, precisions).permitted,
        prompt_tokens=float(prompt_tokens),
        answer_tokens=caller.max_tokens if length is None else length,
        session=session,
        floors=floors,
        precisions=precisions,
        placement=None if session is None else snapshot.sessions.get(session),
    )
    wait_seconds = snapshot.models[model].wait_seconds
    return explain(request, snapshot.cluster(), snapshot.now_seconds, absent=snapshot.absent, wait_seconds=wait_seconds)


def _caller(snapshot: Snapshot, key: str | None) -> Caller:
    if key is None:
        return Caller()
    view = snapshot.callers.get(key)
    if view is None:
        known = ", ".join(sorted(snapshot.callers)) or "none"
        raise RequestError(f"there is no key named {key!r}; known: {known}")
    return Caller(key, view.models, floor_from(view.floor), view.max_tokens)


def _explain(options: argparse.Namespace) -> int:
    text = options.state.read_bytes() if options.state else _fetch(options)
    snapshot = read_snapshot(text, str(options.state or ANSWER))
    if options.save:
        options.save.write_bytes(text)
    explanation = _explanation(snapshot, options)
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(explanation)).decode())
    else:
        what = "decided" if snapshot.request else "state"
        show(explanation, f"{what} of {snapshot.recorded:%Y-%m-%d %H:%M:%S} UTC")
    if explanation.chosen is not None:
        return DONE
    return FAILED if explanation.rungs else GATE


def _explanation(snapshot: Snapshot, options: argparse.Namespace) -> Explanation:
    request = snapshot.request
    if request is None:
        if options.model is None:
            raise ConfigError(f"MODEL is missing; there are: {', '.join(snapshot.models)}")
        return explain_hypothetical(
            *(snapshot, options.model, dict(options.header), options.key, options.prompt_tokens, options.max_tokens)
        )
    if options.model not in {None, request.model}:
        raise ConfigError(f"the request {request.id} was for model {request.model!r}, not {options.model!r}")
    explanation = explain_recorded(snapshot)
    if request.chosen != (explanation.chosen.replica if explanation.chosen else None):
        print(
            f"quantgate route: the gateway chose {request.chosen}: another version of quantgate decided",
            file=sys.stderr,
        )
    return explanation


def _state(options: argparse.Namespace) -> int:
    sys.stdout.buffer.write(_fetch(options) + b"\n")
    return DONE


def _fetch(options: argparse.Namespace) -> bytes:
    path = f"{ROUTING}/{options.request}" if options.request else ROUTING
    client = AdminClient.of(options.config, options.admin)
    text = client.read(path)
    client.decode(text, lambda body: read_snapshot(body, ANSWER))
    return text


def _misuse(options: argparse.Namespace) -> str | None:
    """Return what is wrong with a combination of options."""
    if options.request and options.state:
        return "--request asks a gateway, --state does not; record a decision with --request ID --save FILE"
    if options.request and (options.header or options.key or options.prompt_tokens or options.max_tokens):
        return "--request includes headers, key and lengths"
    if options.model is None and not options.request and not options.state:
        return "MODEL is missing"
    names = {name for name, _ in options.header}
    if not names.isdisjoint(SECRET_HEADERS):
        return "a key on the command line is visible to other users; name its holder with --key NAME"
    if unknown := names - ROUTING_HEADERS:
        known = b", ".join(sorted(ROUTING_HEADERS)).decode()
        return f"the header {min(unknown).decode()} does not affect routing; known: {known}"
    return None


def route_parser() -> CommandParser:
    """Describe `quantgate route`."""
    parser = CommandParser(
        prog="quantgate route",
        description="Explain which replica answers a request, or print the state that decides it.",
        examples=["quantgate route explain qwq-32b"],
        epilog=CODES,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="explain|state")
    explain = _verb(
        verbs,
        "explain",
        "rank the replicas for a request, and say why each of the others is not chosen",
        "Rank the replicas that may answer a request by cost, with each term in seconds, and say why each of the "
        "others is not chosen. The state is read from the running gateway, and the decision is made by the same code. "
        "Without a prompt, nothing is assumed to be cached; --request shows what was.",
        "quantgate route explain qwq-32b --prompt-tokens 2000 --header 'x-quantgate-floor: top1_agreement=0.97'",
        "quantgate route explain --request req-5f1c --json",
    )
    explain.add_argument("model", metavar="MODEL", nargs="?", help="an alias, or a variant to pin")
    _add_request(explain)
    explain.add_argument("--state", type=_file, metavar="FILE", help="use the state in a file instead")
    explain.add_argument("--save", type=Path, metavar="FILE", help="write the state to a file")
    explain.add_argument("--json", action="store_true", help="print JSON")
    state = _verb(
        verbs,
        "state",
        "print the state that decisions are made on, as JSON for --state",
        "Print the state that decisions are made on, as JSON for `route explain --state`. It contains no secrets.",
        "quantgate route state > now.json",
    )
    state.set_defaults(request=None)
    return parser


def _verb(verbs: Any, verb: str, purpose: str, description: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb, help=purpose, description=description, examples=examples, epilog=CODES
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--admin",
        metavar="HOST:PORT",
        help="admin port to ask, for example of another worker; default: gateway.admin",
    )
    return parser


def _add_request(explain: argparse.ArgumentParser) -> None:
    explain.add_argument(
        "--header",
        type=_header,
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        help="such as 'x-quantgate-floor: top1_agreement=0.97', x-quantgate-precision, x-session-id",
    )
    explain.add_argument("--key", metavar="NAME", help="as a client with this API key, with its floor and limits")
    explain.add_argument("--prompt-tokens", type=_count, default=0, metavar="N", help="length of the prompt")
    explain.add_argument("--max-tokens", type=_count, metavar="N", help="longest answer that the request accepts")
    explain.add_argument("--request", metavar="ID", help="explain a recent request, by its x-request-id")


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not a header; write 'name: value'")
    return name.strip().lower().encode(), value.strip().encode()


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens")
    return int(text)


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file; `quantgate route state > {text}` makes one")
    return Path(text)
