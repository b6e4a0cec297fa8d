"""A reload that would leave nothing of what answers now is refused; a second SIGHUP applies it."""

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from config.schema import AliasSettings
from config.variant import PARENT_QUALITY, Variant
from gateway.deployment import read_deployment
from gateway.keys import KeyFile
from gateway.keys.database import KeyDatabase
from gateway.keys.issuing import create_key, revoke_key, rotate_key
from gateway.live_config import nothing_remains
from gateway.process import gateway_alone
from gateway.routing.target import Catalog
from serving.state.database import StateDatabase
from tests.fakes.running import FakeReplica, eventually, running_fake
from tests.gateway.fleet import HELLO, clients
from tests.gateway.test_workers import free_ports

pytestmark = pytest.mark.asyncio(loop_scope="session")


def document(url: str, **gateway: Any) -> dict[str, Any]:
    """A configuration with one replica behind one alias."""
    return {
        "gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", **gateway},
        "variants": {"a": {"precision": "bf16"}},
        "replicas": [{"variant": "a", "url": url}],
        "aliases": {"smol": {"ladder": ["a"]}},
    }


class Followed:
    """A gateway that follows a configuration file."""

    def __init__(self, path: Path, client: httpx.AsyncClient, admin: httpx.AsyncClient) -> None:
        self.path = path
        self.client = client
        self.admin = admin

    async def status(self, key: str = "") -> int:
        """The status of a request."""
        headers = {"x-api-key": key} if key else {}
        return (await self.client.post("/v1/chat/completions", json=HELLO, headers=headers)).status_code

    async def until_status(self, status: int, key: str) -> None:
        """Wait until requests with a key have this status."""
        async with asyncio.timeout(10):
            while await self.status(key) != status:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    async def reloads(self, outcome: str) -> float:
        """How many reloads ended so."""
        name = f'quantgate_config_reloads_total{{outcome="{outcome}"}} '
        lines = (await self.admin.get("/metrics")).text.splitlines()
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    async def reloaded(self, outcome: str, text: str | None = None) -> None:
        """Replace the file, or send SIGHUP; wait until that ends in an outcome."""
        before = await self.reloads(outcome)
        if text is None:
            os.kill(os.getpid(), signal.SIGHUP)
        else:
            self.path.write_text(text)
        async with asyncio.timeout(10):
            while await self.reloads(outcome) == before:  # noqa: ASYNC110
                await asyncio.sleep(0.02)


@asynccontextmanager
async def followed(folder: Path, content: dict[str, Any]) -> AsyncIterator[Followed]:
    """Run a gateway on a file, as soon as its replica is ready."""
    path = folder / "quantgate.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    async with gateway_alone(read_deployment(path), path) as addresses, clients(addresses) as (client, admin):
        served = Followed(path, client, admin)
        async with asyncio.timeout(10):
            while (await admin.get("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        yield served


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "~\n"])
async def test_an_empty_file_changes_nothing(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    """A document without content is refused, also at a second SIGHUP, and everything goes on."""
    async with followed(tmp_path, document(fake.url)) as gateway:
        await gateway.reloaded("refused", content)
        await gateway.reloaded("refused")
        await gateway.reloaded("refused")
        assert "quantgate.yaml:1:1: is empty; restore its content" in caplog.text
        assert await gateway.status() == 200


@pytest.mark.parametrize("kept", [1, 2, 3])
async def test_a_truncated_file_changes_nothing_until_it_is_confirmed(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture, kept: int
) -> None:
    """A file that ends after some of its tables leaves nothing that answers: it takes a second SIGHUP."""
    content = document(fake.url)
    truncated = yaml.safe_dump(dict(list(content.items())[:kept]), sort_keys=False)
    async with followed(tmp_path, content) as gateway:
        await gateway.reloaded("refused", truncated)
        assert "no alias that answers now would answer any more (smol)" in caplog.text
        assert await gateway.status() == 200
        await gateway.reloaded("refused")
        assert await gateway.status() == 200
        await gateway.reloaded("applied")
        assert await gateway.status() == 404


async def test_a_reload_that_leaves_something_is_applied(tmp_path: Path, fake: FakeReplica) -> None:
    """Of two aliases one may go."""
    content = document(fake.url)
    content["aliases"]["other"] = {"ladder": ["a"]}
    async with followed(tmp_path, content) as gateway:
        del content["aliases"]["smol"]
        await gateway.reloaded("applied", yaml.safe_dump(content))
        assert await gateway.status() == 404


async def test_keys_that_would_all_be_replaced(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """A keys file that is empty, or has other keys only, changes nothing; a second SIGHUP applies the latter."""
    keys = tmp_path / "keys.yaml"
    alice = create_key(KeyFile(keys), "alice")
    bob = create_key(KeyFile(tmp_path / "other.yaml"), "bob")
    async with followed(tmp_path, document(fake.url, keys="keys.yaml")) as gateway:
        keys.write_text("")
        await eventually(lambda: "keys.yaml:1:1: is empty" in caplog.text)
        assert await gateway.status(alice) == 200
        keys.write_text((tmp_path / "other.yaml").read_text())
        await eventually(lambda: "none of the API keys in force would remain" in caplog.text)
        assert (await gateway.status(alice), await gateway.status(bob)) == (200, 401)
        await gateway.reloaded("refused")
        await gateway.reloaded("applied")
        assert (await gateway.status(alice), await gateway.status(bob)) == (401, 200)


async def test_keys_that_are_rotated_or_revoked(tmp_path: Path, fake: FakeReplica) -> None:
    """A key under the same name, and the revocation of the last one, are in force at once."""
    keys = tmp_path / "keys.yaml"
    old = create_key(KeyFile(keys), "alice")
    async with followed(tmp_path, document(fake.url, keys="keys.yaml")) as gateway:
        new = rotate_key(KeyFile(keys), "alice")
        await gateway.reloaded("applied")
        assert (await gateway.status(old), await gateway.status(new)) == (200, 200)
        revoke_key(KeyFile(keys), "alice")
        await gateway.reloaded("applied")
        assert (await gateway.status(old), await gateway.status(new)) == (401, 401)


async def test_a_key_is_revoked_while_a_reload_waits(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """The new ladder has no ready replica yet; keys do not wait for it, and the reload does not bring them back."""
    caplog.set_level(logging.INFO)
    keys = KeyFile(tmp_path / "keys.yaml")
    alice, bob = create_key(keys, "alice"), create_key(keys, "bob")
    content = document(fake.url, keys="keys.yaml")
    (port,) = free_ports(1)
    async with followed(tmp_path, content) as gateway:
        content["variants"]["b"] = {"precision": "fp8"}
        content["replicas"].append({"variant": "b", "url": f"http://127.0.0.1:{port}"})
        content["aliases"]["smol"]["ladder"] = ["b"]
        gateway.path.write_text(yaml.safe_dump(content))
        await eventually(lambda: "reload waits for ready replicas" in caplog.text)
        revoke_key(keys, "alice")
        await gateway.until_status(401, alice)
        assert await gateway.status(bob) == 200
        async with running_fake("--port", str(port)):
            await eventually(lambda: "the configuration is in force" in caplog.text)
            assert (await gateway.status(alice), await gateway.status(bob)) == (401, 200)


async def test_a_key_is_revoked_while_the_configuration_is_invalid(tmp_path: Path, fake: FakeReplica) -> None:
    """Nothing else of it is applied."""
    keys = KeyFile(tmp_path / "keys.yaml")
    alice, bob = create_key(keys, "alice"), create_key(keys, "bob")
    content = document(fake.url, keys="keys.yaml")
    async with followed(tmp_path, content) as gateway:
        await gateway.reloaded("refused", yaml.safe_dump({**content, "bogus": 1}))
        revoke_key(keys, "alice")
        await gateway.until_status(401, alice)
        assert await gateway.status(bob) == 200


async def test_keys_are_never_switched_off_by_a_reload(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """Without `gateway.keys`, the keys in force stay; another keys file is used, and followed, at once."""
    alice = create_key(KeyFile(tmp_path / "keys.yaml"), "alice")
    async with followed(tmp_path, document(fake.url, keys="keys.yaml")) as gateway:
        await gateway.reloaded("applied", yaml.safe_dump(document(fake.url)))
        assert "gateway.keys is removed; keys.yaml stays in force until the next start" in caplog.text
        assert (await gateway.status(), await gateway.status(alice)) == (401, 200)
        dave = create_key(KeyFile(tmp_path / "keys.yaml"), "dave")
        await gateway.reloaded("applied")
        assert await gateway.status(dave) == 200
        (tmp_path / "other.yaml").write_text((tmp_path / "keys.yaml").read_text())
        bob = create_key(KeyFile(tmp_path / "other.yaml"), "bob")
        await gateway.reloaded("applied", yaml.safe_dump(document(fake.url, keys="other.yaml")))
        assert (await gateway.status(alice), await gateway.status(bob)) == (200, 200)
        carol = create_key(KeyFile(tmp_path / "other.yaml"), "carol")
        async with asyncio.timeout(10):
            while await gateway.status(carol) != 200:
                pass


def catalog(**ladders: list[str]) -> Catalog:
    """Aliases with these ladders, over the variants `a`, `b` and `c`."""
    variants = {name: Variant(name, "bf16", PARENT_QUALITY) for name in "abc"}
    return Catalog({name: AliasSettings(ladder=tuple(ladder)) for name, ladder in ladders.items()}, variants)


@pytest.mark.parametrize(
    "before, after, ready, wanted, remains",
    [
        ({"x": ["a"]}, {"x": ["a"]}, "a", "a", True),
        ({"x": ["a"]}, {"x": ["a"]}, "a", "", False),  # its replicas go
        ({"x": ["a"]}, {"x": ["a"]}, "", "", True),  # nothing answers now
        ({"x": ["a"]}, {"x": ["b"]}, "a", "b", True),  # another variant, whose replica is not ready yet
        ({"x": ["a"]}, {"x": ["b"]}, "a", "a", False),
        ({"x": ["a"]}, {"y": ["a"]}, "a", "a", False),  # clients ask for another name
        ({"x": ["a"], "y": ["b"]}, {"y": ["b"]}, "ab", "b", True),
        ({"x": ["a"], "y": ["b"]}, {"y": ["b"]}, "a", "ab", False),  # only x answers now
        ({}, {}, "a", "a", True),
        ({}, {}, "a", "b", False),
        ({}, {"x": ["b"]}, "ab", "b", True),
    ],
)
async def test_nothing_remains(
    before: dict[str, list[str]], after: dict[str, list[str]], ready: str, wanted: str, remains: bool
) -> None:
    """What answers now remains if one of its names is answered afterwards, by whatever variant."""
    reason = nothing_remains(catalog(**before), catalog(**after), ready, wanted)
    assert (reason is None) == remains


async def test_keys_move_to_the_database_at_the_next_start(
    tmp_path: Path, fake: FakeReplica, caplog: pytest.LogCaptureFixture
) -> None:
    """Until then those of the file stay in force and are followed."""
    alice = create_key(KeyFile(tmp_path / "keys.yaml"), "alice")
    async with followed(tmp_path, document(fake.url, keys="keys.yaml")) as gateway:
        await gateway.reloaded("applied", yaml.safe_dump(document(fake.url, keys="database")))
        assert "gateway.keys has changed from or to `database`; it takes effect at the next start" in caplog.text
        assert (await gateway.status(), await gateway.status(alice)) == (401, 200)
        revoke_key(KeyFile(tmp_path / "keys.yaml"), "alice")
        await gateway.reloaded("applied")
        assert await gateway.status(alice) == 401


async def test_keys_move_from_the_database_at_the_next_start(tmp_path: Path, fake: FakeReplica) -> None:
    """Until then those of the database stay in force and are followed, also while a reload waits."""
    file = create_key(KeyFile(tmp_path / "keys.yaml"), "bob")
    database = StateDatabase.at(f"sqlite:///{tmp_path}/state.db")
    alice = create_key(KeyDatabase(database), "alice")
    async with followed(tmp_path, document(fake.url, keys="database")) as gateway:
        await gateway.reloaded("applied", yaml.safe_dump(document(fake.url, keys="keys.yaml")))
        assert (await gateway.status(alice), await gateway.status(file)) == (200, 401)
        revoke_key(KeyDatabase(database), "alice")
        async with asyncio.timeout(10):
            while await gateway.status(alice) != 401:
                pass
        await gateway.reloaded("applied")
        assert (await gateway.status(alice), await gateway.status(file)) == (401, 401)
    database.close()
