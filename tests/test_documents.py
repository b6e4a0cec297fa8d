"""What the documents and the installer say is so."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.load import load_settings
from quantgate import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_configuration_of_the_readme_is_valid(tmp_path: Path) -> None:
    """The smallest useful configuration is one."""
    (snippet,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    path = tmp_path / "quantgate.yaml"
    path.write_text(snippet)
    assert load_settings(path, {}).aliases["qwq-32b"].ladder == ("qwq-bf16", "qwq-int4")


def test_verbs_of_the_readme_exist() -> None:
    """Every `quantgate VERB` that is written exists."""
    named = set(re.findall(r"`quantgate ([a-z]+)", README)) | set(
        re.findall(r"^    quantgate ([a-z]+)", README, re.MULTILINE)
    )
    assert named
    assert named <= set(COMMANDS)


def test_files_of_the_readme_exist() -> None:
    """Every link leads to a file."""
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_constraints_hold_versions_only() -> None:
    """The constraints file pins exactly, and names no address."""
    lines = [line for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+( ;.*)?", line) for line in lines)


def installer(expression: str, **environment: str) -> str:
    """Evaluate an expression over the installer's functions, in a process with this environment."""
    program = f"import runpy, sys; m = runpy.run_path('deploy/install.py'); print({expression})"
    env = {**{name: value for name, value in os.environ.items() if not name.startswith("PIP_")}, **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout.strip()


def test_what_pip_is_told_uv_is_told() -> None:
    """Wheel folders and indexes of pip's configuration reach uv; a local index that pip may skip does not."""
    told = installer(
        "' '.join(m['configured'](sys.executable))",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="/wheels /more",
        PIP_INDEX_URL="https://one.example/simple",
        PIP_EXTRA_INDEX_URL="https://two.example/simple file:///three",
    )
    expected = "--find-links /wheels --find-links /more --default-index https://one.example/simple"
    assert told == f"{expected} --index https://two.example/simple --index-strategy unsafe-best-match"


@pytest.mark.parametrize("words", [[], ["everything"], ["demo", "test"]])
def test_installer_usage(words: list[str]) -> None:
    """A task that isn't known is a usage error, in one line."""
    command = [sys.executable, "deploy/install.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: install.py core|demo|test\n")
