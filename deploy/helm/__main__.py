"""Write the generated files of the chart: `python -m deploy.helm [--check]`.

These are values.schema.json, and the rules and dashboards of deploy/prometheus and deploy/grafana: a chart cannot
contain files outside its folder. With `--check`, nothing is written; the exit code is 1 if a file differs.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from deploy.helm.schema import values_schema

CHART = Path(__file__).with_name("quantgate")
DEPLOY = CHART.parents[1]
# By folder of the chart: the files that it has copies of.
COPIES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"files/rules": ("prometheus/rules", "*.yml"), "files/dashboards": ("grafana/dashboards", "*.json")}
)


def main(arguments: Sequence[str]) -> int:
    """Write all files and remove those that are no longer generated, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.helm", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a file differs")
    check = parser.parse_args(arguments).check
    wanted = dict(files())
    differing = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    stale = [path for folder in COPIES for path in (CHART / folder).glob("*") if path not in wanted]
    if not check:
        for path in differing:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        for path in stale:
            path.unlink()
    changes = [f"{path.relative_to(CHART)}: {'differs' if check else 'written'}" for path in (*differing, *stale)]
    print("\n".join(changes) or "no changes")
    return int(check and bool(changes))


def files() -> Iterator[tuple[Path, str]]:
    """Yield the path and the text of each generated file."""
    yield CHART / "values.schema.json", json.dumps(values_schema(), indent=1, sort_keys=True) + "\n"
    for folder, (source, pattern) in COPIES.items():
        for path in sorted((DEPLOY / source).glob(pattern)):
            yield CHART / folder / path.name, path.read_text(encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
