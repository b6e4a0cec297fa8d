"""The `quantgate` command line: a table of commands; each one's module is imported only when it runs."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata


@dataclass(frozen=True, slots=True)
class Command:
    """Module and name of a command's function, and its line in the help."""

    module: str
    function: str
    help: str


COMMANDS = {
    "demo": Command("gateway.demo.cli", "demo_main", "quantize, serve and query a small model on this machine"),
    "quantize": Command("quantize.cli", "main", "make a quantized variant of a model and measure its quality"),
    "evaluate": Command("quantize.cli", "evaluate_main", "measure the quality of a variant against its base model"),
    "variants": Command("quantize.variants_cli", "variants_main", "list, compare, verify, adopt and report variants"),
    "doctor": Command(
        "gateway.cli.doctor", "doctor_main", "check this machine for what would keep replicas from starting"
    ),
    "measure": Command(
        "serving.measuring.cli", "measure_main", "measure the throughput and latency of variants on this machine"
    ),
    "up": Command("gateway.cli.serve", "up_main", "run replicas and the gateway on this machine"),
    "serve": Command("serving.cli", "serve_main", "run replicas on this machine, for gateways in other processes"),
    "status": Command(
        "serving.control_cli", "status_main", "show what runs in this home, and which replicas are ready"
    ),
    "reload": Command("serving.control_cli", "reload_main", "have what runs read its configuration again"),
    "restart": Command("serving.control_cli", "restart_main", "start a replica again, at once if it waits"),
    "stop": Command("serving.control_cli", "stop_main", "stop what runs, after its running requests"),
    "ps": Command("serving.cli", "ps_main", "list replicas and their states"),
    "logs": Command("serving.cli", "logs_main", "print the log of a replica"),
    "gateway": Command("gateway.cli.serve", "gateway_main", "run the gateway in front of replicas that run elsewhere"),
    "route": Command("gateway.cli.route", "route_main", "explain which replica a request is routed to, and why"),
    "usage": Command("gateway.cli.usage", "usage_main", "print requests, tokens and cost by API key and alias"),
    "rollout": Command(
        "gateway.rollout.cli", "rollout_main", "replace a variant behind an alias in steps gated by measurements"
    ),
    "config": Command(
        "gateway.cli.config", "config_main", "check or show a configuration file, or print the JSON schema"
    ),
    "keys": Command("gateway.cli.keys", "keys_main", "create, list, rotate and revoke API keys"),
}


def usage() -> str:
    """Format the help: all commands."""
    rows = "\n".join(f"  {name:10} {command.help}" for name, command in COMMANDS.items())
    return f"usage: quantgate COMMAND [...]\n\n{rows}\n\nRun `quantgate COMMAND --help` for its options."


def main(arguments: list[str] | None = None) -> int:
    """Run one command with the remaining arguments and return its exit code; 2 for a usage error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(metadata.version("quantgate"))
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        close = get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`quantgate --help` lists the commands"
        print(f"quantgate: unknown command {arguments[0]!r}; {hint}", file=sys.stderr)
        return 2
    function: Callable[[list[str]], int] = getattr(import_module(command.module), command.function)
    return function(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
