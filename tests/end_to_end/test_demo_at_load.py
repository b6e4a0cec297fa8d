"""A load ramp on real vLLM: it spills and returns, and headers, metrics and `route explain` agree on every request.

It loads the demo that test_demo.py started, and comes before test_demo_stops.py.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gateway.routing.explain import Explanation
from tests.end_to_end.ramp import NO_ROUTE, Asked, Stage, Users, explained, explanation_of
from tests.end_to_end.running_demo import Running, address, admin_address, start

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(2700)]

ALIAS = "smol"
UP = (Stage(1, 2), Stage(4, 4), Stage(12, 6), Stage(24, 12), Stage(48, 15), Stage(96, 20), Stage(160, 30))
SPILL, RETURN = (("ladder_switches", "smol-bf16", to) for to in ("spill", "return"))
STRICT = {"x-quantgate-floor": "top1_agreement=0.999"}
STRICT_USERS = 2
# The ramp ends after this many answers that spilled.
ENOUGH = 8
HEARTBEAT_SECONDS = 15.0
RETURN_SECONDS = 90.0
DEADLINE_SECONDS = 240.0

_SAMPLE = re.compile(r"quantgate_(\w+)_total\{(.*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True, slots=True)
class Ramped:
    """All requests, their explanations, and how much the counters grew."""

    before: Asked
    crowd: list[Asked]
    strict: list[Asked]
    after: list[Asked]
    explanations: Mapping[str, Explanation]
    counted: Counter[tuple[str, ...]]

    @property
    def all(self) -> list[Asked]:
        """Every request."""
        return [self.before, *self.crowd, *self.strict, *self.after]

    def of(self, reason: str) -> list[Asked]:
        """The crowd's requests that were routed for a reason."""
        return [each for each in self.crowd if explained(self.explanations[each.id]).reason == reason]


@pytest.fixture(scope="module")
def ramped(serving: Running) -> Ramped:
    """Send one request at rest, then more and more at once until answers spill, then one at a time until none does."""
    assert serving.process.poll() is None, "the demo was stopped by test_demo_stops.py, which comes after this"
    return asyncio.run(_ramped(address(serving).removesuffix("/v1"), admin_address(serving)))


async def _ramped(url: str, admin_url: str) -> Ramped:
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, limits=limits, timeout=DEADLINE_SECONDS) as client,
        httpx.AsyncClient(base_url=admin_url, timeout=DEADLINE_SECONDS) as admin,
    ):
        start_counts = await counts(admin)
        crowd, strict, rest = (
            Users(client, ALIAS, "crowd"),
            Users(client, ALIAS, "strict", STRICT),
            Users(client, ALIAS, "rest"),
        )
        before = await rest.ask()
        await _up(crowd, strict)
        after = await _until_returned(rest, admin, start_counts[RETURN])
        asked = [before, *crowd.asked, *strict.asked, *after]
        explanations = {each.id: await explanation_of(admin, each.id) for each in asked}
        counted = await counts(admin)
    counted.subtract(start_counts)
    return Ramped(before, crowd.asked, strict.asked, after, explanations, counted)


async def _up(crowd: Users, strict: Users) -> None:
    """Let the crowd grow until enough answers have spilled, beside users with a floor."""

    def enough() -> bool:
        spilled = [each.asked_at for each in crowd.asked if each.route.reason == "spill"]
        return len(spilled) >= ENOUGH and any(each.asked_at > min(spilled) for each in strict.asked)

    async with asyncio.TaskGroup() as both:
        ramp = both.create_task(crowd.ramp(UP, enough))
        both.create_task(strict.ramp([Stage(STRICT_USERS, DEADLINE_SECONDS)], ramp.done))


async def _until_returned(rest: Users, admin: httpx.AsyncClient, returns: int) -> list[Asked]:
    """Send requests one at a time until the best variant has stopped spilling, and three more."""
    deadline = time.monotonic() + RETURN_SECONDS
    after: list[Asked] = []
    while (await counts(admin))[RETURN] == returns:
        assert time.monotonic() < deadline, [each.route for each in after[-3:]]
        after.append(await rest.ask())
        await asyncio.sleep(0.3)
    return after + [await rest.ask() for _ in range(3)]


async def counts(admin: httpx.AsyncClient) -> Counter[tuple[str, ...]]:
    """The counters of the alias: answers by variant and reason, spills by variant, switches by direction."""
    found: Counter[tuple[str, ...]] = Counter()
    for name, labels, value in _SAMPLE.findall((await admin.get("/metrics")).text):
        label = dict(_LABEL.findall(labels))
        if label.get("alias") != ALIAS:
            continue
        if name == "requests":
            found[name, label["variant"], label["precision"], label["reason"], label["code"]] += int(float(value))
        elif name in {"spills", "ladder_switches"}:
            found[(name, label["variant"], *([label["to"]] if "to" in label else []))] += int(float(value))
    return found


def test_at_rest_the_best_variant_answers(ramped: Ramped) -> None:
    """A single request does not spill."""
    assert (ramped.before.route.precision, ramped.before.route.reason) == ("bf16", "preferred")


def test_load_spills(ramped: Ramped) -> None:
    """Every request is answered, some by less precise variants: the best one alone can't keep up."""
    assert {each.status for each in ramped.all} == {200}
    spilled = ramped.of("spill")
    assert len(spilled) >= ENOUGH
    assert {each.route.precision for each in spilled if each.route != NO_ROUTE} <= {"int8", "int4"}
    assert {explained(ramped.explanations[each.id]).precision for each in ramped.of("preferred")} == {"bf16"}
    assert ramped.counted[SPILL] >= 1


def test_it_returns(ramped: Ramped) -> None:
    """When the load is gone, the best variant answers again."""
    assert [(each.route.precision, each.route.reason) for each in ramped.after[-3:]] == [("bf16", "preferred")] * 3
    assert ramped.counted[RETURN] >= 1


def test_a_floor_holds_under_load(ramped: Ramped) -> None:
    """A request with a floor that only the best variant meets gets it, while others spill."""
    assert {explained(ramped.explanations[each.id]).variant for each in ramped.strict} == {"smol-bf16"}
    assert {each.route.variant for each in ramped.strict} <= {"smol-bf16", ""}
    rungs = [ramped.explanations[each.id].rungs[0] for each in ramped.strict]
    assert any(rung.spilling_seconds is not None for rung in rungs)


def test_headers_and_explanations_agree(ramped: Ramped) -> None:
    """On every request; a stream that began with a heartbeat has no such headers."""
    for each in ramped.all:
        if each.route == NO_ROUTE:
            assert each.first_at is not None
            assert each.first_at - each.asked_at >= HEARTBEAT_SECONDS
        else:
            assert each.route == explained(ramped.explanations[each.id]), each.id


def test_metrics_agree(ramped: Ramped) -> None:
    """The counters grew by the number of answers of each variant and reason, and of spills, that were explained."""
    routes = [explained(ramped.explanations[each.id]) for each in ramped.all]
    answers: Counter[tuple[str, ...]] = Counter(
        ("requests", each.variant, each.precision, each.reason, "200") for each in routes
    )
    spills: Counter[tuple[str, ...]] = Counter(("spills", each.variant) for each in routes if each.reason == "spill")
    counted = {name: count for name, count in ramped.counted.items() if count and name[0] != "ladder_switches"}
    assert counted == answers + spills


@pytest.mark.parametrize("reason", ["preferred", "spill"])
def test_the_command_line_explains(ramped: Ramped, serving: Running, home: Path, tmp_path: Path, reason: str) -> None:
    """`quantgate route explain --request ID` prints which replica answered, and what was compared."""
    asked = ramped.of(reason)[-1]
    words = ("--request", asked.id, "--config", str(home / "quantgate.yaml"), "--json")
    port = ("--admin", admin_address(serving).removeprefix("http://"))
    running = start(tmp_path, home, "route", "explain", *words, *port)
    assert running.wait(60) == 0, running.stderr
    printed: dict[str, Any] = json.loads(running.stdout)
    assert printed == json.loads(msgspec.json.encode(ramped.explanations[asked.id]))
    assert printed["chosen"]["reason"] == reason
