"""A load ramp against a gateway that runs, such as the demo: who answers, how soon, and how good the estimate was.

`python -m tests.benchmarks.ramp_vllm --url http://127.0.0.1:8000 --admin http://127.0.0.1:8001 [--plot OUT.png]
[--stages USERS:SECONDS,...]` prints a table by stage as Markdown.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx

from gateway.routing.explain import Explanation
from tests.benchmarks.machine import machine_line
from tests.benchmarks.overhead.figures import percentile
from tests.end_to_end.ramp import ANSWER_TOKENS, Asked, Stage, Users, explained, explanation_of

USUAL_STAGES = "1:5,4:10,8:10,16:10,24:15,48:15,24:10,8:15,1:20"
BEST_FIRST = ("bf16", "int8", "int4")
DEADLINE_SECONDS = 300.0
HEADINGS = ("users", "asked", *BEST_FIRST, "TTFT p50", "p95", "expected p50", "p95", "off by p50", "p90")


@dataclass(frozen=True, slots=True)
class Seen:
    """One request: when it was asked since the ramp began, by whom answered, and when the first token came.

    `expected_seconds` until then is what the decision went by; None: no speed was known.
    """

    stage: int
    users: int
    asked_at: float
    precision: str
    first_seconds: float
    expected_seconds: float | None

    @property
    def off_by(self) -> float | None:
        """How many times too long or too short the estimate was; within 50 ms it isn't."""
        if self.expected_seconds is None:
            return None
        shorter, longer = sorted((self.expected_seconds, self.first_seconds))
        return (longer + 0.05) / (shorter + 0.05)


async def climbed(url: str, admin_url: str, stages: Sequence[Stage]) -> list[Seen]:
    """Go through the stages, each variant of the ladder having answered once before."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, limits=limits, timeout=DEADLINE_SECONDS) as client,
        httpx.AsyncClient(base_url=admin_url, timeout=DEADLINE_SECONDS) as admin,
    ):
        alias, *variants = [each["id"] for each in (await client.get("/v1/models")).json()["data"]]
        for variant in variants:
            await Users(client, variant, f"first-{variant}").ask()
        users = Users(client, alias, "climb")
        await users.ramp(stages)
        explanations = [await explanation_of(admin, each.id) for each in users.asked]
    began = min(each.asked_at for each in users.asked)
    pairs = zip(users.asked, explanations, strict=True)
    return [_seen(asked, explanation, began, stages) for asked, explanation in pairs if asked.first_at is not None]


def _seen(asked: Asked, explanation: Explanation, began: float, stages: Sequence[Stage]) -> Seen:
    assert asked.first_at is not None
    at = asked.asked_at - began
    ends = [sum(stage.seconds for stage in stages[: number + 1]) for number in range(len(stages))]
    stage = next((number for number, end in enumerate(ends) if at < end), len(stages) - 1)
    told = explained(explanation)
    terms = next(each.terms for each in explanation.candidates if each.replica == told.replica)
    expected = terms.queue + terms.ahead + terms.kv + terms.reading - terms.cached if terms else None
    return Seen(stage, stages[stage].users, at, told.precision, asked.first_at - asked.asked_at, expected)


def table(seen: Sequence[Seen], stages: Sequence[Stage]) -> Iterable[str]:
    """Write one row for each stage; seconds, and how many times the estimate was off."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "| " + " | ".join("---" for _ in HEADINGS) + " |"
    for number, stage in enumerate(stages):
        found = [each for each in seen if each.stage == number]
        if not found:
            continue
        precisions = Counter(each.precision for each in found)
        shares = [f"{precisions[each] / len(found):.0%}" for each in BEST_FIRST]
        waits = [each.first_seconds for each in found]
        expected = [each.expected_seconds for each in found if each.expected_seconds is not None] or [float("nan")]
        off = [each.off_by for each in found if each.off_by is not None] or [float("nan")]
        figures = [median(waits), percentile(waits, 95), median(expected), percentile(expected, 95)]
        times = [f"x{each:.2f}" for each in (median(off), percentile(off, 90))]
        cells = [str(stage.users), str(len(found)), *shares, *(f"{each:.2f}" for each in figures), *times]
        yield f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> int:
    """Run the ramp and tell of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.ramp_vllm", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the gateway (default: %(default)s)")
    parser.add_argument("--admin", default="http://127.0.0.1:8001", help="its admin port (default: %(default)s)")
    parser.add_argument("--stages", default=USUAL_STAGES, help="users and seconds (default: %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="OUT.png")
    chosen = parser.parse_args(arguments)
    pairs = (each.split(":") for each in chosen.stages.split(","))
    stages = [Stage(int(users), float(seconds)) for users, seconds in pairs]
    seen = asyncio.run(climbed(chosen.url, chosen.admin, stages))
    print(f"{machine_line()}; answers of {ANSWER_TOKENS} tokens\n", *table(seen, stages), sep="\n")
    if chosen.plot:
        from tests.benchmarks.ramp_plot import write_climb  # noqa: PLC0415 - an extra

        write_climb(seen, chosen.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
