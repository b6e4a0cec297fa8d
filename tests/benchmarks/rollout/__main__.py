"""Print the table of the study: `python -m tests.benchmarks.rollout [--rollouts 500] [--rates 2,10,50]`."""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.benchmarks.rollout.simulation import Outcome, Scenario, run_rollout

SCENARIOS = (
    Scenario("identical"),
    Scenario("success .99 -> .96", canary_errors=0.04),
    Scenario("success .95 -> .92", stable_errors=0.05, canary_errors=0.08),
    Scenario("first token +20 %, log sd .5", first_token=1.2),
    Scenario("first token +20 %, log sd 1.0", first_token=1.2, first_token_spread=1.0),
    Scenario("answers 15 % longer, log sd .9", length=1.15),
)


def main() -> None:
    """Run every scenario at every rate."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rollout", description=__doc__)
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--rates", default="2,10,50", help="conversations per second")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print("| canary | per second | stopped | seconds, median / q95 | conversations | share of traffic | by |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for rate in map(float, options.rates.split(",")):
        for number, scenario in enumerate(SCENARIOS):
            random = np.random.default_rng((options.seed, number, int(rate)))
            at_rate = replace(scenario, per_second=rate)
            print(row(at_rate, [run_rollout(at_rate, random) for _ in range(options.rollouts)]), flush=True)


def row(scenario: Scenario, outcomes: Sequence[Outcome]) -> str:
    """Format one line of the table."""
    stopped = [outcome for outcome in outcomes if outcome.stopped_seconds is not None]
    gates = Counter(name for outcome in stopped for name in outcome.by).most_common(3)
    cells = [
        scenario.name,
        f"{scenario.per_second:g}",
        f"{len(stopped) / len(outcomes):.1%}",
        _quantiles([outcome.stopped_seconds or 0.0 for outcome in stopped], "{:.0f}"),
        _quantiles([float(outcome.conversations) for outcome in stopped], "{:.0f}"),
        _quantiles([outcome.share for outcome in stopped], "{:.3f}"),
        ", ".join(f"{name} {count}" for name, count in gates),
    ]
    return f"| {' | '.join(cells)} |"


def _quantiles(values: Sequence[float], form: str) -> str:
    if not values:
        return "-"
    return " / ".join(form.format(float(np.quantile(values, share))) for share in (0.5, 0.95))


if __name__ == "__main__":
    main()
