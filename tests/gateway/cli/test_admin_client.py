"""What every command says that asks an admin port: about its address, and about answers of something else."""

import asyncio
import gzip
from pathlib import Path

import pytest

from quantgate import main
from tests.gateway.wire import answering, scripted, whole

session_loop = pytest.mark.asyncio(loop_scope="session")

COMMANDS = [["top", "--once"], ["usage"], ["route", "state"], ["route", "explain", "smol"]]
FOREIGN = [
    whole(b"[]"),
    whole(b'{"rows": 1}'),
    whole(b"<html>hello</html>", kind="text/html"),
    whole(b'"\xff"'),
    whole(b"no gzip", extra="content-encoding: gzip\r\n"),
    whole(gzip.compress(b"{}"), extra="content-encoding: gzip\r\n"),
]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a configuration, --admin alone says whom to ask."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    "address", ["localhost", "http://localhost:8001", "localhost:x", "localhost:99999", "::1:8001"]
)
def test_an_address_that_is_none(command: list[str], address: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a usage error that says how to write it."""
    assert main([*command, "--admin", address]) == 2
    out, err = capsys.readouterr()
    assert (out, err.startswith(f"quantgate {command[0]}: --admin: '{address}' is not a valid address; write ")) == (
        *("", True),
    )


@session_loop
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("reply", FOREIGN)
async def test_an_answer_of_something_else(
    command: list[str], reply: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is an error that names the address and --admin, not a traceback."""
    async with scripted(answering(reply)) as other:
        address = other.url.removeprefix("http://")
        code = await asyncio.to_thread(main, [*command, "--admin", address])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert address in err
    assert "--admin" in err
    assert err.count("\n") == 1
