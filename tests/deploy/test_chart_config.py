"""The rendered quantgate.yaml: `quantgate config check` accepts it, and a change restarts pods only if it must."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from config.reload_effects import EFFECTS
from tests.config.sealed import seal
from tests.deploy.chart import CHART, EXAMPLES, MINIMAL, Chart, Object
from tests.fakes.running import ROOT
from tests.serving.supervised import model_directory

examples = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
SECRETS = {
    "QUANTGATE_ADMIN_KEY": "a-key-of-the-admin-port",
    "QUANTGATE_STATE": "postgresql://quantgate:secret@database/quantgate",
    "QUANTGATE_ENGINE_KEY": "a-key-of-the-engines",
    "OPENAI_KEY": "a-key-of-a-provider",
}


# Kubernetes sets them in every pod.
IN_A_POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}


def quantgate(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command with the environment of the gateway's container."""
    command = [sys.executable, "-m", "quantgate", *map(str, arguments)]
    environment = {**os.environ, **SECRETS, **IN_A_POD}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@examples
def test_the_configuration_is_valid(chart: Chart, values: Path, tmp_path: Path) -> None:
    """Without a warning; `--file-only`: the models are in the cluster."""
    path = tmp_path / "quantgate.yaml"
    path.write_text(chart.rendered(values).config_text())
    result = quantgate("config", "check", path, "--file-only")
    assert (result.returncode, result.stderr) == (0, "")
    assert "no problems" in result.stdout


def test_the_configuration_is_valid_with_its_models(chart: Chart, tmp_path: Path) -> None:
    """With manifests on the volume: measured quality meets the floor, and the keys file is beside it."""
    models = tmp_path / "models"
    rendered = chart.rendered(CHART / "examples" / "qwq-32b.yaml", {"models.mountPath": str(models)})
    model_directory(models / "QwQ-32B-finetuned")
    for name, bits in (("qwq-int8", 8), ("qwq-int4", 4)):
        (models / name).mkdir()
        seal(models / name, bits)
    path = tmp_path / "quantgate.yaml"
    path.write_text(rendered.config_text())
    assert quantgate("keys", "create", "team-a", "--file", tmp_path / "keys.yaml").returncode == 0
    result = quantgate("config", "check", path)
    assert (result.returncode, result.stderr) == (0, "")


def test_keys_are_mounted_unless_they_are_in_the_database(chart: Chart) -> None:
    """The file is beside quantgate.yaml, in one volume, so that both change at the same moment."""

    def sources(values: Path) -> list[str]:
        volumes = {volume["name"]: volume for volume in chart.rendered(values).gateway().spec["volumes"]}
        return [kind for source in volumes["config"]["projected"]["sources"] for kind in source]

    assert sources(MINIMAL) == ["configMap", "secret"]
    assert sources(CHART / "examples" / "several-gateways.yaml") == ["configMap"]


def test_declared_quality_is_configured(chart: Chart) -> None:
    """Where the gateway does not see the models, and for variants with a volume of their own."""
    variants = chart.rendered(CHART / "examples" / "inference-pool.yaml").config()["variants"]
    assert variants["qwq-int4"] == {"precision": "int4", "quality": {"top1_agreement": 0.947, "kl_mean": 0.031}}


def test_options_are_added_to_variants(chart: Chart) -> None:
    """`config` is merged into what the chart knows."""
    lora = {"math": {"quality": {"top1_agreement": 0.9}}}
    config = chart.rendered(changes={"config.variants": {"qwq-int4": {"lora": lora}}}).config()
    assert config["variants"]["qwq-int4"] == {"path": "/models/qwq-int4", "lora": lora}


def test_options_that_restart_the_gateway(chart: Chart) -> None:
    """Those that take effect at the next start change the pod template; all others are taken from the file."""
    template = (CHART / "templates" / "_config.tpl").read_text()
    (line,) = [line for line in template.splitlines() if "pick $gateway" in line]
    listed = re.findall(r'"(\w+)"', line)
    at_start = {name.removeprefix("gateway.") for name, (when, _) in EFFECTS.items() if when == "start"} - {"serving"}
    assert set(listed) == at_start

    def restarts(**gateway: Any) -> bool:
        changed = chart.rendered(changes={"config.gateway": gateway})
        assert changed.config() != chart.rendered().config()
        return annotations(changed.of("Deployment")) != annotations(chart.rendered().of("Deployment"))

    assert restarts(access_log="json")
    assert restarts(per_key_metrics=True)
    assert not restarts(drain_seconds=30, limits={"n": 4})
    assert not restarts(cors={"origins": ["*"]})


def test_the_first_external_model_restarts_the_gateway(chart: Chart) -> None:
    """A process that has started without one cannot ask it; a second one needs no restart."""

    def pods(*models: str) -> Object:
        variants = {name: {"external": f"openai/{name}", "api_key": "${env:OPENAI_KEY}"} for name in models}
        return annotations(chart.rendered(changes={"config.variants": variants}).of("Deployment"))

    assert pods() != pods("gpt-a") == pods("gpt-a", "gpt-b")


def annotations(deployments: Mapping[str, Object]) -> Object:
    """The annotations of the gateway's pods."""
    found: Object = deployments["qg-quantgate"]["spec"]["template"]["metadata"]["annotations"]
    return found
