"""`quantgate route`, beside a gateway that runs and without one."""

import asyncio
import json
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import yaml

from config.schema import Floor
from gateway.cli.admin_client import AdminClient
from gateway.keys import StoredKey, keys_in_force
from quantgate import main
from serving.replica import State
from tests.fakes.running import FakeReplica
from tests.gateway.fleet import HELLO, STREAM, Fleet, deployment, running_gateway

pytestmark = pytest.mark.asyncio(loop_scope="session")

PICKY = {"picky": StoredKey(sha256=(sha256(b"qg-picky").hexdigest(),), floor=Floor(kl_mean=0.02), aliases=("smol",))}
GATEWAY = {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "admin_key": "operators"}
KEY = {"authorization": "Bearer qg-picky"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def keyed() -> AsyncIterator[Fleet]:
    """A gateway with keys for clients, and one for operators."""
    async with running_gateway(deployment({"gateway": GATEWAY}, keys_in_force(PICKY))) as fleet:
        yield fleet


class Shell:
    """The verb, as a shell calls it: outcomes are (exit code, stdout, stderr)."""

    def __init__(self, folder: Path, fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.admin = fleet.served.addresses.admin
        self.capsys = capsys
        self.config(admin_key="operators")

    def config(self, **gateway: Any) -> None:
        """Write a configuration; it says where the gateway is."""
        told = {"gateway": {"admin": self.admin, **gateway}}
        (self.folder / "quantgate.yaml").write_text(yaml.safe_dump(told))

    async def route(self, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
        """Run it in a thread, for the gateway is on this loop."""
        where = [] if offline else ["--config", str(self.folder / "quantgate.yaml")]

        def run() -> int:
            try:
                return main(["route", *arguments, *where])
            except SystemExit as ended:
                return int(str(ended.code))

        code = await asyncio.to_thread(run)
        out, err = self.capsys.readouterr()
        return code, out, err

    async def told(self, *arguments: str, offline: bool = False) -> dict[str, Any]:
        """What it says as JSON."""
        _, out, err = await self.route("explain", *arguments, "--json", offline=offline)
        assert err == ""
        told: dict[str, Any] = json.loads(out)
        return told


@pytest.fixture
def shell(tmp_path: Path, keyed: Fleet, capsys: pytest.CaptureFixture[str]) -> Shell:
    """In a folder of its own."""
    return Shell(tmp_path, keyed, capsys)


async def test_a_ranking_for_people(shell: Shell, keyed: Fleet) -> None:
    """Who answers and why, each rung, each replica, and who may not or isn't there; nothing is cut off."""
    with (
        keyed.replicas(("hi", "http://x"), ("mid", "http://y")),
        keyed.replicas(("lo", "http://z"), state=State.FAILED),
    ):
        code, out, err = await shell.route("explain", "smol", "--header", "X-Quantgate-Floor: top1_agreement=0.95")
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert out.splitlines()[0].rstrip() == "smol: hi-0 (hi, bf16), preferred"
    for row in (
        "hi bf16 - closed - answers",
        "mid int8 - closed - could answer",
        "1 hi-0 hi 0 - - - - - - - nothing recent is known of its load",
        "2 mid-1 mid 0 - - - - - - - hi is a better rung, and answers; nothing recent is known of its load",
        "lo int4 top1_agreement 0.92 misses the floor 0.95",
        "lo-0 lo failed",
    ):
        assert row.split() in lines


async def test_a_key_is_named(shell: Shell, keyed: Fleet) -> None:
    """Its floor counts as when its holder asks; a name that nobody has is told."""
    with keyed.replicas(("lo", "http://x"), ("mid", "http://y")):
        told = await shell.told("smol", "--key", "picky")
        assert told["chosen"] == {"replica": "mid-1", "variant": "mid", "precision": "int8", "reason": "fallback"}
        assert [each["variant"] for each in told["refused"]] == ["lo"]
        assert (await shell.route("explain", "lo", "--key", "picky"))[0] == 2
        code, out, err = await shell.route("explain", "smol", "--key", "bob")
    assert (code, out, err) == (2, "", "quantgate route: no key is named 'bob'; there are: picky\n")


async def test_a_request_that_was_made(shell: Shell, keyed: Fleet, fake: FakeReplica) -> None:
    """The header of its answer and the explanation agree, also when the replicas have gone; it can be kept."""
    for number, body in enumerate((HELLO, STREAM, {**HELLO, "max_tokens": 7})):
        with keyed.replicas(("mid", fake.url), ("lo", fake.url)):
            headers = {**KEY, "x-request-id": f"why-{number}", "x-quantgate-precision": "int8,int4"}
            answer = await keyed.ask(body, headers)
        assert answer.status_code == 200
        told = await shell.told("--request", f"why-{number}", "--save", str(shell.folder / "kept.json"))
        assert told["chosen"]["replica"] == answer.headers["x-quantgate-replica"]
        assert told["chosen"]["reason"] == answer.headers["x-quantgate-reason"]
        assert told["answer_tokens"] == body.get("max_tokens")
        assert told["prompt_tokens"] > 0
        assert {each["variant"]: each["why"] for each in told["refused"]} == {
            "hi": "precision bf16 was not asked for",
            "lo": "kl_mean 0.05 misses the floor 0.02",
        }
        assert await shell.told("smol", "--state", str(shell.folder / "kept.json"), offline=True) == told
    code, _, err = await shell.route("explain", "lo", "--state", str(shell.folder / "kept.json"), offline=True)
    assert (code, err) == (2, "quantgate route: the request why-2 asked for 'smol', not for 'lo'\n")
    code, _, err = await shell.route("explain", "--request", "unheard-of")
    assert code == 1
    assert err.endswith("answers 404: nothing is kept of 'unheard-of'; the latest 1000 requests here are\n")


async def test_another_version_decided_otherwise(shell: Shell, keyed: Fleet, fake: FakeReplica) -> None:
    """What is explained is what this version decides; if that is not what happened, it is said."""
    kept = shell.folder / "kept.json"
    with keyed.replicas(("mid", fake.url)):
        await keyed.ask(HELLO, {**KEY, "x-request-id": "old"})
    assert (await shell.route("explain", "--request", "old", "--save", str(kept)))[0] == 0
    kept.write_text(kept.read_text().replace('"chosen":"mid-0"', '"chosen":"mid-7"'))
    code, out, err = await shell.route("explain", "--state", str(kept), offline=True)
    assert (code, err) == (0, "quantgate route: it was mid-7: another version of quantgate decided that\n")
    assert "decided at" in out


async def test_a_state_is_recorded(shell: Shell, keyed: Fleet) -> None:
    """Everything a decision needs, and no key; explained later it says the same."""
    path = shell.folder / "state.json"
    with keyed.replicas(("hi", "http://x"), ("lo", "http://y")):
        code, out, err = await shell.route("state")
        live = await shell.told("smol", "--prompt-tokens", "100")
    assert (code, err) == (0, "")
    assert "operators" not in out
    assert PICKY["picky"].sha256[0] not in out
    path.write_text(out)
    assert await shell.told("smol", "--prompt-tokens", "100", "--state", str(path), offline=True) == live
    assert live["chosen"]["replica"] == "hi-0"
    code, _, err = await shell.route("explain", "--state", str(path), offline=True)
    assert (code, err.splitlines()[0][:41]) == (2, "quantgate route: MODEL is missing; there ")


async def test_nobody_answers(shell: Shell, keyed: Fleet) -> None:
    """Exit code 1 if nobody can now, 3 if nothing is good enough, 2 for a name that is none."""
    assert (await shell.route("explain", "smol"))[0] == 1
    with keyed.replicas(("lo", "http://x"), state=State.STARTING):
        code, out, _ = await shell.route("explain", "smol")
    assert (code, out.splitlines()[0].rstrip()) == (1, "smol: nobody")
    assert (await shell.route("explain", "hopeless"))[0] == 3
    code, out, err = await shell.route("explain", "gpt")
    assert (code, out) == (2, "")
    assert err.startswith("quantgate route: no model 'gpt'; there are: smol, ")


async def test_a_gateway_that_cannot_be_asked(shell: Shell) -> None:
    """Another key, none, nobody there, no port, no answer that is understood: each is told with what to do."""
    shell.config(admin_key="burglars")
    code, _, err = await shell.route("explain", "smol")
    assert code == 2
    assert "refuses gateway.admin_key; is this another gateway's configuration?" in err
    shell.config()
    code, _, err = await shell.route("state")
    assert code == 2
    assert "requires a key, but gateway.admin_key is not set" in err
    code, _, err = await shell.route("explain", "smol", "--admin", "127.0.0.1:1")
    assert code == 1
    assert "no gateway answers at 127.0.0.1:1 (" in err
    assert err.endswith("; start it, or pass its admin address with --admin\n")
    shell.config(admin="127.0.0.1:0")
    code, _, err = await shell.route("explain", "smol")
    assert code == 2
    assert err.endswith("gateway.admin has port 0; pass the actual address with --admin\n")
    (shell.folder / "quantgate.yaml").unlink()
    assert (await shell.route("explain", "smol"))[0] == 2


async def test_an_answer_of_somebody_else(shell: Shell) -> None:
    """Whatever it says is shown, as far as it is short."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 Oops\r\nconnection: close\r\n\r\n" + b"x" * 1000)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        code, _, err = await shell.route("state", "--admin", f"{host}:{port}")
    assert (code, err) == (1, f"quantgate route: the gateway at {host}:{port} answers 500: {'x' * 200}\n")


async def test_a_port_that_is_none_of_an_operator(shell: Shell, keyed: Fleet) -> None:
    """The clients' port, say, has no such path."""
    code, _, err = await shell.route("state", "--admin", keyed.served.addresses.client)
    assert code == 2
    assert "refuses gateway.admin_key" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: explain|state"),
        (["explain"], "MODEL is missing"),
        (["explain", "smol", "--header", "x"], "'x' is no header; write 'name: value'"),
        (["explain", "smol", "--header", "X-Api-Key: secret"], "say whose it is with --key NAME"),
        (["explain", "smol", "--header", "x-quantgate-flor: a"], "x-quantgate-flor decides nothing; known: x-"),
        (["explain", "smol", "--prompt-tokens", "-1"], "'-1' is no number of tokens"),
        (["explain", "smol", "--admin", "nowhere"], "'nowhere' is not a valid address"),
        (["explain", "smol", "--state", "/nowhere"], "/nowhere: no such file; `quantgate route state > /nowhere`"),
        (["explain", "--request", "r", "--state", __file__], "--request asks a gateway, --state doesn't"),
        (["explain", "--request", "r", "--key", "a"], "--request tells headers, key and lengths by itself"),
        (["explain", "smol", "--state", __file__], "is no recorded state: Expected `object`, got `str`"),
    ],
)
async def test_usage(shell: Shell, arguments: list[str], words: str) -> None:
    """A slip is told on stderr, and the exit code is 2."""
    code, out, err = await shell.route(*arguments, offline=True)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize("admin, asked", [("0.0.0.0:8001", "127.0.0.1:8001"), ("[::]:8001", "[::1]:8001")])
async def test_an_address_that_is_everywhere_is_here(tmp_path: Path, admin: str, asked: str) -> None:
    """A gateway that listens on every address is asked on this machine's own."""
    path = tmp_path / "quantgate.yaml"
    path.write_text(yaml.safe_dump({"gateway": {"admin": admin, "admin_key": "k"}}))
    assert AdminClient.of(path) == AdminClient(asked, "k", path)
