"""The documents are true: links, paths, commands, options and metrics exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config.explain import known_keys
from config.load import load_settings
from gateway.observability.metrics.table import GROUPS
from quantgate import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / folder / "README.md" for folder in (".", "gateway", "serving", "quantize")]
DEPLOY = [ROOT / "deploy" / name for name in ("README.md", "prometheus/runbook.md", "helm/quantgate/README.md")]
DOCUMENTS = [
    *(*READMES, *DEPLOY),
    *(ROOT / name for name in ("quantize/model-directories.md", "CONTRIBUTING.md", "CHANGELOG.md")),
]


def name_of(document: Path) -> str:
    """Return the path of a document as an id of test cases."""
    return str(document.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub generates them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_configuration_of_the_readme_is_valid(tmp_path: Path) -> None:
    """The smallest configuration of the README loads."""
    snippet, *_ = re.findall(r"```yaml\n(.*?)```", READMES[0].read_text(), re.DOTALL)
    path = tmp_path / "quantgate.yaml"
    path.write_text(snippet)
    assert load_settings(path, {}).aliases["qwq-32b"].ladder == ("qwq-bf16", "qwq-int4")


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_verbs_exist(document: Path) -> None:
    """Every `quantgate VERB` in a document exists."""
    text = document.read_text()
    named = re.findall(r"`quantgate ([a-z]+)", text) + re.findall(r"^    quantgate ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= set(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    """Every relative link leads to a file, and to a heading of it if it has an anchor."""
    for target in re.findall(r"\]\(([^):]+)\)", document.read_text()):
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_paths_exist(document: Path) -> None:
    """Every path in backticks that begins with a folder of the repository exists."""
    for path in re.findall(r"`((?:config|deploy|gateway|quantize|serving|tests)/[\w./-]*)`", document.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", READMES, ids=name_of)
def test_options_exist(document: Path) -> None:
    """Every option in backticks that is written with its table, such as `gateway.keys`, is in the schema."""
    for option in re.findall(r"`((?:gateway|serving)\.[a-z_.]+)", document.read_text()):
        *tables, name = option.split(".")
        assert name in known_keys(tuple(tables)), option


def test_the_gateways_readme_lists_all_metrics() -> None:
    """The table of metrics in the documentation is the one in the code, group by group."""
    expected = []
    for name, group in GROUPS.items():
        expected.append(f"| **{name}** | | | |")
        expected += [f"| `{spec.name}` | {spec.type} | {', '.join(spec.labels)} | {spec.help} |" for spec in group]
    assert re.findall(r"^\| (?:\*\*|`quantgate_).*$", READMES[1].read_text(), re.MULTILINE) == expected


def test_packages_are_typed() -> None:
    """Each package has a py.typed file, as the classifier in pyproject.toml promises."""
    packages = sorted(path.parent.name for path in ROOT.glob("*/py.typed"))
    assert packages == ["config", "gateway", "quantize", "serving"]


def test_constraints_hold_versions_only() -> None:
    """The constraints file has exact versions and no URLs."""
    lines = [line for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!_-]+( ;.*)?", line) for line in lines)


def installer(expression: str, **environment: str) -> str:
    """Evaluate an expression with the functions of the installer, in a process with this environment."""
    program = f"import runpy, sys; m = runpy.run_path('deploy/install.py'); print({expression})"
    env = {**{name: value for name, value in os.environ.items() if not name.startswith("PIP_")}, **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True).stdout.strip()


def test_pip_configuration_is_passed_to_uv() -> None:
    """Wheel folders and indexes of pip's configuration become options of uv; a local index does not."""
    options = installer(
        "' '.join(m['pip_options'](sys.executable))",
        PIP_CONFIG_FILE=os.devnull,
        PIP_FIND_LINKS="/wheels /more",
        PIP_INDEX_URL="https://one.example/simple",
        PIP_EXTRA_INDEX_URL="https://two.example/simple file:///three",
    )
    expected = "--find-links /wheels --find-links /more --default-index https://one.example/simple"
    assert options == f"{expected} --index https://two.example/simple --index-strategy unsafe-best-match"


@pytest.mark.parametrize("words", [[], ["everything"], ["demo", "test"]])
def test_installer_usage(words: list[str]) -> None:
    """An unknown task is a usage error, in one line."""
    command = [sys.executable, "deploy/install.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        "usage: install.py core|demo|test, or install.py --prefix FOLDER EXTRA..., or install.py --beside-vllm\n",
    )
