"""Scripts for operators, with a `quantgate` that only writes down how it was called."""

import os
import subprocess
from pathlib import Path

import pytest

ROLL = Path(__file__).resolve().parents[1] / "deploy" / "ops" / "roll.sh"
FAKE = """#!/bin/sh
echo "$*" >> "$CALLS"
[ "$1" = "$FAILING" ] && exit 3
exit 0
"""


def roll(folder: Path, *arguments: str, failing: str = "none") -> tuple[int, list[str]]:
    """Run the script; its exit code, and the commands that it ran."""
    program, calls = folder / "quantgate", folder / "calls"
    program.write_text(FAKE)
    program.chmod(0o755)
    env = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "FAILING": failing}
    done = subprocess.run([ROLL, *arguments], env=env, capture_output=True, text=True, check=False)
    return done.returncode, calls.read_text().splitlines() if calls.exists() else []


def test_roll(tmp_path: Path) -> None:
    """Quantize, report, roll out; options of the rollout are passed on."""
    code, calls = roll(tmp_path, "r.yaml", f"{tmp_path}/v2", "smol", "int4-v2", "--steps", "5,100")
    assert code == 0
    assert calls == [
        f"quantize --recipe r.yaml --out {tmp_path}/v2",
        f"variants report {tmp_path}/v2 --out {tmp_path}/v2.html",
        "rollout start smol int4-v2 --wait --reason roll.sh r.yaml --steps 5,100",
    ]


def test_a_finished_variant_is_not_made_again(tmp_path: Path) -> None:
    """A second run after a failed rollout begins with the report."""
    (tmp_path / "v2").mkdir()
    (tmp_path / "v2" / "manifest.json").write_text("{}")
    code, calls = roll(tmp_path, "r.yaml", f"{tmp_path}/v2", "smol", "int4-v2", failing="rollout")
    assert (code, [call.split()[0] for call in calls]) == (3, ["variants", "rollout"])


@pytest.mark.parametrize("failing, ran", [("quantize", 1), ("variants", 2), ("rollout", 3)])
def test_exit_codes_are_passed_on(tmp_path: Path, failing: str, ran: int) -> None:
    """What fails ends it."""
    code, calls = roll(tmp_path, "r.yaml", f"{tmp_path}/v2", "smol", "int4-v2", failing=failing)
    assert (code, len(calls)) == (3, ran)


def test_usage(tmp_path: Path) -> None:
    """Too few arguments are a usage error."""
    assert roll(tmp_path, "r.yaml") == (2, [])
