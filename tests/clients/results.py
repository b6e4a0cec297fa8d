"""What came of the runs, as a file and as the table of gateway/README.md."""

import json
from collections.abc import Mapping
from pathlib import Path

from tests.clients.client import Client
from tests.clients.environment import Outcome
from tests.fakes.running import ROOT

RESULTS = Path(__file__).with_name("results.json")
README = ROOT / "gateway" / "README.md"
HEADER = "| client | version | what was run | verdict |"


def read_results() -> dict[str, Outcome]:
    """The outcomes of the latest runs, by client."""
    found: dict[str, dict[str, str | None]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return {name: Outcome(str(each["version"]), each["failure"]) for name, each in found.items()}


def write_results(outcomes: Mapping[str, Outcome], clients: Mapping[str, Client]) -> None:
    """Put new outcomes beside those of other clients, and the table into the README."""
    kept = {**(read_results() if RESULTS.exists() else {}), **outcomes}
    told = {name: {"version": kept[name].version, "failure": kept[name].failure} for name in sorted(kept)}
    RESULTS.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = README.read_text(encoding="utf-8")
    before, found, after = text.partition(HEADER)
    if found:
        rest = after.partition("\n\n")[2]
        README.write_text(f"{before}{table(kept, clients)}\n\n{rest}", encoding="utf-8")


def table(outcomes: Mapping[str, Outcome], clients: Mapping[str, Client]) -> str:
    """One line for each client that was run."""
    rows = [
        f"| {clients[name].title} | {each.version} | {clients[name].runs} | {each.failure or 'works'} |"
        for name, each in sorted(outcomes.items(), key=lambda item: item[0])
    ]
    return "\n".join([HEADER, "| --- | --- | --- | --- |", *rows])
