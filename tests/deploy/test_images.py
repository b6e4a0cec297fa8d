"""The images of deploy/docker: linted and complete; the gateway's is built, and run as a container would run it."""

import asyncio
import os
import re
import subprocess
import sys
import venv
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

import httpx
import pytest

from serving.command import VLLM_MODULE
from serving.machine import free_port
from tests.deploy.dockerfile import DOCKERFILE, read_stages
from tests.deploy.image_root import ImageRoot, ImageRoots, NotPermitted, build_context, image_roots
from tests.fakes.running import HOST, PATIENCE_SECONDS, ROOT, eventually

# Packages are installed anew, which takes a minute or two where other tests run beside.
pytestmark = pytest.mark.timeout(600)

STAGES = read_stages()
IMAGES = ("gateway", "fake-vllm", "engine-cpu", "engine-cuda", "quantize")
USER = "10001:10001"
CONFIG = """
gateway:
  listen: {host}:{client}
  admin: {host}:{admin}
  admin_key: ${{credential:admin-key}}
  state: sqlite:////var/lib/quantgate/state.db
  keys: /var/lib/quantgate/keys.yaml
variants:
  m1: {{precision: int4}}
replicas:
  - {{variant: m1, url: "http://{host}:{engine}"}}
aliases:
  chat: {{ladder: [m1]}}
"""


@dataclass(frozen=True, slots=True)
class Container:
    """A process that runs in the root of an image, as its user."""

    process: asyncio.subprocess.Process
    output: Path

    async def stop(self, image: str) -> int | None:
        """Stop it as a runtime does, by the image's signal; returns its exit code."""
        self.process.send_signal(Signals[STAGES[image].last("STOPSIGNAL").value])
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await self.process.wait()


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageRoots]:
    """Where images are built; skipped for users who may not mount."""
    if os.geteuid() != 0:
        pytest.skip("building a root file system needs root")
    try:
        with image_roots(build_context(tmp_path_factory.mktemp("context"))) as made:
            yield made
    except NotPermitted as error:
        pytest.skip(f"this machine does not let tests mount file systems: {error}")


@pytest.fixture(scope="module")
def gateway(roots: ImageRoots) -> ImageRoot:
    """The root of the gateway's image, as its Dockerfile builds it."""
    return roots.build(STAGES, "gateway")


@pytest.fixture(scope="module")
def fake_engine(roots: ImageRoots, gateway: ImageRoot) -> ImageRoot:
    """The root of the fake engine's image; read-only, as compose.yaml runs it."""
    root = roots.build(STAGES, "fake-vllm")
    root.make_read_only([])
    return root


@asynccontextmanager
async def container(root: ImageRoot, image: str, arguments: list[str], output: Path) -> AsyncIterator[Container]:
    """Run an image with these arguments, as its user, with its environment and nothing else."""
    stage = STAGES[image]
    words = [*stage.last("ENTRYPOINT").words, *arguments]
    command = root.command(words, stage.pairs("ENV"), stage.last("USER").value, stage.last("WORKDIR").value)
    with output.open("wb") as written:
        process = await asyncio.create_subprocess_exec(*command, stdout=written, stderr=written)
    try:
        yield Container(process, output)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def healthy(root: ImageRoot, image: str, url: str) -> bool:
    """What the image's health check says."""
    command = STAGES[image].health_command
    environment = STAGES[image].pairs("ENV") | {"HEALTHCHECK_URL": url, "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(root.command(command, environment, USER), capture_output=True, check=False).returncode == 0


def create_key(root: ImageRoot) -> str:
    """Create an API key as the service `keys` of compose.yaml does."""
    stage = STAGES["gateway"]
    words = ["quantgate", "keys", "create", "alice"]
    command = root.command(words, stage.pairs("ENV"), USER, stage.last("WORKDIR").value)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


async def test_the_gateway_runs_as_in_a_container(gateway: ImageRoot, fake_engine: ImageRoot, tmp_path: Path) -> None:
    """Without privileges, on a read-only file system; healthy, it answers through the fake; SIGTERM ends it with 0."""
    client, admin, engine = free_port(), free_port(), free_port()
    gateway.path("/etc/quantgate").mkdir()
    text = CONFIG.format(host=HOST, client=client, admin=admin, engine=engine)
    gateway.path("/etc/quantgate/quantgate.yaml").write_text(text)
    gateway.path("/run/secrets").mkdir(parents=True)
    gateway.path("/run/secrets/admin-key").write_text("s3cret\n")
    gateway.make_read_only(["/var/lib/quantgate"])
    bearer = {"authorization": f"Bearer {create_key(gateway)}"}
    flags = ["--host", HOST, "--port", str(engine), "--served-model-name", "m1"]
    async with (
        container(fake_engine, "fake-vllm", flags, tmp_path / "engine"),
        container(gateway, "gateway", STAGES["gateway"].last("CMD").words, tmp_path / "gateway") as running,
        httpx.AsyncClient() as http,
    ):
        await eventually(
            lambda: healthy(gateway, "gateway", f"http://{HOST}:{admin}/readyz") or running.process.returncode
        )
        assert running.process.returncode is None, running.output.read_text()
        assert healthy(gateway, "gateway", f"http://{HOST}:{admin}/livez")
        assert healthy(fake_engine, "fake-vllm", f"http://{HOST}:{engine}/health")
        assert not healthy(gateway, "gateway", f"http://{HOST}:{admin}/nowhere")
        body = {"model": "chat", "messages": [{"role": "user", "content": "hi"}]}
        reply = await http.post(f"http://{HOST}:{client}/v1/chat/completions", json=body, headers=bearer)
        assert reply.status_code == 200
        metrics = await http.get(f"http://{HOST}:{admin}/metrics", headers={"authorization": "Bearer s3cret"})
        assert metrics.status_code == 200
        status = Path(f"/proc/{running.process.pid}/status").read_text()
        assert re.search(r"^Uid:\t10001\t10001\t10001\t10001$", status, re.MULTILINE)
        assert await running.stop("gateway") == 0
    assert "Traceback" not in running.output.read_text()


def test_the_gateway_image_is_small(gateway: ImageRoot, capsys: pytest.CaptureFixture[str]) -> None:
    """No torch, no engine, no test tools and no installers; packages keep the metadata that an SBOM is made from."""
    names = ("torch", "transformers", "vllm", "litellm", "pytest", "pip", "uv", "grafana_foundation_sdk")
    program = f"from importlib.util import find_spec; print([name for name in {names} if find_spec(name)])"
    command = gateway.command(["/opt/quantgate/bin/python", "-I", "-c", program], {}, USER)
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
    (packages,) = gateway.path("/opt/quantgate/lib").glob("python*/site-packages")
    described = {path.name.partition("-")[0] for path in packages.glob("*.dist-info") if (path / "METADATA").exists()}
    assert {"quantgate", "httptools", "psycopg", "opentelemetry_sdk"} <= described
    assert any(packages.glob("gateway/__pycache__/*.pyc")), "byte-code can't be written later"
    size = subprocess.run(
        ["du", "-sm", str(gateway.path("/opt/quantgate"))], capture_output=True, text=True, check=True
    )
    megabytes = int(size.stdout.split()[0])
    with capsys.disabled():
        print(f"\n/opt/quantgate of the gateway image: {megabytes} MB, {len(described)} packages")
    assert megabytes < 200


def test_quantgate_of_the_image_works(gateway: ImageRoot) -> None:
    """Its version is that of the project; files that are no Python, such as the status page, are there."""
    command = gateway.command(["quantgate", "--version"], STAGES["gateway"].pairs("ENV"), USER)
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert version == STAGES["gateway"].pairs("ARG")["VERSION"]
    (packages,) = gateway.path("/opt/quantgate/lib").glob("python*/site-packages")
    assert (packages / "gateway" / "ui" / "index.html").exists()
    assert not (packages / "gateway" / "ui" / "screenshots").exists()


def test_the_user_of_the_images(gateway: ImageRoot) -> None:
    """It has a name, for programs that look it up, no shell, and the directories that it writes to."""
    passwd = gateway.path("/etc/passwd").read_text()
    assert re.search(r"^quantgate:x:10001:10001::/var/lib/quantgate:/usr/sbin/nologin$", passwd, re.MULTILINE)
    for directory in ("/var/lib/quantgate", "/var/cache/quantgate"):
        status = gateway.path(directory).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (10001, 10001, 0o750)


def test_quantgate_beside_vllm_changes_nothing(tmp_path: Path) -> None:
    """What vLLM's image has installed stays, even where quantgate could use a newer version."""
    python, context = str(tmp_path / "env" / "bin" / "python"), str(build_context(tmp_path / "context"))
    venv.create(tmp_path / "env", with_pip=True)
    # An older version than constraints.txt has, and one package less than quantgate needs.
    uv = [sys.executable, "-m", "uv", "pip"]
    subprocess.run([*uv, "install", "--quiet", "--python", python, "fastapi==0.134.0", context], check=True)
    subprocess.run([*uv, "uninstall", "--quiet", "--python", python, "quantgate", "shtab"], check=True)
    freeze = [python, "-m", "pip", "freeze"]
    before = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    subprocess.run([python, f"{context}/deploy/install.py", "--beside-vllm"], check=True, capture_output=True)
    after = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    added = {line.partition("==")[0].partition(" @")[0] for line in {*after.splitlines()} - {*before.splitlines()}}
    assert added == {"quantgate", "shtab"}


def test_hadolint_finds_nothing() -> None:
    """The Dockerfile follows its rules, but where a comment says why not."""
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("no hadolint; `python3 deploy/install.py test` brings it")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_follows_the_rules(image: str) -> None:
    """A numeric user that is not root, commands without a shell, a signal to stop, a health check, labels."""
    stage = STAGES[image]
    assert stage.last("USER").value == USER
    assert stage.last("STOPSIGNAL").value == "SIGTERM"
    assert bool(stage.health_command) == (image != "quantize")
    assert all(stage.last(name).value.startswith("[") for name in ("ENTRYPOINT", "CMD"))
    labels = stage.pairs("LABEL")
    keys = ("title", "description", "licenses", "version", "revision")
    assert all(labels[f"org.opencontainers.image.{key}"] for key in keys)
    assert not re.search(r"(?i)password|secret|token|key=", " ".join(stage.pairs("ENV")))


@pytest.mark.parametrize("image", IMAGES)
def test_scripts_and_commands_of_an_image_exist(image: str) -> None:
    """Those that RUN, HEALTHCHECK and ENTRYPOINT name; packages are copied from where they were installed."""
    stage = STAGES[image]
    for instruction in stage.instructions:
        if instruction.name == "RUN":
            for script in re.findall(r"/(?:src/deploy/docker|mnt)/([\w.-]+)", instruction.value):
                assert os.access(ROOT / "deploy" / "docker" / script, os.X_OK), script
        if (origin := instruction.flag("from")) and origin.endswith("-packages"):
            (prefix, _) = instruction.words
            assert any(f"--prefix {prefix} " in each.value for each in STAGES[origin].own)
    known = (["quantgate"], ["vllm", "serve"], ["python3", "-m", "tests.fakes.vllm"], ["python3", *VLLM_MODULE])
    assert stage.last("ENTRYPOINT").words in known


def test_base_images_are_arguments() -> None:
    """Each has a version, and can be replaced by one with a digest."""
    bases = {stage.image for stage in STAGES.values() if stage.parent is None}
    assert bases == {"python:3.12-slim-bookworm", "vllm/vllm-openai:v0.32.0"}
    written = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert all(base.startswith("${") or base in STAGES for base in written)
