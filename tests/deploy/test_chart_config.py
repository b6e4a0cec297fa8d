"""The rendered quantgate.yaml: `quantgate config check` accepts it, and a running gateway takes a new one."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from config.reload_effects import EFFECTS
from tests.config.sealed import seal
from tests.deploy.chart import CHART, EXAMPLES, Chart, Object
from tests.fakes.running import DEADLINE_SECONDS, HOST, ROOT, eventually, running_fake
from tests.gateway.fleet import CHAT, HELLO
from tests.gateway.test_workers import free_ports
from tests.serving.supervised import model_directory

examples = pytest.mark.parametrize("values", EXAMPLES, ids=lambda path: path.stem)
SECRETS = {
    "QUANTGATE_ADMIN_KEY": "a-key-of-the-admin-port",
    "QUANTGATE_STATE": "postgresql://quantgate:secret@database/quantgate",
    "QUANTGATE_ENGINE_KEY": "a-key-of-the-engines",
    "OPENAI_KEY": "a-key-of-a-provider",
}
ADMIN = {"authorization": f"Bearer {SECRETS['QUANTGATE_ADMIN_KEY']}"}


def quantgate(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run a command with the environment of the gateway's container."""
    command = [sys.executable, "-m", "quantgate", *map(str, arguments)]
    environment = {**os.environ, **SECRETS}
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


def annotations(deployments: Mapping[str, Object]) -> Object:
    """The annotations of the gateway's pods."""
    found: Object = deployments["qg-quantgate"]["spec"]["template"]["metadata"]["annotations"]
    return found


# A volume as the kubelet updates it


def mount(volume: Path, version: str, files: Mapping[str, str]) -> None:
    """Write the files of a projected volume: they are links through `..data`, which one rename turns over."""
    (volume / version).mkdir(parents=True)
    for name, text in files.items():
        (volume / version / name).write_text(text)
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(Path("..data", name))
    before = (volume / "..data").readlink() if (volume / "..data").is_symlink() else None
    (volume / "..data_tmp").symlink_to(version)
    (volume / "..data_tmp").rename(volume / "..data")
    if before is not None:
        shutil.rmtree(volume / before)


@asynccontextmanager
async def gateway(config: Path, home: Path) -> AsyncIterator[Process]:
    """Run `quantgate gateway` as the container does; it gets SIGTERM at the end."""
    command = (sys.executable, "-m", "quantgate", "gateway", str(config))
    environment = {**os.environ, **SECRETS, "QUANTGATE_HOME": str(home), "HOME": str(home)}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment, stderr=DEVNULL)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            await process.wait()


async def test_a_running_gateway_takes_a_new_config_map(chart: Chart, tmp_path: Path) -> None:
    """The links stay, `..data` changes: an alias and a key that are new are there, and nothing was restarted."""
    volume, home = tmp_path / "etc", tmp_path / "home"
    home.mkdir()
    client, admin = free_ports(2)
    keys = tmp_path / "keys.yaml"
    first = quantgate("keys", "create", "team-a", "--file", keys).stdout.strip()
    keys_before = keys.read_text()
    second = quantgate("keys", "create", "team-b", "--file", keys).stdout.strip()
    async with running_fake(served="hi") as fake:

        def text(*aliases: str) -> str:
            return configuration(chart, fake.url, (client, admin), home, aliases)

        mount(volume, "..2026_01", {"quantgate.yaml": text("smol"), "keys.yaml": keys_before})
        async with (
            gateway(volume / "quantgate.yaml", home) as process,
            httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as http,
        ):

            async def answered(path: str) -> bool:
                with suppress(httpx.TransportError):
                    return (await http.get(f"http://{HOST}:{admin}{path}")).status_code == 200
                return False

            async def status(model: str, key: str) -> int:
                headers = {"authorization": f"Bearer {key}"}
                body = {**HELLO, "model": model}
                return (await http.post(f"http://{HOST}:{client}{CHAT}", json=body, headers=headers)).status_code

            async def reloaded() -> bool:
                page = await http.get(f"http://{HOST}:{admin}/metrics", headers=ADMIN)
                return 'quantgate_config_reloads_total{outcome="applied"} 1.0' in page.text

            await eventually(lambda: answered("/readyz"))
            assert [await status("smol", first), await status("big", first), await status("smol", second)] == [
                200,
                404,
                401,
            ]
            mount(volume, "..2026_02", {"quantgate.yaml": text("smol", "big"), "keys.yaml": keys.read_text()})
            await eventually(reloaded)
            assert [await status("big", first), await status("smol", second)] == [200, 200]
            assert await answered("/livez")
            assert process.returncode is None
    assert process.returncode == 0


def configuration(chart: Chart, url: str, ports: tuple[int, int], home: Path, aliases: tuple[str, ...]) -> str:
    """What the chart renders for a gateway in front of a replica elsewhere, with addresses of this machine."""
    changes = {
        "variants": None,
        "config.variants": {"hi": {"precision": "bf16"}},
        "config.replicas": [{"variant": "hi", "url": url}],
        "config.aliases": {alias: {"ladder": ["hi"]} for alias in aliases},
    }
    text = chart.rendered(changes=changes).config_text()
    places = {
        "0.0.0.0:8000": f"{HOST}:{ports[0]}",
        "0.0.0.0:8001": f"{HOST}:{ports[1]}",
        "/var/lib/quantgate": str(home),
    }
    for rendered, here in places.items():
        assert rendered in text
        text = text.replace(rendered, here)
    assert yaml.safe_load(text)["gateway"]["keys"] == "keys.yaml"
    return text
