"""The same in real time, over sockets: engines as processes, our gateway and the real vllm-router before them.

Every router has fresh engines and meets the same turns. Clients, engines and routers share the machine's cores; how
late clients and engines were for that is told beside the figures.
"""

import asyncio
import hashlib
import json
import secrets
import sys
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from config.capacity import FILE_NAME, Capacity, Measurement, write_capacity
from tests.benchmarks.overhead.contenders import HOST, PEERS, installed, url_of
from tests.benchmarks.overhead.figures import percentile
from tests.benchmarks.overhead.loads import PATH, Contender
from tests.benchmarks.overhead.processes import free_ports, running, until
from tests.benchmarks.routing.asking import Crowd
from tests.benchmarks.routing.engine_server import MODEL
from tests.benchmarks.routing.ours import Options
from tests.benchmarks.routing.profiles import Fleet
from tests.benchmarks.routing.runs import Run, Scenario

ALIAS = "model"
ROUTER = "vllm-router"
ROUTER_POLICIES = ("round_robin", "random", "power_of_two", "cache_aware")
_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all contenders share: engines of a model, where peers are, and how our gateway is set."""

    model: str
    fleet: Fleet
    measurements: Mapping[str, Measurement]
    options: Options
    peers_folder: Path


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late clients asked, and engines ended their steps: 99 of 100, in seconds."""

    clients: float
    engines: float


def contenders() -> list[str]:
    """Everybody's name."""
    return ["quantgate", *(f"{ROUTER} {policy}" for policy in ROUTER_POLICIES)]


def run_over_sockets(name: str, setting: Setting, scenario: Scenario) -> tuple[Run, Lateness]:
    """Run a contender through a scenario in real time; NotThere if it can't be had."""
    with TemporaryDirectory(prefix="routing-") as folder, _engines(setting, Path(folder)) as replicas:
        with _started(name, setting, replicas, Path(folder)) as contender:
            crowd = asyncio.run(_talked(scenario, contender, setting.options.named))
        pages = [_page(replica, "/metrics") for replica in replicas]
        late = json.loads(_page(replicas[0], "/late"))
    hits, queried, pushed_out = (
        sum(_counter(page, f"vllm:{metric}_total") for page in pages)
        for metric in ("prefix_cache_hits", "prefix_cache_queries", "num_preemptions")
    )
    run = Run(name, scenario, crowd.outcomes, (), int(pushed_out), hits / max(queried, 1))
    return run, Lateness(percentile(crowd.late_seconds, 99), late["99"])


async def _talked(scenario: Scenario, contender: Contender, named: bool) -> Crowd:
    crowd = Crowd(scenario, contender, named=named)
    await crowd.talk()
    return crowd


@contextmanager
def _engines(setting: Setting, folder: Path) -> Iterator[list[Contender]]:
    ports, log = free_ports(len(setting.fleet.members)), folder / "engines.log"
    counts = ",".join(f"{rung}={len(setting.fleet.only(rung).members)}" for rung in setting.fleet.rungs)
    argv = [sys.executable, "-m", "tests.benchmarks.routing.engine_server", setting.model, counts, *map(str, ports)]
    with running(argv, log):
        replicas = [Contender("engine", HOST, port, MODEL, "none") for port in ports]
        until(lambda: all(map(_is_up, replicas)), "the engines", log)
        yield replicas


@contextmanager
def _started(name: str, setting: Setting, replicas: Sequence[Contender], folder: Path) -> Iterator[Contender]:
    port, other_port = free_ports(2)
    log, key = folder / "router.log", secrets.token_urlsafe(32)
    if name == "quantgate":
        _write_configuration(setting, replicas, folder, (port, other_port), key)
        argv, model = [sys.executable, "-m", "quantgate", "gateway", str(folder / "gateway.yaml")], ALIAS
    else:
        program = installed(ROUTER, setting.peers_folder) / "bin" / PEERS[ROUTER].program
        where = ["--host", HOST, "--port", str(port), "--prometheus-port", str(other_port)]
        policy = ["--policy", name.removeprefix(f"{ROUTER} ")]
        argv, model = [str(program), *where, *policy, "--worker-urls", *map(url_of, replicas)], MODEL
    with running(argv, log) as pid:
        contender = Contender(name, HOST, port, model, key, pid)
        until(lambda: _answers(contender), name, log)
        yield contender


def _write_configuration(
    setting: Setting, replicas: Sequence[Contender], folder: Path, ports: tuple[int, int], key: str
) -> None:
    """Write our gateway's configuration, with a directory for each variant, where its `capacity.json` is."""
    hashed = hashlib.sha256(key.encode()).hexdigest()
    (folder / "keys.yaml").write_text(json.dumps({"benchmark": {"sha256": hashed}}), encoding="utf-8")
    for rung in setting.fleet.rungs:
        variant = folder / rung
        variant.mkdir()
        bits = _BITS.get(rung)
        config = {"quantization_config": {"bits": bits}} if bits else {"dtype": "bfloat16"}
        (variant / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if setting.options.measured:
            write_capacity(variant / FILE_NAME, Capacity(measurements=(setting.measurements[rung],)))
    spill = setting.options.spill
    settings = {
        "gateway": {
            "listen": f"{HOST}:{ports[0]}",
            "admin": f"{HOST}:{ports[1]}",
            "keys": "keys.yaml",
            "limits": {"queue_seconds": setting.options.patience_seconds},
        },
        "variants": {rung: {"path": rung, "precision": rung} for rung in setting.fleet.rungs},
        "replicas": [
            {"variant": member.precision, "url": url_of(replica)}
            for member, replica in zip(setting.fleet.members, replicas, strict=True)
        ],
        "aliases": {ALIAS: {"ladder": list(setting.fleet.rungs), "spill": spill.model_dump()}},
    }
    (folder / "gateway.yaml").write_text(json.dumps(settings), encoding="utf-8")


def _is_up(replica: Contender) -> bool:
    try:
        return bool(_page(replica, "/health"))
    except OSError:
        return False


def _answers(contender: Contender) -> bool:
    asked = {"model": contender.model, "messages": [{"role": "user", "content": "Hello"}], "seed": 1, "stream": True}
    headers = {"content-type": "application/json", "authorization": f"Bearer {contender.key}"}
    request = urllib.request.Request(url_of(contender) + PATH, json.dumps(asked).encode(), headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return b"[DONE]" in answer.read()
    except OSError:
        return False


def _page(replica: Contender, path: str) -> str:
    with urllib.request.urlopen(url_of(replica) + path, timeout=10) as answer:  # noqa: S310
        return str(answer.read(), "utf-8")


def _counter(page: str, name: str) -> float:
    line = next(line for line in page.splitlines() if line.startswith(f"{name}{{"))
    return float(line.rpartition(" ")[2])
