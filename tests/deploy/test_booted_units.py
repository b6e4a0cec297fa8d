"""The units under a real systemd: they let the gateway work, a restart refuses nobody, replicas outlive `serve`.

systemd is the first process of namespaces on the root file system of an image (tests/deploy/booted.py).
"""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.deploy.booted import Machine, NotBooted, booted
from tests.deploy.dockerfile import read_stages
from tests.deploy.image_root import NotPermitted, build_context, image_roots
from tests.fakes.running import ROOT, wait_until

# Packages are installed anew, which takes a minute or two where other tests run beside.
pytestmark = pytest.mark.timeout(600)

GATEWAY = "quantgate-gateway"
SOCKETS = (f"{GATEWAY}.socket", f"{GATEWAY}-admin.socket")
CONFIG = """
gateway:
  admin_key: ${credential:admin-key}
  state: sqlite:////var/lib/quantgate/state.db
variants:
  m1: {precision: int4}
replicas:
  - {variant: m1, url: "http://127.0.0.1:9000"}
aliases:
  chat: {ladder: [m1]}
"""
ENGINE = """
[Service]
WorkingDirectory=/opt/fake
ExecStart=/opt/quantgate/bin/python -m tests.fakes.vllm --host 127.0.0.1 --port 9000 --served-model-name m1
"""
# Sends one request after the other, each on a connection of its own, until there is a file; prints what failed.
CLIENT = """
import http.client, json, pathlib
body = json.dumps({"model": "chat", "messages": [{"role": "user", "content": "hi"}]})
failures, answered, stop = [], pathlib.Path("/run/answered"), pathlib.Path("/run/stop")
while not stop.exists():
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        reply = connection.getresponse()
        reply.read()
        if reply.status != 200:
            failures.append(reply.status)
        answered.touch()
    except OSError as error:
        failures.append(repr(error))
    finally:
        connection.close()
print(json.dumps(failures))
"""
READY = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8001/readyz', timeout=5).status)"
METRICS = """
import urllib.request as u
request = u.Request("http://127.0.0.1:8001/metrics", headers={"authorization": "Bearer s3cret"})
print(u.urlopen(request, timeout=5).read().decode())
"""
# In place of `quantgate serve`: a process with a child in a session of its own, as each replica is.
SUPERVISOR = "/bin/sh -c 'setsid sleep 86400 & exec sleep 86401'"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with quantgate, its units, and a fake engine; skipped where it can't be had."""
    if os.geteuid() != 0 or shutil.which("systemctl") is None:
        pytest.skip("booting systemd needs root, and systemd")
    try:
        with image_roots(build_context(tmp_path_factory.mktemp("context"))) as roots:
            root = roots.layer("machine", roots.build(read_stages(), "fake-vllm"))
            with booted(root) as made:
                install(made)
                yield made
    except (NotPermitted, NotBooted) as error:
        pytest.skip(f"this machine does not let tests boot systemd: {error}")


def install(machine: Machine) -> None:
    """Do what deploy/README.md says, but for packages, which are there."""
    units, etc = machine.path("/etc/systemd/system"), machine.path("/etc/quantgate")
    for unit in (ROOT / "deploy" / "systemd").glob("quantgate-*"):
        shutil.copy(unit, units)
    (units / "engine.service").write_text(ENGINE)
    shutil.copy(ROOT / "deploy" / "systemd" / "quantgate.sysusers.conf", machine.path("/usr/lib/sysusers.d"))
    machine.run("systemd-sysusers", "quantgate.sysusers.conf")
    (etc / "credentials").mkdir(parents=True)
    (etc / "credentials").chmod(0o700)
    (etc / "credentials" / "admin-key").write_text("s3cret\n")
    (etc / "quantgate.yaml").write_text(CONFIG)
    machine.run("systemctl", "daemon-reload")


@pytest.fixture
def gateway(machine: Machine) -> Iterator[int]:
    """The process of the gateway's service, as this process numbers it, ready to answer; stopped at the end."""
    machine.run("systemctl", "start", "engine", *SOCKETS, GATEWAY)
    wait_until(lambda: "200" in machine.run("/opt/quantgate/bin/python", "-c", READY, check=False))
    yield int(machine.show(GATEWAY, "MainPID"))
    machine.run("systemctl", "stop", *SOCKETS, GATEWAY)
    assert machine.show(GATEWAY, "Result") == "success"


def test_the_gateway_is_confined(machine: Machine, gateway: int) -> None:
    """It has no privileges, filters system calls, can't write where it should not; its secret is its own."""
    status = machine.path(f"/proc/{gateway}/status").read_text()
    assert re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\t0+$", status, re.MULTILINE)
    assert machine.path(f"/proc/{gateway}").stat().st_uid != 0
    mounts = machine.path(f"/proc/{gateway}/mountinfo").read_text()
    assert re.search(r" / / ro,", mounts)
    assert f"/run/credentials/{GATEWAY}.service ro" in mounts
    assert (machine.path("/var/lib/quantgate/state.db")).exists()


def test_the_gateway_knows_itself(machine: Machine, gateway: int) -> None:
    """The sandbox hides nothing that metrics of the process are made from."""
    metrics = machine.run("/opt/quantgate/bin/python", "-c", METRICS)
    found = dict(re.findall(r"^(process_\w+) (\S+)$", metrics, re.MULTILINE))
    assert abs(float(found["process_start_time_seconds"]) - time.time()) < 3600
    assert float(found["process_resident_memory_bytes"]) > 0
    assert float(found["process_open_fds"]) > 0


def test_a_restart_refuses_nobody(machine: Machine, gateway: int) -> None:
    """Requests on new connections are answered all the time: they wait while no gateway runs."""
    command = machine.command(["/opt/quantgate/bin/python", "-c", CLIENT])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        wait_until(machine.path("/run/answered").exists)
        machine.run("systemctl", "restart", GATEWAY)
        machine.path("/run/answered").unlink()
        wait_until(machine.path("/run/answered").exists)
        machine.path("/run/stop").touch()
        output, _ = client.communicate()
    assert json.loads(output) == []
    assert int(machine.show(GATEWAY, "MainPID")) != gateway


def test_a_reload_keeps_the_process(machine: Machine, gateway: int) -> None:
    """`systemctl reload` reads the configuration again."""
    machine.run("systemctl", "reload", GATEWAY)
    assert int(machine.show(GATEWAY, "MainPID")) == gateway
    assert machine.show(GATEWAY, "ActiveState") == "active"


def test_a_killed_gateway_starts_again(machine: Machine, gateway: int) -> None:
    """Within seconds, and for ever."""
    machine.run("systemctl", "kill", "--signal=SIGKILL", GATEWAY)
    wait_until(lambda: machine.show(GATEWAY, "NRestarts") == "1")
    wait_until(lambda: machine.show(GATEWAY, "ActiveState") == "active")


def test_a_service_with_a_faulty_configuration_is_not_restarted(machine: Machine) -> None:
    """Its exit code says so; here no engine is installed that `serve` could start."""
    own = CONFIG.replace(', url: "http://127.0.0.1:9000"', "")
    machine.path("/etc/quantgate/quantgate.yaml").write_text(own)
    machine.run("systemctl", "start", "quantgate-serve", check=False)
    wait_until(lambda: machine.show("quantgate-serve", "ActiveState") == "failed")
    assert machine.show("quantgate-serve", "ExecMainStatus") == "2"
    assert machine.show("quantgate-serve", "NRestarts") == "0"
    machine.path("/etc/quantgate/quantgate.yaml").write_text(CONFIG)


def test_replicas_outlive_a_killed_supervisor(machine: Machine) -> None:
    """The next start finds them; `systemctl kill` reaches them, too."""
    unit = machine.path("/etc/systemd/system/quantgate-serve.service")
    written = unit.read_text()
    unit.write_text(re.sub(r"^ExecStart=.*$", f"ExecStart={SUPERVISOR}", written, flags=re.MULTILINE))
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "quantgate-serve")
    first = wait_until(lambda: sleeping(machine))
    machine.run("systemctl", "kill", "--kill-whom=main", "--signal=SIGKILL", "quantgate-serve")
    wait_until(lambda: machine.show("quantgate-serve", "NRestarts") == "1")
    wait_until(lambda: len(sleeping(machine)) == 2)
    both = sleeping(machine)
    assert set(first) < set(both)
    machine.run("systemctl", "stop", "quantgate-serve")
    assert sleeping(machine) == both
    machine.run("systemctl", "kill", "--signal=SIGKILL", "quantgate-serve")
    wait_until(lambda: not sleeping(machine))


def sleeping(machine: Machine) -> list[str]:
    """The processes that stand for replicas."""
    return machine.run("pgrep", "--full", "^sleep 86400", check=False).split()
