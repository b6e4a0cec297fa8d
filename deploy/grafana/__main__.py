"""Write the dashboards: `python -m deploy.grafana [--check]`.

With `--check`, nothing is written; the exit code is 1 if a file differs.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import gateway, overview, replicas, rollouts, variants

FOLDER = Path(__file__).with_name("dashboards")
DASHBOARDS = (overview.dashboard, replicas.dashboard, variants.dashboard, rollouts.dashboard, gateway.dashboard)


def main(arguments: Sequence[str]) -> int:
    """Write all files, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.grafana", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    check = parser.parse_args(arguments).check
    differing = [path for path, text in files() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path, text in files():
        if path in differing and not check:
            path.write_text(text, encoding="utf-8")
    print("\n".join(f"{path.name}: {'differs' if check else 'written'}" for path in differing) or "no changes")
    return int(check and bool(differing))


def files() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each dashboard."""
    for build in DASHBOARDS:
        text, uid = rendered(build())
        yield FOLDER / f"{uid}.json", text


def rendered(builder: Dashboard) -> tuple[str, str]:
    """Return a dashboard as JSON, with ids of its panels, and its uid."""
    dashboard = builder.build()
    panels = [each for panel in dashboard.panels or [] for each in (panel, *getattr(panel, "panels", ()))]
    for number, panel in enumerate(panels, 1):
        panel.id_val = number
    assert dashboard.uid is not None
    return JSONEncoder(sort_keys=True, indent=1).encode(dashboard) + "\n", dashboard.uid


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
