"""Draw panels of the dashboards from a real Prometheus: `python -m tests.deploy.pictures [FOLDER] [--seconds 90]`.

A gateway in front of fake replicas gets few requests, then more than its best rung can answer, then few again, while a
rollout runs. Grafana itself is not involved: see `tests/deploy/drawing.py`.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.deploy.drawing import DRAWN, Picture, Results, draw
from tests.deploy.observed import Observed, observed
from tests.deploy.prometheus import Prometheus, program
from tests.deploy.promql import GRAFANA, read_dashboard, with_values

# By picture: its dashboard, and the rows of that; "" is what is above the first row.
PICTURES = {
    "overview": ("quantgate-overview", ("", "Traffic", "Quality")),
    "replicas": ("quantgate-replicas", ("State", "Load")),
    "rollouts": ("quantgate-rollouts", ("", "Progress", "Gates")),
}
SCRAPE_SECONDS, STEP_SECONDS, RATE_SECONDS = 2, 1.0, 10.0
# Clients of the ladder with three rungs, by share of the time.
WAVE = ((2, 0.2), (14, 0.3), (2, 0.2), (10, 0.3))


def main() -> None:
    """Run everything, and write the pictures."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.pictures", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=GRAFANA / "pictures")
    parser.add_argument("--seconds", type=float, default=90.0, help="of traffic (default: 90)")
    options = parser.parse_args()
    executable = program("prometheus")
    if executable is None:
        raise SystemExit("no Prometheus; `apt-get install prometheus` brings one")
    asyncio.run(write(executable, options.folder, options.seconds))


async def write(executable: str, folder: Path, seconds: float) -> None:
    """Run a gateway under a wave of requests, and draw what Prometheus has of it."""
    with tempfile.TemporaryDirectory(prefix="pictures-") as name:
        async with observed(executable, Path(name), SCRAPE_SECONDS) as everything:
            start, end = await wave(everything, seconds)
            for picture, (dashboard, rows) in PICTURES.items():
                shown = list(selected(read_dashboard(GRAFANA / "dashboards" / f"{dashboard}.json"), rows))
                results = {
                    panel["id"]: await range_results(everything.prometheus, panel, start, end) for panel in shown
                }
                draw(Picture(shown, results, start, end), folder / f"{picture}.png")


async def wave(everything: Observed, seconds: float) -> tuple[float, float]:
    """Let clients come and go; returns when it began and ended."""
    clients = everything.clients
    with clients.asking("assistant", 3, "batch"):
        await everything.start_rollout((10.0, 25.0, 50.0, 100.0), step_seconds=15)
        # From here on, the rates have all of the time that they look back.
        start = time.time() + RATE_SECONDS
        for count, share in WAVE:
            with clients.asking("qwq-32b", count), clients.asking("int4", 1, "batch"):
                for status in (await clients.ask("exact"), await clients.ask("nothing")):
                    assert status in (404, 503)
                await asyncio.sleep(seconds * share)
    return start, time.time()


def selected(dashboard: dict[str, Any], rows: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the panels of some rows, and the rows themselves."""
    row = ""
    for panel in dashboard["panels"]:
        row = panel["title"] if panel["type"] == "row" else row
        if row in rows and panel["type"] in ("row", *DRAWN):
            yield panel


async def range_results(prometheus: Prometheus, panel: dict[str, Any], start: float, end: float) -> Results:
    """The series of each query of a panel, with the legend of the query."""
    return [
        (
            target.get("legendFormat", ""),
            await prometheus.query_range(with_values(target["expr"]), start, end, STEP_SECONDS),
        )
        for target in panel.get("targets", ())
    ]


if __name__ == "__main__":
    main()
