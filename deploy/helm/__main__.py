"""Write the schema of the chart's values, values.schema.json: `python -m deploy.helm [--check]`.

With `--check`, nothing is written; the exit code is 1 if the file differs. Rules and dashboards are symbolic links to
deploy/prometheus and deploy/grafana, which helm follows.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.helm.schema import values_schema

SCHEMA = Path(__file__).with_name("quantgate") / "values.schema.json"


def main(arguments: Sequence[str]) -> int:
    """Write the schema, or compare it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.helm", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if the file differs")
    check = parser.parse_args(arguments).check
    text = json.dumps(values_schema(), indent=1, sort_keys=True) + "\n"
    changed = not SCHEMA.exists() or SCHEMA.read_text("utf-8") != text
    if changed and not check:
        SCHEMA.write_text(text, encoding="utf-8")
    print(f"{SCHEMA.name}: {('differs' if check else 'written') if changed else 'no changes'}")
    return int(check and changed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
