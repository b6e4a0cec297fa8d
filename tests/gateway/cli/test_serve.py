"""The verbs of this room, as a shell sees them."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import pytest
import yaml

from config.schema import LimitSettings
from quantgate import main
from serving.foreground import run_until_signal
from tests.config.sealed import seal
from tests.fakes.running import DEADLINE_SECONDS, ROOT, FakeReplica

on_the_loop = pytest.mark.asyncio(loop_scope="session")

FREE = "gateway: {listen: '127.0.0.1:0', admin: '127.0.0.1:0'}\n"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


async def start(*arguments: str | Path, home: Path | None = None) -> Process:
    """Start the command line, in a home of its own if one is given."""
    environment = {**os.environ, **({"QUANTGATE_HOME": str(home)} if home else {})}
    argv = [sys.executable, str(ROOT / "quantgate.py"), *map(str, arguments)]
    return await asyncio.create_subprocess_exec(
        *argv, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=PIPE, stderr=PIPE, env=environment
    )


async def run(*arguments: str | Path) -> Outcome:
    """Run a command to its end."""
    process = await start(*arguments)
    try:
        async with asyncio.timeout(DEADLINE_SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Outcome(process.returncode, out.decode(), err.decode())


def write(folder: Path, text: str) -> Path:
    """Put a configuration into a file."""
    path = folder / "quantgate.yaml"
    path.write_text(text)
    return path


@asynccontextmanager
async def running(config: Path) -> AsyncIterator[tuple[Process, str, str]]:
    """A gateway of its own, its two addresses read from what it says."""
    process = await start("gateway", config)
    try:
        assert process.stderr is not None
        async with asyncio.timeout(DEADLINE_SECONDS):
            while "listening" not in (line := (await process.stderr.readline()).decode()):
                assert line, "it ended before it listened"
        client, admin = re.findall(r"http://(\S+?)(?:,|$)", line.strip())
        yield process, client, admin
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


BAD = """\
gateway: {lissten: 1}
variants: {a: {precision: int4}}
aliases:
  x: {ladder: [b]}
replicas:
  - {variant: a, url: "ftp://x"}
"""


def told(path: Path, errors: str) -> None:
    """Check that the problems of the bad file are told."""
    problems = errors.splitlines()
    assert len(problems) == 2
    assert f"{path}:1:11: gateway.lissten: unknown key; did you mean 'listen'?" in problems[0]
    assert f"{path}:6:18: replicas.0.url: 'ftp://x' is not a valid replica URL" in problems[1]


@on_the_loop
async def test_a_gateway_with_a_bad_file(tmp_path: Path) -> None:
    """Every problem is told with its line, on stderr, and the exit code is 2."""
    path = write(tmp_path, BAD)
    outcome = await run("gateway", path)
    assert (outcome.code, outcome.out) == (2, "")
    told(path, outcome.err)


@pytest.mark.parametrize("verb", [["config", "check"], ["config", "show"], ["up"]])
def test_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: list[str]) -> None:
    """The other verbs that read a configuration say the same."""
    path = write(tmp_path, BAD)
    assert main([*verb, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    told(path, err)


@on_the_loop
async def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """One line, exit code 2."""
    outcome = await run("gateway", tmp_path / "none.yaml")
    assert (outcome.code, outcome.err) == (
        2,
        f"quantgate: {tmp_path}/none.yaml: can't be read: No such file or directory; check the path\n",
    )


@on_the_loop
@pytest.mark.parametrize("option", ["listen", "admin"])
async def test_a_port_in_use(tmp_path: Path, option: str) -> None:
    """One line says which option names the port; exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        both = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", option: address}
        outcome = await run("gateway", write(tmp_path, yaml.safe_dump({"gateway": both})))
    assert outcome.code == 2
    assert outcome.err == (
        f"quantgate: gateway.{option}: can't listen on {address}: Address already in use; "
        f"free the port or change gateway.{option}\n"
    )


@on_the_loop
async def test_keys_that_cannot_be_read(tmp_path: Path) -> None:
    """A keys file that is missing stops the gateway, with the way to make one."""
    outcome = await run("gateway", write(tmp_path, FREE.replace("}", ", keys: keys.yaml}")))
    assert outcome.code == 2
    assert f"quantgate keys create NAME --file {tmp_path}/keys.yaml" in outcome.err
    assert len(outcome.err.splitlines()) == 1


@on_the_loop
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_gateway_from_start_to_end(tmp_path: Path, fake: FakeReplica, number: signal.Signals) -> None:
    """It listens, answers, logs one line a request, and leaves with 0 when it is told to."""
    replica = f"replicas: [{{variant: a, url: '{fake.url}'}}]\n"
    names = "variants: {a: {precision: int4}}\naliases: {x: {ladder: [a]}}\n"
    async with running(write(tmp_path, FREE + names + replica)) as (process, client, admin):
        async with httpx.AsyncClient(timeout=DEADLINE_SECONDS, trust_env=False) as http:
            body = {"model": "x", "messages": [{"role": "user", "content": "hi"}]}
            answer = await http.post(f"http://{client}/v1/chat/completions", json=body, headers={"x-request-id": "r-1"})
            assert (answer.status_code, answer.json()["model"]) == (200, "x")
            assert (await http.get(f"http://{admin}/livez")).status_code == 200
        process.send_signal(number)
        async with asyncio.timeout(DEADLINE_SECONDS):
            out, err = await process.communicate()
    assert (process.returncode, out) == (0, b"")
    lines = [line for line in err.decode().splitlines() if line.startswith("ts=")]
    assert len(lines) == 1
    assert (
        "request_id=r-1 key=none endpoint=chat.completions alias=x variant=a precision=int4 replica=a-url-1 "
        "reason=preferred code=200 attempts=1 " in lines[0]
    )


@on_the_loop
async def test_limit_on_open_files(tmp_path: Path) -> None:
    """The soft limit is raised to the hard one at the start: each connection takes a file."""
    lowered = 'ulimit -Sn 256 && exec "$@"'
    argv = [sys.executable, str(ROOT / "quantgate.py"), "gateway", str(write(tmp_path, FREE))]
    process = await asyncio.create_subprocess_exec("sh", "-c", lowered, "sh", *argv, cwd=ROOT, stderr=PIPE)
    assert process.stderr is not None
    async with asyncio.timeout(DEADLINE_SECONDS):
        while b"listening" not in await process.stderr.readline():
            assert process.returncode is None
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    process.kill()
    await process.communicate()
    (soft, hard) = re.findall(r"Max open files +(\d+) +(\d+)", limits)[0]
    assert soft == hard != "256"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_until_a_signal(number: signal.Signals) -> None:
    """What was started is ended in order, and that is a success."""
    story: list[str] = []

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        story.append("started")
        os.kill(os.getpid(), number)
        yield
        story.append("ended")

    before = signal.getsignal(number)
    assert run_until_signal(start) == 0
    assert story == ["started", "ended"]
    assert signal.getsignal(number) == before


def test_a_signal_cancels_the_start() -> None:
    """What follows in a start does not happen, what was started ends, and that is a success."""
    story: list[str] = []

    @asynccontextmanager
    async def start() -> AsyncIterator[None]:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.Event().wait()
            story.append("started")
            yield
        finally:
            story.append("ended")

    assert run_until_signal(start) == 0
    assert story == ["ended"]


SECRETS = """\
gateway:
  state: "postgresql://quantgate:hunter2@db/quantgate"
variants: {a: {precision: int4}}
replicas:
  - {variant: a, url: "http://10.0.0.5:8000", api_key: hunter2}
aliases: {x: {ladder: [a]}}
"""


def test_configuration_is_checked_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`check` counts what it read; `show` prints every default and no secret; `schema` is JSON schema."""
    path = write(tmp_path, SECRETS)
    assert main(["config", "check", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}: 1 aliases, 1 variants, no problems\n", "")
    assert main(["config", "show", str(path)]) == 0
    shown, err = capsys.readouterr()
    assert err == ""
    assert "hunter2" not in shown
    values = yaml.safe_load(shown)
    assert values["gateway"]["limits"] == LimitSettings().model_dump()
    assert values["gateway"]["state"] == "postgresql://quantgate:**********@db/quantgate"
    assert values["replicas"][0]["api_key"] == "**********"
    assert values["replicas"][0]["url"] == "http://10.0.0.5:8000"
    assert main(["config", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == values
    assert main(["config", "schema", "--access-log"]) == 0
    assert "request_id" in json.loads(capsys.readouterr().out)["$defs"]["AccessLogLine"]["properties"]
    assert main(["config", "schema"]) == 0
    tables = {"gateway", "serving", "variants", "replicas", "aliases"}
    assert set(json.loads(capsys.readouterr().out)["properties"]) == tables


MANIFESTS = """\
gateway: {state: "sqlite:///shared.db"}
variants: {hi: {precision: bf16}, bad: {path: bad}}
aliases:
  lone: {ladder: [bad]}
  both: {ladder: [hi, bad]}
"""


def test_manifests_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant that failed, and an alias that nothing may answer by it, are told; the latter makes the exit code 3."""
    (tmp_path / "bad").mkdir()
    seal(tmp_path / "bad", 4, verdict="fail")
    path = write(tmp_path, MANIFESTS)
    assert main(["config", "check", str(path)]) == 3
    out, err = capsys.readouterr()
    why = "its verdict is fail (an alias can take it: admit_failed)"
    assert out == f"{path}: 2 aliases, 2 variants, 1 unservable, 1 warnings\n"
    assert err.splitlines() == [
        f"{path}:4:3: aliases.lone: no variant is good enough (bad: {why}); "
        "lower the floor, or add a better variant [unservable]",
        f"{path}:5:23: aliases.both.ladder.1: 'bad' is never chosen: {why}; remove it from the ladder [warning]",
    ]
    write(tmp_path, MANIFESTS.replace("[bad]", "[hi]").replace("[hi, bad]", "[hi]"))
    assert main(["config", "check", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}: 2 aliases, 2 variants, no problems\n"
    (tmp_path / "bad" / "manifest.json").write_text("{")
    assert main(["config", "check", str(path)]) == 2
    assert "bad/manifest.json: top level: Invalid JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["gatway"], "quantgate: unknown command 'gatway'; did you mean 'gateway'?\n"),
        (["zzz"], "quantgate: unknown command 'zzz'; `quantgate --help` lists the commands\n"),
        (["config"], "the following arguments are required"),
        (["config", "chekc"], "invalid choice: 'chekc'"),
        (["keys", "create"], "the following arguments are required: NAME"),
        (["gateway", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["up", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_words_that_nobody_knows(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """A slip is told on stderr, with the nearest verb, and the exit code is 2."""
    try:
        code = main(arguments)
    except SystemExit as exit_of_argparse:
        code = int(str(exit_of_argparse.code))
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err


@on_the_loop
async def test_help_and_version() -> None:
    """`--help` lists all verbs, `--version` is the installed one's, and nothing at all is a usage error."""
    version, helped, nothing = await asyncio.gather(run("--version"), run("--help"), run())
    assert (version.code, version.out) == (0, metadata.version("quantgate") + "\n")
    assert (helped.code, nothing.code) == (0, 2)
    for verb in ("gateway", "up", "config", "keys", "quantize", "demo"):
        assert f"\n  {verb} " in helped.out
