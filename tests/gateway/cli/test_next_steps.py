"""What `quantgate up` prints at its start, and that it works."""

import asyncio
import shutil
from pathlib import Path

import pytest

from config.schema import Settings
from gateway.app import Addresses
from gateway.cli.next_steps import next_steps
from tests.fakes.running import DEADLINE_SECONDS, FakeReplica
from tests.gateway.cli.test_serve import FREE, start, write

VARIANTS = {"a": {"precision": "int4"}}


@pytest.mark.parametrize(
    "tables,keys,expected",
    [
        ({"aliases": {"x": {"ladder": ["a"]}}}, False, "127.0.0.1:8000/v1/chat/completions -H 'content-type: applic"),
        ({"aliases": {"x": {"ladder": ["a"]}}}, False, '{"model": "x", "messages"'),
        ({}, False, '{"model": "a", "messages"'),
        ({}, True, '-H "authorization: Bearer $QUANTGATE_KEY"'),
        ({}, False, "http://127.0.0.1:8001/ui "),
        (
            {"gateway": {"admin_key": "s"}},
            False,
            "# what runs, live (needs gateway.admin_key)",
        ),
        ({"gateway": {"tls": {"certificate": "c.pem"}}}, False, "curl --cacert c.pem https://127.0.0.1:8000/v1/"),
        ({"gateway": {"tls": {"certificate": "c.pem"}}}, False, "answers on https://127.0.0.1:8000, its admin port"),
        ({}, False, "quantgate ps 'my file.yaml' "),
        ({}, False, "quantgate top --config 'my file.yaml'  # the same in a terminal"),
        ({"gateway": {"admin": "127.0.0.1:0"}}, False, "--config 'my file.yaml' --admin 127.0.0.1:8001  # the same"),
    ],
)
def test_lines(tables: dict[str, object], keys: bool, expected: str) -> None:
    """A request that works, the page, and commands; a wildcard address is shown as loopback."""
    settings = Settings.model_validate({"variants": VARIANTS, **tables})
    text = next_steps(settings, Addresses("0.0.0.0:8000", "[::]:8001"), Path("my file.yaml"), keys=keys)
    assert expected in text.replace("[::1]", "127.0.0.1")


def test_nothing_is_configured() -> None:
    """Without a model there is no request to show."""
    assert "curl" not in next_steps(Settings(), Addresses("a:1", "a:2"), Path("q.yaml"), keys=False)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.asyncio(loop_scope="session")
async def test_the_request_works(tmp_path: Path, fake: FakeReplica) -> None:
    """The curl line that `quantgate up` prints gets an answer."""
    replica = f"replicas: [{{variant: a, url: '{fake.url}'}}]\n"
    config = write(tmp_path, FREE + "variants: {a: {precision: int4}}\naliases: {x: {ladder: [a]}}\n" + replica)
    process = await start("up", config, home=tmp_path / "home")
    try:
        assert process.stderr is not None
        async with asyncio.timeout(2 * DEADLINE_SECONDS):
            lines = [(await process.stderr.readline()).decode()]
            while "quantgate ps" not in lines[-1]:
                lines.append((await process.stderr.readline()).decode())
            (request,) = [line for line in lines if line.startswith("  curl")]
            # The replica is verified meanwhile.
            retry = request.replace("curl", "curl -sS --retry 20 --retry-all-errors --retry-delay 1 --fail", 1)
            shell = await asyncio.create_subprocess_shell(retry, stdout=asyncio.subprocess.PIPE)
            out, _ = await shell.communicate()
        assert b'"model":"x"' in out.replace(b'": "', b'":"')
    finally:
        process.terminate()
        await process.communicate()
