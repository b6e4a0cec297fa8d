"""The verb `route`: explain a decision, or record what decisions are made on."""

import argparse
import sys
from pathlib import Path
from typing import Any

import msgspec

from config.errors import ConfigError
from config.schema import check_address
from gateway.cli.admin_client import AdminClient, AdminUnavailable
from gateway.cli.explained import Question, explained, explained_request
from gateway.cli.route_table import show
from gateway.errors import GatewayError
from gateway.openai.constraints import FLOOR_HEADER, PRECISION_HEADER
from gateway.proxy.routing_features import SESSION_HEADER
from gateway.routing.explanation import Explanation
from gateway.routing.snapshot import State, read_state
from serving.foreground import USAGE

DONE, FAILED, GATE = 0, 1, 3
DEFAULT_CONFIG = Path("quantgate.yaml")
ROUTING = "/admin/routing"
DECISIVE = frozenset({SESSION_HEADER, FLOOR_HEADER.encode(), PRECISION_HEADER.encode()})
SECRETS = frozenset({b"authorization", b"x-api-key", b"api-key"})


def route_main(arguments: list[str]) -> int:
    """Exit codes: 0; 1 if nobody can answer now, or no gateway does; 2 usage; 3 if no variant is good enough."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.verb == "explain" and (what := _misused(chosen)):
        parser.error(what)
    try:
        return _explain(chosen) if chosen.verb == "explain" else _state(chosen)
    except AdminUnavailable as error:
        print(f"quantgate route: {error}", file=sys.stderr)
        return FAILED
    except (ConfigError, GatewayError) as error:
        print(f"quantgate route: {error}", file=sys.stderr)
        return USAGE


def _explain(chosen: argparse.Namespace) -> int:
    told = chosen.state.read_bytes() if chosen.state else _fetched(chosen)
    state = read_state(told, str(chosen.state or "the gateway's answer"))
    if chosen.save:
        chosen.save.write_bytes(told)
    explanation = _explained(state, chosen)
    if chosen.json:
        print(msgspec.json.format(msgspec.json.encode(explanation)).decode())
    else:
        show(explanation, f"{'decided' if state.asked else 'as it was'} at {state.recorded:%Y-%m-%d %H:%M:%S} UTC")
    if explanation.chosen is not None:
        return DONE
    return FAILED if explanation.rungs else GATE


def _explained(state: State, chosen: argparse.Namespace) -> Explanation:
    asked = state.asked
    if asked is None:
        if chosen.model is None:
            raise ConfigError(f"MODEL is missing; there are: {', '.join(state.models)}")
        headers = dict(chosen.header)
        return explained(state, Question(chosen.model, headers, chosen.key, chosen.prompt_tokens, chosen.max_tokens))
    if chosen.model not in {None, asked.model}:
        raise ConfigError(f"the request {asked.id} asked for {asked.model!r}, not for {chosen.model!r}")
    explanation = explained_request(state, asked)
    if asked.chosen != (explanation.chosen.replica if explanation.chosen else None):
        print(f"quantgate route: it was {asked.chosen}: another version of quantgate decided that", file=sys.stderr)
    return explanation


def _state(chosen: argparse.Namespace) -> int:
    sys.stdout.buffer.write(_fetched(chosen) + b"\n")
    return DONE


def _fetched(chosen: argparse.Namespace) -> bytes:
    path = f"{ROUTING}/{chosen.request}" if chosen.request else ROUTING
    return AdminClient.of(chosen.config, chosen.admin).read(path)


def _misused(chosen: argparse.Namespace) -> str | None:
    """Say which options don't go together."""
    if chosen.request and chosen.state:
        return "--request asks a gateway, --state doesn't; record a decision with --request ID --save FILE"
    if chosen.request and (chosen.header or chosen.key or chosen.prompt_tokens or chosen.max_tokens):
        return "--request tells headers, key and lengths by itself"
    if chosen.model is None and not chosen.request and not chosen.state:
        return "MODEL is missing"
    names = {name for name, _ in chosen.header}
    if not names.isdisjoint(SECRETS):
        return "a key on the command line is seen by others; say whose it is with --key NAME"
    if unknown := names - DECISIVE:
        return f"{min(unknown).decode()} decides nothing; known: {b', '.join(sorted(DECISIVE)).decode()}"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantgate route", description="Explain which replica answers a request, or record what that depends on."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="explain|state")
    explain = _verb(
        verbs,
        "explain",
        "rank the replicas for a request, and say why it is none of the others",
        "Rank the replicas that may answer a request, each term of the cost in seconds, and say why it is none of the "
        "others. The gateway that runs is asked for what it knows, and the decision is made as the gateway makes it. "
        "Of a prompt's words nothing is known, so that nothing of it is cached; --request tells what was.",
    )
    explain.add_argument("model", metavar="MODEL", nargs="?", help="an alias, or a variant to pin")
    _add_request(explain)
    explain.add_argument("--state", type=_file, metavar="FILE", help="explain a recorded state instead")
    explain.add_argument("--save", type=Path, metavar="FILE", help="record the state that is explained")
    explain.add_argument("--json", action="store_true", help="print JSON")
    state = _verb(
        verbs,
        "state",
        "print what decisions are made on now, as JSON for --state",
        "Print what decisions are made on now, as JSON for `route explain --state`. It holds no key.",
    )
    state.set_defaults(request=None)
    return parser


def _verb(verbs: Any, verb: str, purpose: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(verb, help=purpose, description=description)
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="default: %(default)s")
    parser.add_argument(
        "--admin",
        type=_address,
        metavar="HOST:PORT",
        help="ask there, for example another worker; default: gateway.admin",
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
    explain.add_argument("--key", metavar="NAME", help="as the holder of this key, with its floor and limits")
    explain.add_argument("--prompt-tokens", type=_count, default=0, metavar="N", help="how long the prompt is")
    explain.add_argument("--max-tokens", type=_count, metavar="N", help="how long an answer it asks for")
    explain.add_argument("--request", metavar="ID", help="one that was made lately, by its x-request-id")


def _header(text: str) -> tuple[bytes, bytes]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is no header; write 'name: value'")
    return name.strip().lower().encode(), value.strip().encode()


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens")
    return int(text)


def _address(text: str) -> str:
    try:
        return check_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _file(text: str) -> Path:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text}: no such file; `quantgate route state > {text}` makes one")
    return Path(text)
