"""The command line: a table from verb to function, imported when asked for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module, metadata


@dataclass(frozen=True, slots=True)
class Verb:
    """Where a verb's function is, and what it is for."""

    module: str
    function: str
    purpose: str


VERBS = {
    "demo": Verb("gateway.demo.cli", "demo_main", "quantize, serve and ask a small model, all on this machine"),
    "quantize": Verb("quantize.cli", "main", "make a variant of a model and measure it"),
    "evaluate": Verb("quantize.cli", "evaluate_main", "measure a variant against its parent"),
    "variants": Verb("quantize.variants_cli", "variants_main", "list, compare, verify, adopt and report variants"),
    "doctor": Verb(
        "serving.doctor_cli", "doctor_main", "look at this machine, and at what would keep replicas from starting"
    ),
    "measure": Verb("serving.measuring.cli", "measure_main", "measure how fast variants are on this machine"),
    "up": Verb("gateway.cli.serve", "up_main", "run replicas and gateway on one machine"),
    "serve": Verb("serving.cli", "serve_main", "run this machine's replicas, for gateways in other processes"),
    "ps": Verb("serving.cli", "ps_main", "list replicas with their states"),
    "logs": Verb("serving.cli", "logs_main", "print what a replica printed"),
    "gateway": Verb("gateway.cli.serve", "gateway_main", "run the gateway in front of running replicas"),
    "route": Verb("gateway.cli.route", "route_main", "explain which replica answers a request, and why no other"),
    "config": Verb("gateway.cli.serve", "config_main", "check, show or describe configuration files"),
    "keys": Verb("gateway.cli.keys", "keys_main", "hand out, list, replace and revoke client keys"),
}


def usage() -> str:
    """List the verbs."""
    rows = "\n".join(f"  {name:10} {verb.purpose}" for name, verb in VERBS.items())
    return f"usage: quantgate VERB [...]\n\n{rows}\n\n`quantgate VERB --help` tells more."


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; its function gets the remaining arguments and returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(metadata.version("quantgate"))
        return 0
    verb = VERBS.get(given[0])
    if verb is None:
        near = get_close_matches(given[0], VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`quantgate --help` lists them"
        print(f"quantgate: no verb {given[0]!r}; {hint}", file=sys.stderr)
        return 2
    function: Callable[[list[str]], int] = getattr(import_module(verb.module), verb.function)
    return function(given[1:])


if __name__ == "__main__":
    sys.exit(main())
