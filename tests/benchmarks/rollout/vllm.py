"""Rollouts with real vLLM: an identical variant, a damaged one, and one with a damage that the smoke test passes.

`python -m tests.benchmarks.rollout.vllm --variant DIR [--work DIR]` takes a sealed int4 variant (GPTQ), makes copies of
it, starts `quantgate up` with an alias of the first one under a steady load of conversations, and rolls the others out:

    v2  the same weights under another id: promoted, the old replica ends
    v3  the scales of one layer doubled, behind the quality that was measured of v1: its golden prompt stops it
    v3-unverified  the same without a golden prompt: the smoke test stops it; then forced, and undone
    v4  the lowest bit of some weights flipped, without a golden prompt: neither speed nor errors show it, shadowing
        measures it
"""

import argparse
import asyncio
import json
import shutil
import signal
import socket
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.benchmarks.machine import machine_line
from tests.benchmarks.rollout.damage import copy_variant, doubled_scales, flipped_codes
from tests.benchmarks.rollout.load import HEADINGS, MAX_TOKENS, Load, Row
from tests.end_to_end.running_demo import ROOT, environment
from tests.fakes.running import HOST, eventually

ALIAS = "smol"
START_SECONDS, ROLLOUT_SECONDS, STOP_SECONDS = 300.0, 1800.0, 90.0
GOLDEN_FILE = "evaluation.json"
# Found by trying: the mean difference is about 0.07 nats a token, and this model still passes the smoke test. One
# module of one layer makes 0.03 at most, which hundreds of answers tell from the budget of 0.02.
FLIPPED_LAYERS, FLIPPED_MODULE = (5, 7, 17, 22, 25, 27), "mlp.gate_proj"


@dataclass(slots=True)
class Bench:
    """A configuration under test, its `up`, and the command line beside it."""

    work: Path
    port: int
    program: Sequence[str]
    patience_seconds: float
    rows: list[Row] = field(default_factory=list)

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.work / "quantgate.yaml"

    @property
    def home(self) -> Path:
        """The home of `up`."""
        return self.work / "home"

    async def command(self, *words: str) -> tuple[int, str]:
        """Run `quantgate rollout WORDS`; its exit code and output."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "quantgate", "rollout", *words, "--config", str(self.config)),
            cwd=ROOT,
            env=environment(self.home),
            stdout=PIPE,
            stderr=PIPE,
        )
        out, err = await process.communicate()
        with (self.work / "commands.log").open("ab") as log:
            log.write(f"{time.strftime('%H:%M:%S')} rollout {' '.join(words)}\n".encode() + out + err)
        return process.returncode or 0, (out or err).decode().strip()

    async def status(self) -> dict[str, Any]:
        """The latest rollout, as `rollout status --json` tells; without a phase while there is none."""
        code, told = await self.command("status", ALIAS, "--json")
        found: dict[str, Any] = {"phase": ""} if code == 1 else json.loads(told)
        return found

    async def rollout(
        self, name: str, load: Load, words: Sequence[str], steering: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Carry a rollout out under load, and add its row; `steering` is what the operator does meanwhile."""
        async with load.running():
            await eventually(lambda: len(load.since(0.0)) >= load.users)
            began = time.monotonic()
            async with asyncio.timeout(ROLLOUT_SECONDS):
                waiting = asyncio.create_task(self.command(*words, "--wait"))
                if steering is not None:
                    await steering()
                code, _ = await waiting
            seconds = time.monotonic() - began
        status, talks = await self.status(), load.since(began)
        why = status["failure"] or "promoted"
        requests = sum(talk.requests for talk in talks)
        counts = (len(talks), load.saw(status["new"], began), requests / seconds, len(load.failed), load.moved)
        self.rows.append(Row(name, f"{status['phase']}: {why}", code, seconds, *counts))
        print(f"| {' | '.join(self.rows[-1].cells())} |", *load.failed[:5], sep="\n", flush=True)

    async def promote_after_patience(self) -> None:
        """Promote in the last step with two arms if the gates have not decided in time, and say what they need."""
        deadline = None
        while (status := await self.status())["phase"] not in ("draining", "keeping", "done", "rolled_back", "failed"):
            if status["phase"] == "canary" and status["step"] == len(status["steps"]) - 2:
                deadline = deadline or time.monotonic() + self.patience_seconds
                if time.monotonic() > deadline:
                    verdicts = {gate["name"]: gate["verdict"] for gate in status["gates"]}
                    print(f"after {self.patience_seconds:.0f} s: {verdicts}; {status['waits_for']}", flush=True)
                    await self.command("promote", ALIAS, "--reason", "the gates need more traffic")
                    return
            # Each look is a process of a second on the cores of the engines.
            await asyncio.sleep(15)

    async def force_and_undo(self) -> None:
        """Promote without gates as soon as that is possible, then take it back."""

        async def promoted() -> bool:
            return not (await self.command("promote", ALIAS, "--full", "--reason", "a forced mistake"))[0]

        async def kept() -> bool:
            return str((await self.status())["phase"]) == "keeping"

        await eventually(promoted, ROLLOUT_SECONDS)
        await eventually(kept, ROLLOUT_SECONDS)
        began = time.monotonic()
        code, told = await self.command("undo", ALIAS)
        print(f"undo: exit code {code}, {time.monotonic() - began:.1f} s: {told}", flush=True)

    def processes(self, variant: str) -> list[int]:
        """The processes that serve a variant, by their command lines."""
        mark = f"{self.work / variant}\0".encode()
        found = []
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if mark in line.read_bytes():
                    found.append(int(line.parent.name))
            except OSError:  # it has ended meanwhile
                continue
        return found


def prepare(work: Path, variant: Path, layer: int, patience_seconds: float, *, fake: bool) -> Bench:
    """Make the variants and the configuration anew; the home stays, with the byte-code that vLLM starts faster with."""
    damaged = doubled_scales(layer)
    changes = {
        "v1": None,
        "v2": None,
        "v3": damaged,
        "v3-unverified": damaged,
        "v4": flipped_codes(FLIPPED_LAYERS, FLIPPED_MODULE),
    }
    # A fake does not answer the golden prompt like the model.
    unverified = set(changes) if fake else {"v3-unverified", "v4"}
    for name in changes:
        shutil.rmtree(work / name, ignore_errors=True)
    for old in work.glob("state.db*"):
        old.unlink()
    for name, change in changes.items():
        copy_variant(variant, work / name, change, [GOLDEN_FILE] if name in unverified else [])
    with socket.socket() as found:
        found.bind((HOST, 0))
        port = found.getsockname()[1]
    bench = Bench(work, port, (), patience_seconds)
    bench.home.mkdir(exist_ok=True)
    replica = {"variant": "v1", "cores": "0", "max_model_len": 512, "kv_cache_bytes": "128MiB", "drain_seconds": 10}
    document = {
        "gateway": {"listen": f"{HOST}:{port}", "admin": f"{HOST}:0", "state": f"sqlite:///{work}/state.db"},
        "variants": {name: {"path": str(work / name)} for name in changes},
        "replicas": [replica | {"args": [] if fake else ["--enforce-eager"]}],
        # The variant may be a poor one: what counts here is how it compares with its copies.
        "aliases": {ALIAS: {"ladder": ["v1"], "admit_failed": True}},
    }
    bench.config.write_text(yaml.safe_dump(document))
    # The default effects take thousands of conversations, which take hours at the rates of a small machine.
    effects = {"events": 0.2, "times": 1.0, "lengths": 1.0}
    plan = {"min_conversations": 5, "drain_seconds": 10, "keep": 15, "shadow_requests": 60, "effects": effects}
    (work / "plan.yaml").write_text(yaml.safe_dump(plan))
    return bench


async def ready(bench: Bench, up: Process) -> None:
    """Wait until the alias answers."""
    body = {"model": ALIAS, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    async with asyncio.timeout(START_SECONDS), httpx.AsyncClient(trust_env=False, timeout=30) as client:
        while up.returncode is None:
            try:
                if (await client.post(f"http://{HOST}:{bench.port}/v1/chat/completions", json=body)).is_success:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.5)
    raise RuntimeError(f"`up` has ended; see {bench.work}/up.log")


async def carry_out(bench: Bench, users: int, wanted: Sequence[str]) -> None:
    """Carry the rollouts out, one after the other."""
    url, plan = f"http://{HOST}:{bench.port}", ("--file", str(bench.work / "plan.yaml"))
    steps = ("--steps", "5,25,100", "--step-seconds", "20")
    words: Sequence[str]
    if "v2" in wanted:
        words = ("start", ALIAS, "v2", "--replaces", "v1", *steps, *plan)
        await bench.rollout("v1 -> v2", Load(url, ALIAS, users, 0.05), words, bench.promote_after_patience)
        if not bench.rows[-1].code:
            await eventually(lambda: not bench.processes("v1"), STOP_SECONDS)
            print("no process of v1 is left", flush=True)
    if "v3" in wanted:
        await bench.rollout("v3", Load(url, ALIAS, users, 0.05), ("start", ALIAS, "v3", *steps, *plan))
    if "v3-unverified" in wanted:
        words = ("start", ALIAS, "v3-unverified", *steps, *plan)
        await bench.rollout("v3-unverified", Load(url, ALIAS, users, 0.05), words)
        code, told = await bench.command("start", ALIAS, "v3-unverified")
        print(f"start again: exit code {code}: {told}", flush=True)
        await bench.rollout("the same, forced", Load(url, ALIAS, users, 0.05), ("retry", ALIAS), bench.force_and_undo)
    if "v4" in wanted:
        # One user who pauses: shadowing waits for idle engines.
        words = ("start", ALIAS, "v4", *steps, *plan, "--shadow", "1")
        await bench.rollout("v4", Load(url, ALIAS, 1, 0.7), words)


async def run(bench: Bench, users: int, wanted: Sequence[str]) -> None:
    """Start `up`, carry the rollouts out, and end it."""
    with (bench.work / "up.log").open("wb") as log:
        up = await asyncio.create_subprocess_exec(
            *(sys.executable, *bench.program), cwd=ROOT, env=environment(bench.home), stdout=log, stderr=log
        )
    try:
        await ready(bench, up)
        await carry_out(bench, users, wanted)
    finally:
        if up.returncode is None:
            up.send_signal(signal.SIGTERM)
        await asyncio.wait_for(up.wait(), STOP_SECONDS)


def main(arguments: list[str]) -> int:
    """Run it and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rollout.vllm", description=__doc__)
    parser.add_argument("--variant", type=Path, required=True, help="a sealed int4 variant in GPTQ's format")
    parser.add_argument("--work", type=Path, default=Path("rollout-vllm"), help="for all files (default: %(default)s)")
    parser.add_argument("--users", type=int, default=4, help="conversations at a time (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=15, help="the damaged layer (default: %(default)s)")
    parser.add_argument(
        "--rollouts", default="v2,v3,v3-unverified,v4", help="which of them, in this order (default: %(default)s)"
    )
    # The last step with two arms waits for every gate, which takes hours at the rates of a small machine.
    patience = "seconds of the last step with two arms until it is promoted by hand (default: %(default)s)"
    parser.add_argument("--patience", type=float, default=150, help=patience)
    parser.add_argument("--fake", action="store_true", help="with the fake in vLLM's place, to try this program")
    chosen = parser.parse_args(arguments)
    work = chosen.work.resolve()
    bench = prepare(work, chosen.variant.resolve(), chosen.layer, chosen.patience, fake=chosen.fake)
    fake = ("-m", "tests.fakes.serve", str(bench.config), str(bench.home), "up")
    bench.program = fake if chosen.fake else ("-m", "quantgate", "up", str(bench.config))
    try:
        asyncio.run(run(bench, chosen.users, chosen.rollouts.split(",")))
    finally:
        print(f"\n{machine_line()}; {chosen.users} users, answers of at most {MAX_TOKENS} tokens\n")
        print(f"| {' | '.join(HEADINGS)} |", f"|{' --- |' * len(HEADINGS)}", sep="\n")
        print(*(f"| {' | '.join(row.cells())} |" for row in bench.rows), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
