"""`python -m tests.clients [NAME ...]`: install clients and run them; non-zero if one fails."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from tests.clients.client import Client, read_clients
from tests.clients.environment import ClientError, Environment, Outcome
from tests.clients.results import write_results
from tests.clients.server import MODEL, serving


def main(arguments: Sequence[str]) -> int:
    """Do what is asked."""
    clients = read_clients()
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(clients)}; default: all")
    parser.add_argument("--list", action="store_true", help="list the clients")
    parser.add_argument("--install-ci", action="store_true", help="install those that run in CI, and run nothing")
    parser.add_argument(
        "--silence", type=float, default=0.0, metavar="S", help="be silent for S before each first token"
    )
    parser.add_argument("--write", action="store_true", help="write results.json and the table of gateway/README.md")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - clients.keys():
        parser.error(f"no client {', '.join(sorted(unknown))}; there are: {', '.join(clients)}")
    chosen = [clients[name] for name in given.names or clients]
    if given.list:
        print("\n".join(f"{each.name:20} {' '.join(each.packages)}: {each.runs}" for each in chosen))
        return 0
    if given.install_ci:
        return install([each for each in chosen if each.in_ci])
    outcomes = asyncio.run(run(chosen, given.silence))
    if given.write:
        write_results(outcomes, clients)
    return int(len(outcomes) < len(chosen) or any(each.failure for each in outcomes.values()))


def install(clients: Sequence[Client]) -> int:
    """Install some clients; a client that can't be had is reported and left out."""
    for client in clients:
        try:
            Environment.of(client).install()
        except ClientError as error:
            print(error, file=sys.stderr)
    return 0


async def run(clients: Sequence[Client], silence_seconds: float) -> dict[str, Outcome]:
    """Run one client after the other, and say what came of it."""
    outcomes = {}
    async with serving(silence_seconds) as fleet:
        for client in clients:
            environment = Environment.of(client)
            try:
                await asyncio.to_thread(environment.install)
            except ClientError as error:
                print(error, file=sys.stderr)
                continue
            outcome = outcomes[client.name] = await asyncio.to_thread(environment.run, fleet.url, MODEL)
            print(f"{client.name} {outcome.version}: {outcome.failure or 'works'}", flush=True)
    return outcomes


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
