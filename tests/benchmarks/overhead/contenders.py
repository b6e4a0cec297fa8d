"""Who is measured: the upstream itself, our gateway with everything on, and others from PyPI in environments of theirs.

Every one of them routes over the same eight replicas. A contender that can't be had is told by NotThere.
"""

import hashlib
import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.overhead.loads import PATH, PLAIN, Contender
from tests.benchmarks.overhead.processes import ROOT, NotThere, free_ports, running, until
from tests.benchmarks.overhead.upstream import HOSTS, MODEL

HOST = "127.0.0.1"
ALIAS = "tide"


@dataclass(frozen=True, slots=True)
class Peer:
    """Another gateway: what is installed, and its command line, after the program's own path.

    `argv` gets the urls of the replicas, a port, another one for its metrics, and a file for its configuration.
    """

    requirement: str
    program: str
    model: str
    argv: Callable[[Sequence[str], int, int, Path], list[str]]


def _rust_router(*verb: str) -> Callable[[Sequence[str], int, int, Path], list[str]]:
    def argv(urls: Sequence[str], port: int, metrics_port: int, _: Path) -> list[str]:
        where = ["--host", HOST, "--port", str(port), "--prometheus-port", str(metrics_port)]
        return [*verb, *where, "--policy", "round_robin", "--worker-urls", *urls]

    return argv


def _litellm(urls: Sequence[str], port: int, _: int, file: Path) -> list[str]:
    replicas = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in urls
    ]
    file.write_text(json.dumps({"model_list": replicas}), encoding="utf-8")
    return ["--config", str(file), "--host", HOST, "--port", str(port), "--num_workers", "1"]


PEERS = {
    "vllm-router": Peer("vllm-router==0.1.17", "vllm-router", MODEL, _rust_router()),
    "litellm": Peer("litellm[proxy]==1.106.0", "litellm", MODEL, _litellm),
    "smg": Peer("smg==1.13.0", "smg", MODEL, _rust_router("launch")),
}
# What LiteLLM would otherwise fetch at its start, and send home.
_QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}


def installed(name: str, folder: Path) -> Path:
    """The environment of a peer, made if it isn't there."""
    peer, home = PEERS[name], folder / name
    if not (home / "bin" / peer.program).exists():
        print(f"installing {peer.requirement} into {home}", file=sys.stderr)
        for argv in (
            [sys.executable, "-m", "venv", str(home)],
            [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", peer.requirement],
        ):
            done = subprocess.run(argv, check=False, capture_output=True, text=True)
            if done.returncode:
                raise NotThere(f"{peer.requirement} can't be installed: {done.stderr.strip()[-300:]}")
    return home


@contextmanager
def upstream(folder: Path) -> Iterator[list[Contender]]:
    """Eight replicas in one process; yields each address."""
    (port,) = free_ports(1)
    log = folder / "upstream.log"
    with running([sys.executable, "-m", "tests.benchmarks.overhead.upstream", str(port)], log) as pid:
        replicas = [Contender("direct", host, port, MODEL, "none") for host in HOSTS]
        until(lambda: answers(replicas[0]), "the upstream", log)
        assert pid
        yield replicas


@contextmanager
def peer(name: str, replicas: Sequence[Contender], folder: Path, peers_folder: Path) -> Iterator[Contender]:
    """Run one of PEERS."""
    program = installed(name, peers_folder) / "bin" / PEERS[name].program
    port, metrics_port = free_ports(2)
    log = folder / f"{name}.log"
    urls = [url_of(replica) for replica in replicas]
    argv = PEERS[name].argv(urls, port, metrics_port, folder / f"{name}.yaml")
    key = f"sk-{secrets.token_urlsafe(32)}"
    # LiteLLM doesn't start without a key; the Rust routers look at none.
    with running([str(program), *argv], log, {**_QUIET, "LITELLM_MASTER_KEY": key}) as pid:
        contender = Contender(name, HOST, port, PEERS[name].model, key, pid)
        until(lambda: answers(contender), name, log)
        yield contender


@dataclass(frozen=True, slots=True)
class Ours:
    """Our gateway's files and ports; made once, started as often as is asked."""

    folder: Path
    port: int
    admin_port: int
    key: str
    checkout: Path = ROOT
    name: str = "quantgate"

    @property
    def log(self) -> Path:
        """Where its access log goes."""
        return self.folder / "quantgate.log"

    def argv(self, workers: int) -> list[str]:
        """Write its command line."""
        # A checkout to compare with may not know --force.
        count = ["--workers", str(workers), "--force"] if workers > 1 else []
        return [sys.executable, "-m", "quantgate", "gateway", *count, str(self.folder / "gateway.yaml")]


def ours(replicas: Sequence[Contender], folder: Path, checkout: Path = ROOT, name: str = "quantgate") -> Ours:
    """Write a configuration with keys, a ladder of two variants, access log and metrics; `checkout` is run."""
    folder.mkdir(exist_ok=True)
    key = secrets.token_urlsafe(32)
    port, admin_port, *_ = free_ports(2)
    (folder / "keys.yaml").write_text(
        json.dumps({"benchmark": {"sha256": hashlib.sha256(key.encode()).hexdigest()}}), encoding="utf-8"
    )
    quality = {"kl_mean": 0.0, "top1_agreement": 1.0, "perplexity_ratio": 1.0}
    lower = {"kl_mean": 0.05, "top1_agreement": 0.92, "perplexity_ratio": 1.05}
    half = len(replicas) // 2
    settings = {
        "gateway": {"listen": f"{HOST}:{port}", "admin": f"{HOST}:{admin_port}", "keys": "keys.yaml"},
        "variants": {
            "full": {"precision": "bf16", "quality": quality},
            "small": {"precision": "int4", "quality": lower},
        },
        "replicas": [
            {"variant": "full" if number < half else "small", "url": url_of(replica)}
            for number, replica in enumerate(replicas)
        ],
        "aliases": {ALIAS: {"ladder": ["full", "small"]}},
    }
    (folder / "gateway.yaml").write_text(json.dumps(settings), encoding="utf-8")
    return Ours(folder, port, admin_port, key, checkout, name)


@contextmanager
def quantgate(made: Ours, workers: int = 1) -> Iterator[Contender]:
    """Run our gateway; yields it once all of its workers answer."""
    environment = {"PYTHONPATH": str(made.checkout)}
    with running(made.argv(workers), made.log, environment, made.checkout) as pid:
        contender = Contender(made.name, HOST, made.port, ALIAS, made.key, pid)
        for number in range(workers):
            until(lambda port=made.admin_port + number: alive(port), "quantgate", made.log)  # type: ignore[misc]
        until(lambda: answers(contender), "quantgate", made.log)
        yield contender


def url_of(contender: Contender) -> str:
    """Its address."""
    return f"http://{contender.host}:{contender.port}"


def alive(admin_port: int) -> bool:
    """Tell whether our gateway says that it lives."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{admin_port}/livez", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def answers(contender: Contender) -> bool:
    """Tell whether a contender passes an answer on."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {contender.key}"}
    asked = urllib.request.Request(url_of(contender) + PATH, PLAIN.body(contender.model), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
            return b"word word" in answer.read()
    except (OSError, urllib.error.HTTPError):
        return False
