"""The commands that reach a running process: status, reload, restart, stop; all as processes."""

import asyncio
import json
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fakes.running import ROOT, eventually
from tests.serving.supervised import model_directory, noted_sessions

pytestmark = pytest.mark.asyncio(loop_scope="session")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, slots=True)
class Served:
    """A process that runs fake replicas, its home and its configuration."""

    process: Process
    home: Path
    config: Path

    async def command(self, *arguments: str | Path) -> Outcome:
        """Run a command of quantgate in the process's home."""
        return await command(self.home, *arguments)

    async def replicas(self) -> dict[str, str]:
        """The replicas and their states, as `quantgate status` has them."""
        outcome = await self.command("status", "--json")
        return {each["id"]: each["state"] for status in json.loads(outcome.out) for each in status["replicas"]}

    def log(self) -> str:
        """What the process has written to stderr."""
        return (self.home / "stderr").read_text()


async def command(home: Path, *arguments: str | Path) -> Outcome:
    """Run a command of quantgate in a home to its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ROOT / "quantgate.py"), *map(str, arguments)),
        cwd=ROOT,
        env={**os.environ, "QUANTGATE_HOME": str(home)},
        stdout=PIPE,
        stderr=PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


def configuration(folder: Path, **args: list[str]) -> dict[str, Any]:
    """One replica of each variant, with its arguments."""
    variants = {name: {"path": str(model_directory(folder / name))} for name in args}
    return {
        "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "state": f"sqlite:///{folder}/state.db"},
        "variants": variants,
        "replicas": [{"variant": name, "args": given, "drain_seconds": 5} for name, given in args.items()],
        "aliases": {"smol": {"ladder": list(args)}},
    }


@asynccontextmanager
async def serving(folder: Path, verb: str = "serve", **args: list[str]) -> AsyncIterator[Served]:
    """Fake replicas of some variants, run by a process of its own."""
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump(configuration(folder, **args)))
    home = folder / "home"
    home.mkdir()
    with (home / "stderr").open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.fakes.serve", str(config), str(home), verb), cwd=ROOT, stderr=stderr
        )
    served = Served(process, home, config)
    try:
        await eventually(lambda: list((home / "control").glob("*.sock")))
        yield served
    finally:
        if process.returncode is None:
            process.terminate()
        async with asyncio.timeout(60):
            await process.wait()


FAILING = ["--fake-exit-while-starting", "1", "--fake-last-words", "ValueError: no such kernel"]


@pytest.mark.parametrize("verb", ["serve", "up"])
async def test_life_by_commands(tmp_path: Path, verb: str) -> None:
    """A process is shown, its ready replica is restarted after a drain, it is stopped, and then nothing runs."""
    async with serving(tmp_path, verb, own=[]) as served:

        async def ready() -> bool:
            return await served.replicas() == {"own-1": "ready"}

        await eventually(ready, 60)
        shown = await served.command("status", served.config)
        assert shown.code == 0
        first, *_, last = shown.out.splitlines()
        assert first.startswith(f"quantgate {verb} (process {served.process.pid}), {served.config}, for ")
        assert last == "  replicas: 1 ready"
        before = noted_sessions(served.home)
        restarted = await served.command("restart", "own-1")
        assert (restarted.code, restarted.out) == (0, "own-1: finishes its requests (at most 5 s), then starts again\n")
        await eventually(lambda: noted_sessions(served.home) not in (before, set()))
        await eventually(ready, 60)
        unknown = await served.command("restart", "own-2")
        assert unknown.code == 2
        assert "there is no replica 'own-2'; did you mean 'own-1'? known: own-1" in unknown.err
        if verb == "up":
            refused = await served.command("gateway", served.config, "--takeover")
            assert refused.code == 2
            assert f"process {served.process.pid} is quantgate up, which owns its replicas" in refused.err
        stopped = await served.command("stop", "--config", served.config)
        assert (stopped.code, stopped.out) == (0, f"quantgate {verb} (process {served.process.pid}): stopped\n")
        assert await served.process.wait() == 0
        gone = await served.command("status")
        assert gone.code == 7
        assert f"no process runs in {served.home}" in gone.err


async def test_reload_starts_what_waits(tmp_path: Path) -> None:
    """A replica that waits is shown with its next start and cause; a reload and a restart start it at once."""
    async with serving(tmp_path, bad=FAILING) as served:

        def failures() -> int:
            return served.log().count("no such kernel (log")

        # From the fourth failure on the pause, 8 s and more, is longer than what the commands below take.
        await eventually(lambda: failures() >= 4, 60)
        waiting = await served.command("status")
        assert waiting.code == 1
        assert "bad-1: failed for " in waiting.out
        assert ": next start at " in waiting.out
        assert "ValueError: no such kernel" in waiting.out
        reloaded = await served.command("reload", served.config)
        assert (reloaded.code, reloaded.err) == (0, "")
        await eventually(lambda: "the configuration is in force" in served.log())
        await eventually(lambda: failures() >= 5)
        await eventually(lambda: served.log().count("next start in 1 s") == 2, 60)
        forced = await served.command("reload", "--force")
        assert forced.code == 0
        await eventually(lambda: served.log().count("the configuration is in force") == 2)
        other = await served.command("status", tmp_path / "other.yaml")
        assert (other.code, other.out) == (7, "")


@pytest.mark.parametrize("verb", ["serve", "up"])
async def test_the_outcome_of_a_reload(tmp_path: Path, verb: str) -> None:
    """Invalid files are refused, also with --force; one that leaves nothing is applied with --force only."""
    async with serving(tmp_path, verb, own=[]) as served:

        async def ready() -> bool:
            return await served.replicas() == {"own-1": "ready"}

        await eventually(ready, 60)
        applied = await served.command("reload")
        named = f"quantgate {verb} (process {served.process.pid})"
        assert (applied.code, applied.out) == (0, f"{named}: {served.config} is in force\n")
        (told,) = json.loads((await served.command("reload", "--json")).out)
        assert (told["outcome"], told["pid"], told["config"]) == ("applied", served.process.pid, str(served.config))
        settings = served.config.read_text()
        served.config.write_text("replicas: 5\n")
        invalid = await served.command("reload", "--force")
        assert (invalid.code, invalid.out) == (1, "")
        assert f"{named}: the configuration is refused, the one before stays in force: {served.config}" in invalid.err
        document = {**yaml.safe_load(settings), "replicas": []}
        document["aliases"] = document["aliases"] if verb == "serve" else {}
        served.config.write_text(yaml.safe_dump(document))
        refused = await served.command("reload")
        assert refused.code == 1
        assert "(quantgate reload --force)" in refused.err
        forced = await served.command("reload", "--force")
        assert (forced.code, forced.err) == (0, "")
        assert forced.out == f"{named}: {served.config} is in force\n"
        await eventually(lambda: served.log().count("the configuration is in force") == 3)


async def test_progress_is_logged(tmp_path: Path) -> None:
    """The log names what loads, how long that usually takes, who is ready, and what SIGTERM does."""
    async with serving(tmp_path, hi=[], lo=[]) as served:
        await eventually(lambda: "lo-1: ready at" in served.log(), 60)
        log = served.log()
        assert "starting 2 replicas, 1 at a time; SIGTERM or Ctrl-C stops them after their running requests" in log
        assert "lo-1: starting, waiting for its turn to start" in log
        assert re.search(r"hi-1: starting, loading, process \d+, its first start here", log)
        assert "(1 of 2 are ready)" in log
        assert "(2 of 2 are ready)" in log
        before = noted_sessions(served.home)
        await served.command("restart", "hi-1")
        await eventually(lambda: len(noted_sessions(served.home) - before) == 1)
        loading = r"hi-1: starting, loading, process \d+, usually ready after \d+s"
        await eventually(lambda: re.search(loading, served.log()))
        os.kill(served.process.pid, signal.SIGTERM)
        assert await served.process.wait() == 0
        assert "SIGTERM: stopping" in served.log()
        assert "lo-1: draining, finishes its requests, for at most 5 s" in served.log()
        assert served.log().endswith("stopped\n")


async def test_sockets_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """After SIGKILL the process is not shown any more."""
    async with serving(tmp_path, own=[]) as served:
        served.process.kill()
        await served.process.wait()
        assert (await served.command("status")).code == 7
        assert list((served.home / "control").iterdir()) == []


async def test_a_process_that_hangs_is_reported(tmp_path: Path) -> None:
    """`stop --timeout` ends with code 5 while the process still runs."""
    async with serving(tmp_path, own=["--fake-start-delay", "60", "--fake-ignore-sigterm"]) as served:
        stopping = await served.command("stop", "--timeout", "0")
        assert stopping.code == 5
        assert "still runs after 0 s" in stopping.err
