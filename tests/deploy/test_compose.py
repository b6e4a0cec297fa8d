"""deploy/compose.yaml: valid, and true to the images, configurations and directories that it names."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import compose_spec
import pytest
import yaml

from config.load import load_settings
from config.schema import Settings
from quantgate import COMMANDS
from serving.command import build_command
from tests.deploy.dockerfile import read_stages
from tests.deploy.prometheus import program
from tests.fakes.options import parse
from tests.fakes.running import ROOT

DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
PROFILES = ("fake", "cpu", "gpu")
# `${NAME:-default}`, the only form of Compose's references that is used.
REFERENCE = re.compile(r"\$\{[A-Z_]+:-([^}]*)\}")
DOCUMENT: dict[str, Any] = yaml.safe_load(REFERENCE.sub(r"\1", COMPOSE.read_text()))
SERVICES: dict[str, dict[str, Any]] = DOCUMENT["services"]
STAGES = read_stages()


def of_profile(profile: str, kind: str) -> dict[str, dict[str, Any]]:
    """The services of a profile whose names begin with `kind`."""
    return {
        name: service for name, service in SERVICES.items() if profile in service["profiles"] and name.startswith(kind)
    }


def mounts(service: dict[str, Any]) -> dict[str, str]:
    """The mounted files, directories and volumes, by their path in the container."""
    found = {}
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
            found[target] = source
        else:
            found[volume["target"]] = volume["source"]
    return found


def settings(profile: str, tmp_path: Path) -> Settings:
    """The configuration of the gateway of a profile, with a secret as Compose mounts it."""
    (gateway,) = of_profile(profile, "gateway").values()
    (tmp_path / "admin-key").write_text("s3cret\n")
    path = DEPLOY / mounts(gateway)["/etc/quantgate/quantgate.yaml"]
    return load_settings(path, {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_the_file_is_valid() -> None:
    """A parser of the Compose specification accepts it."""
    parsed = compose_spec.PyCompose.from_yaml(json.dumps(DOCUMENT))
    assert set(parsed.service_names()) == set(SERVICES)


def test_a_wrong_key_is_found() -> None:
    """The parser rejects what the specification does not have."""
    wrong = {**DOCUMENT, "services": {"a": {"image": "x", "read-only": True}}}
    with pytest.raises(ValueError, match="read-only"):
        compose_spec.PyCompose.from_yaml(json.dumps(wrong))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_privileges(name: str) -> None:
    """A read-only root file system, no capabilities, no new privileges; ports for this machine only."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert service["profiles"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_mounts_exists(name: str) -> None:
    """Files and directories are in the repository, volumes, secrets and networks in the file."""
    service = SERVICES[name]
    for source in mounts(service).values():
        if source.startswith("./"):
            assert (DEPLOY / source).exists(), source
        else:
            assert source.startswith("/") or source in DOCUMENT["volumes"], source
    assert set(service.get("secrets", [])) <= set(DOCUMENT["secrets"])
    assert set(service.get("networks", [])) <= set(DOCUMENT["networks"])


@pytest.mark.parametrize("name", [name for name, service in SERVICES.items() if "build" in service])
def test_an_image_is_built_from_its_target(name: str) -> None:
    """The target exists, and each image has one target."""
    build = SERVICES[name]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).exists()
    assert SERVICES[name]["image"] == f"quantgate-{build['target']}"
    assert STAGES[build["target"]].last("ENTRYPOINT").words


@pytest.mark.parametrize("profile", PROFILES)
def test_gateway_and_engines_of_a_profile_meet(profile: str, tmp_path: Path) -> None:
    """The gateway's configuration is valid; its replicas are the engines, by address, name and directory."""
    configured = settings(profile, tmp_path)
    engines = of_profile(profile, "engine")
    served = {}
    for service in engines.values():
        (alias,) = service["networks"]["engines"]["aliases"]
        command = [str(word) for word in service["command"]]
        served[f"http://{alias}:{value(command, '--port')}"] = (
            value(command, "--served-model-name"),
            value(command, "--model") or command[0],
        )
    replicas = {
        replica.url: (replica.variant, configured.variants[replica.variant].path or f"/models/{replica.variant}")
        for replica in configured.replicas
    }
    assert served == replicas


@pytest.mark.parametrize("profile", PROFILES)
def test_a_gateway_has_what_its_configuration_names(profile: str, tmp_path: Path) -> None:
    """Published ports, the health check, secrets, state, models and the time to stop fit its configuration."""
    configured = settings(profile, tmp_path).gateway
    (gateway,) = of_profile(profile, "gateway").values()
    ports = {address.rpartition(":")[2] for address in (configured.listen, configured.admin)}
    assert {port.rpartition(":")[2] for port in gateway["ports"]} == ports
    environment = STAGES["gateway"].pairs("ENV")
    assert environment["HEALTHCHECK_URL"] == f"http://127.0.0.1:{configured.admin.rpartition(':')[2]}/livez"
    assert environment["CREDENTIALS_DIRECTORY"] == "/run/secrets"
    assert gateway["secrets"] == ["admin-key"]
    mounted = mounts(gateway)
    assert mounted["/var/lib/quantgate"] == "state"
    assert configured.state.startswith("sqlite:////var/lib/quantgate/")
    assert str(configured.keys).startswith("/var/lib/quantgate/")
    assert ("/models" in mounted) == (profile != "fake")
    assert float(gateway["stop_grace_period"].removesuffix("s")) > configured.drain_seconds


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_engines_get_the_flags_of_own_replicas(profile: str) -> None:
    """`quantgate serve` starts vLLM with the same flags; the time to stop covers the longest request."""
    known = set(re.findall(r"--[a-z-]+", Path(build_command.__code__.co_filename).read_text()))
    for service in of_profile(profile, "engine").values():
        command = [str(word) for word in service["command"]]
        assert {word for word in command if word.startswith("--")} <= known
        patience = float(service["stop_grace_period"].removesuffix("s"))
        assert patience > float(value(command, "--shutdown-timeout"))


def test_fake_engines_know_their_flags() -> None:
    """Flags that the fake does not know are skipped, so each must have had an effect."""
    for service in of_profile("fake", "engine").values():
        command = [str(word) for word in service["command"]]
        options = parse(command, {})
        assert (options.host, options.port, options.max_num_seqs) == (
            "0.0.0.0",
            8000,
            int(value(command, "--max-num-seqs")),
        )
        assert options.faults.tokens_per_second == float(value(command, "--fake-tokens-per-second"))
        assert options.load_tracking
        assert options.request_id_headers


def test_tools_run_commands_that_exist() -> None:
    """`keys` and `quantize` are verbs; an unprivileged user can run them without a network."""
    for service in of_profile("tools", "").values():
        words = [*service.get("entrypoint", ["quantgate"]), *service["command"]]
        assert words[0] == "quantgate"
        assert words[1] in COMMANDS
        assert service["network_mode"] == "none"


def test_prometheus_scrapes_what_runs(tmp_path: Path) -> None:
    """Its configuration is valid, with the files that are mounted; its targets are names of the file."""
    promtool = program("promtool")
    mounted = mounts(SERVICES["prometheus"])
    text = (DEPLOY / mounted["/etc/prometheus/prometheus.yml"]).read_text()
    targets = set(re.findall(r"gateway(?=:8001)|engine-\w+", text))
    aliases = {
        alias
        for service in SERVICES.values()
        if isinstance(service.get("networks"), dict)
        for network in service["networks"].values()
        for alias in network.get("aliases", [])
    }
    assert targets == aliases
    if promtool is None:
        pytest.skip("no promtool; `apt-get install prometheus` brings one")
    (tmp_path / "rules").symlink_to(DEPLOY / mounted["/etc/prometheus/rules"])
    (tmp_path / "admin-key").touch()
    (tmp_path / "prometheus.yml").write_text(text.replace("/run/secrets/", f"{tmp_path}/"))
    command = [promtool, "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_grafana_finds_prometheus_and_the_dashboards() -> None:
    """Data source and dashboards are mounted where Grafana looks."""
    mounted = mounts(SERVICES["grafana"])
    source = yaml.safe_load((DEPLOY / mounted["/etc/grafana/provisioning/datasources/prometheus.yml"]).read_text())
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/quantgate.yml").read_text())[
        "providers"
    ]
    dashboards = DEPLOY / mounted[provider["options"]["path"]]
    assert any(dashboards.glob("*.json"))


def test_secrets_are_made_once(tmp_path: Path) -> None:
    """The script creates each secret that the file names, readable for containers; those that exist stay.

    An empty one, which a full disk may have left, is replaced.
    """
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "admin-key").touch()
    script = tmp_path / "make-secrets.sh"
    script.write_bytes((DEPLOY / "compose" / "make-secrets.sh").read_bytes())
    made = []
    for _ in range(2):
        subprocess.run(["sh", script], check=True)
        made.append({path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()})
    assert made[0] == made[1]
    assert {f"./compose/secrets/{name}" for name in made[0]} == {each["file"] for each in DOCUMENT["secrets"].values()}
    assert len(set(made[0].values())) == len(made[0])
    assert all(len(secret) >= 32 for secret in made[0].values())
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "secrets").iterdir()} == {0o444}
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700


def value(command: list[str], flag: str) -> str:
    """The value of a flag in a command line; empty without it."""
    return command[command.index(flag) + 1] if flag in command else ""
