"""The `quantgate` command line: a table of commands; each one's module is imported only when it runs."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module, which has the functions VERB_main and VERB_parser, and its line in the help."""

    module: str
    help: str


COMMANDS = {
    "demo": Command("gateway.demo.cli", "quantize, serve and query a small model on this machine"),
    "quantize": Command("quantize.cli", "make a quantized variant of a model and measure its quality"),
    "evaluate": Command("quantize.cli", "measure the quality of a variant against its base model"),
    "variants": Command("quantize.variants_cli", "list, compare, verify, adopt and report variants"),
    "doctor": Command("gateway.cli.doctor", "check this machine for what would keep replicas from starting"),
    "measure": Command("serving.measuring.cli", "measure the throughput and latency of variants on this machine"),
    "up": Command("gateway.cli.serve", "run replicas and the gateway on this machine"),
    "serve": Command("serving.cli", "run replicas on this machine, for gateways in other processes"),
    "status": Command("serving.control_cli", "show what runs in this home, and which replicas are ready"),
    "reload": Command("serving.control_cli", "have what runs read its configuration again"),
    "restart": Command("serving.control_cli", "start a replica again, at once if it waits"),
    "stop": Command("serving.control_cli", "stop what runs, after its running requests"),
    "ps": Command("serving.cli", "list replicas and their states"),
    "logs": Command("serving.cli", "print the log of a replica"),
    "gateway": Command("gateway.cli.serve", "run the gateway in front of replicas that run elsewhere"),
    "route": Command("gateway.cli.route", "explain which replica a request is routed to, and why"),
    "top": Command("gateway.cli.top", "show the status of a gateway in a terminal, live or once"),
    "usage": Command("gateway.cli.usage", "print requests, tokens and cost by API key and alias"),
    "rollout": Command("gateway.rollout.cli", "replace a variant behind an alias in steps gated by measurements"),
    "config": Command("gateway.cli.config", "check or show a configuration file, or print the JSON schema"),
    "keys": Command("gateway.cli.keys", "create, import, list, rotate and revoke API keys"),
    "completion": Command("gateway.cli.completion", "print a script that completes this command line in a shell"),
}


EXAMPLES = (
    "quantgate config check quantgate.yaml",
    "quantgate up quantgate.yaml",
    "quantgate top",
)


def usage() -> str:
    """Format the help: all commands."""
    rows = "\n".join(f"  {name:10} {command.help}" for name, command in COMMANDS.items())
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    more = "Run `quantgate COMMAND --help` for its options, examples and exit codes."
    return f"usage: quantgate COMMAND [...]\n\n{rows}\n\nexamples:\n{examples}\n\n{more}"


def parser_of(verb: str) -> ArgumentParser:
    """Import what describes the arguments of a command."""
    describe: Callable[[], ArgumentParser] = getattr(import_module(COMMANDS[verb].module), f"{verb}_parser")
    return describe()


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
    function: Callable[[list[str]], int] = getattr(import_module(command.module), f"{arguments[0]}_main")
    return function(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
