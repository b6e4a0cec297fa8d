"""Scrape configuration, recording rules and alerts: valid, tested one by one, and described in the runbook."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.prometheus import program
from tests.deploy.promql import DASHBOARDS, PROMETHEUS, RULES, rules
from tests.fakes.running import ROOT

ALERTS = {rule["alert"]: rule for rule in rules() if "alert" in rule}
TESTS = tuple(sorted((PROMETHEUS / "tests").glob("*.yml")))
RUNBOOK = PROMETHEUS / "runbook.md"


@pytest.fixture(scope="module")
def promtool() -> str:
    """The path of promtool; skipped where it is not installed."""
    executable = program("promtool")
    if executable is None:
        pytest.skip("no promtool; `apt-get install prometheus` brings one")
    return executable


def test_the_configuration_is_valid(promtool: str) -> None:
    """promtool accepts it, with the files that it names."""
    assert "SUCCESS" in run(promtool, "check", "config", "prometheus.yml")
    assert "SUCCESS" in run(promtool, "check", "rules", "--lint-fatal", *map(str, RULES))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_tests_of_the_rules_pass(promtool: str, path: Path) -> None:
    """Alerts fire when they should, with these labels and texts, and not before."""
    assert "SUCCESS" in run(promtool, "test", "rules", str(path))


def test_a_test_of_the_rules_can_fail(promtool: str, tmp_path: Path) -> None:
    """With another threshold, the tests say so."""
    for name in ("rules", "tests"):
        shutil.copytree(PROMETHEUS / name, tmp_path / name)
    changed = tmp_path / "rules" / "alerts.yml"
    changed.write_text(changed.read_text().replace("14 * 86400", "13 * 86400"))
    command = [promtool, "test", "rules", str(tmp_path / "tests" / "slow_alerts_test.yml")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode
    assert "alertname: QuantgateCertificateExpires" in result.stderr + result.stdout


def run(executable: str, *arguments: str) -> str:
    """Run promtool in its directory; AssertionError with its output if it fails."""
    result = subprocess.run([executable, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_every_alert_has_a_test() -> None:
    """One that fires, and one that does not."""
    expected: dict[str, set[bool]] = {}
    for path in TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test["alert_rule_test"]:
                expected.setdefault(case["alertname"], set()).add(bool(case["exp_alerts"]))
    assert expected == {name: {True, False} for name in ALERTS}


def test_the_runbook_describes_every_alert() -> None:
    """Each alert has a section there, in the order of the rules, that begins with what it means."""
    sections = re.findall(r"^## (\w+)\n\n(.*)$", RUNBOOK.read_text(), re.MULTILINE)
    assert [name for name, _ in sections] == list(ALERTS)
    assert all(text.startswith("- **Means**: ") for _, text in sections)


@pytest.mark.parametrize("alert", ALERTS.values(), ids=lambda alert: alert["alert"])
def test_alerts_are_complete(alert: dict[str, Any]) -> None:
    """Each has a severity, texts, the section of the runbook, and a dashboard that exists."""
    notes = alert["annotations"]
    assert set(notes) == {"summary", "description", "runbook", "dashboard"}
    path, _, anchor = notes["runbook"].partition("#")
    assert (ROOT / path, anchor) == (RUNBOOK, alert["alert"].lower())
    assert notes["dashboard"] in {dashboard.stem for dashboard in DASHBOARDS}
    assert alert["labels"] in ({"severity": "page"}, {"severity": "ticket"})


def test_the_runbook_names_panels_that_exist() -> None:
    """A panel that it sends people to is there."""
    titles = "\n".join(path.read_text() for path in DASHBOARDS)
    named = re.findall(r'"([A-Z][^"]+)"', RUNBOOK.read_text())
    assert named
    assert [panel for panel in named if f'"title": "{panel}"' not in titles] == []
