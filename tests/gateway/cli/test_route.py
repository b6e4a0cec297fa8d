"""`quantgate route` with a running gateway and with saved snapshots."""

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
    """A gateway with API keys and an admin key."""
    async with running_gateway(deployment({"gateway": GATEWAY}, keys_in_force(PICKY))) as fleet:
        yield fleet


class Shell:
    """Runs the command; results are exit code, stdout and stderr."""

    def __init__(self, folder: Path, fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.admin = fleet.served.addresses.admin
        self.capsys = capsys
        self.config(admin_key="operators")

    def config(self, **gateway: Any) -> None:
        """Write a configuration with the address of the admin port."""
        settings = {"gateway": {"admin": self.admin, **gateway}}
        (self.folder / "quantgate.yaml").write_text(yaml.safe_dump(settings))

    async def route(self, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
        """Run the command in a thread: the gateway runs on this loop."""
        config = [] if offline else ["--config", str(self.folder / "quantgate.yaml")]

        def run() -> int:
            try:
                return main(["route", *arguments, *config])
            except SystemExit as error:
                return int(str(error.code))

        code = await asyncio.to_thread(run)
        out, err = self.capsys.readouterr()
        return code, out, err

    async def explanation(self, *arguments: str, offline: bool = False) -> dict[str, Any]:
        """Run `explain --json`; there must be no warning."""
        _, out, err = await self.route("explain", *arguments, "--json", offline=offline)
        assert err == ""
        explanation: dict[str, Any] = json.loads(out)
        return explanation


@pytest.fixture
def shell(tmp_path: Path, keyed: Fleet, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A shell in a temporary folder."""
    return Shell(tmp_path, keyed, capsys)


async def test_the_tables(shell: Shell, keyed: Fleet) -> None:
    """Without a terminal, the tables of rungs, replicas and rejected variants are not cut or wrapped."""
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
        "1 hi-0 hi 0 - - - - - - - no recent poll",
        "2 mid-1 mid 0 - - - - - - - hi is a better rung and answers; no recent poll",
        "lo int4 top1_agreement 0.92 misses the floor 0.95",
        "lo-0 lo failed",
    ):
        assert row.split() in lines


async def test_a_key_is_named(shell: Shell, keyed: Fleet) -> None:
    """The floor and the models of the key apply; an unknown name is an error that lists the known ones."""
    with keyed.replicas(("lo", "http://x"), ("mid", "http://y")):
        explanation = await shell.explanation("smol", "--key", "picky")
        assert explanation["chosen"] == {
            "replica": "mid-1",
            "variant": "mid",
            "precision": "int8",
            "reason": "fallback",
        }
        assert [each["variant"] for each in explanation["refused"]] == ["lo"]
        assert (await shell.route("explain", "lo", "--key", "picky"))[0] == 2
        code, out, err = await shell.route("explain", "smol", "--key", "bob")
    assert (code, out, err) == (2, "", "quantgate route: there is no key named 'bob'; known: picky\n")


async def test_a_recorded_request(shell: Shell, keyed: Fleet, fake: FakeReplica) -> None:
    """The explanation agrees with the response headers, also after the replicas are gone, and from a saved file."""
    for number, body in enumerate((HELLO, STREAM, {**HELLO, "max_tokens": 7})):
        with keyed.replicas(("mid", fake.url), ("lo", fake.url)):
            headers = {**KEY, "x-request-id": f"why-{number}", "x-quantgate-precision": "int8,int4"}
            answer = await keyed.ask(body, headers)
        assert answer.status_code == 200
        explanation = await shell.explanation("--request", f"why-{number}", "--save", str(shell.folder / "saved.json"))
        assert explanation["chosen"]["replica"] == answer.headers["x-quantgate-replica"]
        assert explanation["chosen"]["reason"] == answer.headers["x-quantgate-reason"]
        assert explanation["answer_tokens"] == body.get("max_tokens")
        assert explanation["prompt_tokens"] > 0
        assert {each["variant"]: each["why"] for each in explanation["refused"]} == {
            "hi": "precision bf16 was not asked for",
            "lo": "kl_mean 0.05 misses the floor 0.02",
        }
        assert await shell.explanation("smol", "--state", str(shell.folder / "saved.json"), offline=True) == explanation
    code, _, err = await shell.route("explain", "lo", "--state", str(shell.folder / "saved.json"), offline=True)
    assert (code, err) == (2, "quantgate route: the request why-2 was for model 'smol', not 'lo'\n")
    code, _, err = await shell.route("explain", "--request", "unheard-of")
    assert code == 1
    assert err.endswith(
        "answers 404: no decision on 'unheard-of': it was refused before one, or is not among the "
        "latest 1000 of this process\n"
    )


async def test_another_version_decided_differently(shell: Shell, keyed: Fleet, fake: FakeReplica) -> None:
    """If this version decides differently from the gateway, a warning says so."""
    saved = shell.folder / "saved.json"
    with keyed.replicas(("mid", fake.url)):
        await keyed.ask(HELLO, {**KEY, "x-request-id": "old"})
    assert (await shell.route("explain", "--request", "old", "--save", str(saved)))[0] == 0
    saved.write_text(saved.read_text().replace('"chosen":"mid-0"', '"chosen":"mid-7"'))
    code, out, err = await shell.route("explain", "--state", str(saved), offline=True)
    assert (code, err) == (0, "quantgate route: the gateway chose mid-7: another version of quantgate decided\n")
    assert "; decided of " in out


async def test_a_saved_state(shell: Shell, keyed: Fleet) -> None:
    """`route state` prints no keys, and an explanation from it is the same as one from the gateway."""
    path = shell.folder / "state.json"
    with keyed.replicas(("hi", "http://x"), ("lo", "http://y")):
        code, out, err = await shell.route("state")
        live = await shell.explanation("smol", "--prompt-tokens", "100")
    assert (code, err) == (0, "")
    assert "operators" not in out
    assert PICKY["picky"].sha256[0] not in out
    path.write_text(out)
    assert await shell.explanation("smol", "--prompt-tokens", "100", "--state", str(path), offline=True) == live
    assert live["chosen"]["replica"] == "hi-0"
    code, _, err = await shell.route("explain", "--state", str(path), offline=True)
    assert (code, err.splitlines()[0][:41]) == (2, "quantgate route: MODEL is missing; there ")


async def test_exit_codes(shell: Shell, keyed: Fleet) -> None:
    """The exit code is 1 if no replica can answer now, 3 if no variant is good enough, 2 if the model is unknown."""
    assert (await shell.route("explain", "smol"))[0] == 1
    with keyed.replicas(("lo", "http://x"), state=State.STARTING):
        code, out, _ = await shell.route("explain", "smol")
    assert (code, out.splitlines()[0].rstrip()) == (1, "smol: no replica")
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


async def test_an_error_of_another_server(shell: Shell) -> None:
    """The error has the status and the beginning of the body."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 500 Oops\r\nconnection: close\r\n\r\n" + b"x" * 1000)
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        code, _, err = await shell.route("state", "--admin", f"{host}:{port}")
    assert (code, err) == (1, f"quantgate route: the gateway at {host}:{port} answers 500: {'x' * 200}\n")


async def test_a_port_that_is_not_the_admin_port(shell: Shell, keyed: Fleet) -> None:
    """The clients' port refuses the admin key."""
    code, _, err = await shell.route("state", "--admin", keyed.served.addresses.client)
    assert code == 2
    assert "refuses gateway.admin_key" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the following arguments are required: explain|state"),
        (["explain"], "MODEL is missing"),
        (["explain", "smol", "--header", "x"], "'x' is not a header; write 'name: value'"),
        (["explain", "smol", "--header", "X-Api-Key: secret"], "name its holder with --key NAME"),
        (
            ["explain", "smol", "--header", "x-quantgate-flor: a"],
            "the header x-quantgate-flor does not affect routing; known: x-",
        ),
        (["explain", "smol", "--prompt-tokens", "-1"], "'-1' is not a number of tokens"),
        (["explain", "smol", "--admin", "nowhere"], "'nowhere' is not a valid address"),
        (["explain", "smol", "--state", "/nowhere"], "/nowhere: no such file; `quantgate route state > /nowhere`"),
        (["explain", "--request", "r", "--state", __file__], "--request asks a gateway, --state does not"),
        (["explain", "--request", "r", "--key", "a"], "--request includes headers, key and lengths"),
        (["explain", "smol", "--state", __file__], "not a valid routing snapshot: Expected `object`, got `str`"),
    ],
)
async def test_usage(shell: Shell, arguments: list[str], words: str) -> None:
    """A usage error is printed on stderr, and the exit code is 2."""
    code, out, err = await shell.route(*arguments, offline=True)
    assert (code, out) == (2, "")
    assert words in err


@pytest.mark.parametrize("admin, address", [("0.0.0.0:8001", "127.0.0.1:8001"), ("[::]:8001", "[::1]:8001")])
async def test_a_wildcard_address(tmp_path: Path, admin: str, address: str) -> None:
    """A gateway that listens on all addresses is reached on the loopback address."""
    path = tmp_path / "quantgate.yaml"
    path.write_text(yaml.safe_dump({"gateway": {"admin": admin, "admin_key": "k"}}))
    assert AdminClient.of(path) == AdminClient(address, "k", path)
