"""The units of deploy/systemd: valid, hardened, and true to the commands and configurations that they run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from config.load import load_settings
from config.schema import GatewaySettings, ReplicaSettings
from quantgate import COMMANDS
from serving.foreground import LOCKED, USAGE
from tests.fakes.running import ROOT

UNITS = ROOT / "deploy" / "systemd"
SERVICES = ("quantgate-gateway.service", "quantgate-serve.service")
SOCKETS = {"quantgate-gateway.socket": "client", "quantgate-gateway-admin.socket": "admin"}
# Of `systemd-analyze security`, from 0 (safe) to 10: a service without restrictions has 9.6. What remains of the
# gateway's is the network that it serves; replicas need devices, and compile code.
EXPOSURE = {"quantgate-gateway.service": 1.5, "quantgate-serve.service": 2.5}
# sysexits of a shell and of systemd are above these.
EXIT_CODES = {"quantgate-gateway.service": {USAGE}, "quantgate-serve.service": {USAGE, LOCKED}}


class Unit(dict[str, list[str]]):
    """The values of each option of a unit, in order; sections are left out, since no option is in two."""

    @classmethod
    def read(cls, name: str) -> "Unit":
        """Parse a unit of deploy/systemd."""
        found = cls()
        for line in (UNITS / name).read_text().splitlines():
            if line and line[0] not in "#[":
                key, _, value = line.partition("=")
                found.setdefault(key, []).append(value)
        return found

    def one(self, key: str) -> str:
        """The only value of an option."""
        (value,) = self[key]
        return value


@pytest.fixture(scope="module")
def analyze() -> str:
    """The path of systemd-analyze; skipped where systemd is not installed."""
    found = shutil.which("systemd-analyze")
    if found is None:
        pytest.skip("no systemd-analyze; `apt-get install systemd` brings it")
    return found


def installed(folder: Path) -> list[str]:
    """Copies of the units, for a quantgate in `folder`; the paths of those that can be verified."""
    program = folder / "quantgate"
    program.touch(mode=0o755)
    for path in UNITS.glob("quantgate-*"):
        (folder / path.name).write_text(path.read_text().replace("/opt/quantgate/bin/quantgate", str(program)))
    return [str(folder / name) for name in (*SERVICES, *SOCKETS)]


def test_the_units_are_valid(analyze: str, tmp_path: Path) -> None:
    """systemd-analyze, whose exit code says nothing, prints no problem."""
    done = subprocess.run([analyze, "verify", *installed(tmp_path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_wrong_option_is_found(analyze: str, tmp_path: Path) -> None:
    """A misspelt option would have no effect."""
    for unit in installed(tmp_path):
        path = Path(unit)
        path.write_text(path.read_text().replace("NoNewPrivileges", "NoNewPrivilege"))
    done = subprocess.run([analyze, "verify", str(tmp_path / SERVICES[0])], capture_output=True, text=True, check=False)
    assert "'NoNewPrivilege'" in done.stderr


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_hardened(analyze: str, name: str) -> None:
    """Its exposure is below its limit."""
    command = [analyze, "security", "--offline=true", "--no-pager", str(UNITS / name)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", output)
    assert float(exposure) < EXPOSURE[name]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_runs_a_command_that_exists(name: str) -> None:
    """The verb, its reload by SIGHUP, and the exit codes after which a restart is of no use."""
    unit = Unit.read(name)
    program, verb, config = unit.one("ExecStart").split()
    assert program == "/opt/quantgate/bin/quantgate"
    assert verb in COMMANDS
    assert config == "/etc/quantgate/quantgate.yaml"
    assert unit.one("ExecReload") == "kill -HUP $MAINPID"
    assert {int(code) for code in unit.one("RestartPreventExitStatus").split()} == EXIT_CODES[name]
    assert f"QUANTGATE_HOME=/var/lib/{unit.one('StateDirectory')}" in unit.one("Environment").split()


def test_a_gateway_may_drain() -> None:
    """systemd waits for longer than requests may take to end, and tells the gateway alone to stop."""
    unit = Unit.read("quantgate-gateway.service")
    assert float(unit.one("TimeoutStopSec")) > GatewaySettings().drain_seconds
    assert unit.one("KillMode") == "mixed"


def test_replicas_outlive_a_supervisor_that_was_killed() -> None:
    """Nothing but the supervisor gets a signal, and nothing that replicas use is removed with it."""
    unit = Unit.read("quantgate-serve.service")
    assert unit.one("KillMode") == "process"
    assert (unit.one("PrivateTmp"), unit.one("RemoveIPC")) == ("false", "false")
    drain_seconds = ReplicaSettings.model_fields["drain_seconds"].default
    assert float(unit.one("TimeoutStopSec")) > drain_seconds


@pytest.mark.parametrize("name, descriptor", SOCKETS.items())
def test_a_socket_belongs_to_the_gateway(name: str, descriptor: str) -> None:
    """Its address is that of the default configuration; its descriptor has the name that the gateway looks for."""
    unit, service = Unit.read(name), Unit.read("quantgate-gateway.service")
    default = {"client": GatewaySettings().listen, "admin": GatewaySettings().admin}
    assert unit.one("ListenStream") == default[descriptor]
    assert unit.one("FileDescriptorName") == descriptor
    assert unit.one("Service") == "quantgate-gateway.service"
    assert name in service.one("Requires").split()
    assert name in service["After"][0].split()


def test_both_services_read_the_same_secrets(tmp_path: Path) -> None:
    """They read one configuration, which the documentation shows; its credentials are loaded for both."""
    loaded = [set(Unit.read(name)["LoadCredential"]) for name in SERVICES]
    assert loaded[0] == loaded[1]
    (snippet,) = re.findall(r"```yaml\n(gateway:\n.*?)```", (ROOT / "deploy" / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "quantgate.yaml"
    path.write_text(snippet)
    for credential in re.findall(r"\$\{credential:([\w-]+)\}", snippet):
        assert f"{credential}:/etc/quantgate/credentials/{credential}" in loaded[0]
        (tmp_path / credential).write_text("s3cret")
    assert load_settings(path, {"CREDENTIALS_DIRECTORY": str(tmp_path)}).gateway.admin_key is not None


def test_the_user_of_the_units_is_declared(tmp_path: Path) -> None:
    """systemd-sysusers creates it."""
    users = {Unit.read(name).one("User") for name in SERVICES}
    assert users == {"quantgate"}
    sysusers = shutil.which("systemd-sysusers")
    if sysusers is None:
        pytest.skip("no systemd-sysusers; `apt-get install systemd` brings it")
    (tmp_path / "etc").mkdir()
    command = [sysusers, f"--root={tmp_path}", str(UNITS / "quantgate.sysusers.conf")]
    subprocess.run(command, capture_output=True, check=True)
    assert re.search(r"^quantgate:x:\d+:\d+:quantgate:/var/lib/quantgate:", (tmp_path / "etc/passwd").read_text())
