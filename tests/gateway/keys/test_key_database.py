"""Keys in the state database: the command line changes them, gateways follow them, also while it is away."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from config.errors import ConfigError
from gateway.keys import UNKNOWN_KEYS, KeyFile, KeyLimits, Keys
from gateway.keys.database import KeyDatabase
from gateway.keys.follower import KeyFollower
from gateway.keys.issuing import create_key, import_keys, revoke_key, revoke_old_key, rotate_key
from quantgate import main
from serving.state.database import StateDatabase
from serving.state.keys import KeyTable
from serving.state.link import Link
from tests.fakes.running import eventually, running_fake
from tests.gateway.fleet import HELLO, Fleet, deployment, error_of, running_gateway
from tests.serving.state.conftest import postgresql, state
from tests.serving.state.databases import PostgreSQL, away

__all__ = ["postgresql", "state"]


@contextmanager
def keys_of(state: str) -> Iterator[KeyDatabase]:
    """The keys of a state database."""
    database = StateDatabase.at(state)
    try:
        yield KeyDatabase(database)
    finally:
        database.close()


def test_keys_are_stored_as_in_a_file(state: str, tmp_path: Path) -> None:
    """With all their fields; what is imported from a file is the same."""
    limits = KeyLimits(
        aliases=("smol",),
        requests_per_minute=60,
        concurrency=2,
        expires=datetime(2099, 1, 1, tzinfo=UTC),
        may=("seed",),
    )
    file = KeyFile(tmp_path / "keys.yaml")
    create_key(file, "alice", limits)
    rotate_key(file, "alice")
    create_key(file, "bob")
    with keys_of(state) as keys:
        import_keys(keys, file.read())
        assert keys.read() == file.read()
        revoke_old_key(keys, "alice")
        assert keys.read()["alice"].sha256 == file.read()["alice"].sha256[1:]
        revoke_key(keys, "bob")
        assert set(keys.read()) == {"alice"}
        with pytest.raises(ConfigError, match="there is no key named 'bob'"):
            revoke_key(keys, "bob")
        with pytest.raises(ConfigError, match="there is already a key named 'alice'; revoke it with"):
            import_keys(keys, file.read())
        with pytest.raises(ConfigError, match="zoe has the same key as alice"):
            import_keys(keys, {"zoe": file.read()["alice"]})
        assert set(keys.read()) == {"alice"}


def test_a_key_is_never_stored(state: str) -> None:
    """Only its digest."""
    with keys_of(state) as keys:
        key = create_key(keys, "alice")
        (document,) = KeyTable(keys.database).read().documents.values()
    assert key not in document
    assert list(json.loads(document)) == ["sha256"]


def configuration(folder: Path, state: str) -> Path:
    """A configuration with keys in the database."""
    config = folder / "quantgate.yaml"
    config.write_text(yaml.safe_dump({"gateway": {"state": state, "keys": "database"}}))
    return config


def test_the_command_line(state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration says where keys are; the commands are those of files."""
    config = str(configuration(tmp_path, state))
    create_key(KeyFile(tmp_path / "old.yaml"), "carol")
    for command in (
        ["create", "alice", "--requests-per-minute", "5"],
        ["create", "bob"],
        ["rotate", "bob"],
        ["import", str(tmp_path / "old.yaml")],
        ["revoke", "alice"],
    ):
        assert main(["keys", *command, "--config", config]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--json", "--config", config]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["name"]: len(row["sha256"]) for row in told} == {"bob": 2, "carol": 1}
    assert main(["keys", "create", "bob", "--config", config]) == 2
    assert "there is already a key named 'bob'" in capsys.readouterr().err


def test_the_command_line_while_the_database_is_away(
    postgresql: PostgreSQL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails with exit code 1, and says why."""
    config = configuration(tmp_path, postgresql.new_database())
    with away(postgresql, "stopped"):
        assert main(["keys", "list", "--config", str(config)]) == 1
    assert "is unavailable" in capsys.readouterr().err


def test_the_keys_file_of_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --file, the configuration of the current folder says where keys are; without one, it is keys.yaml."""
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "create", "alice"]) == 0
    assert set(KeyFile(Path("keys.yaml")).read()) == {"alice"}
    Path("quantgate.yaml").write_text(yaml.safe_dump({"gateway": {"keys": "others.yaml"}}))
    assert main(["keys", "create", "bob"]) == 0
    assert set(KeyFile(Path("others.yaml")).read()) == {"bob"}


@dataclass
class Applied:
    """The keys that a follower has applied."""

    keys: Keys = UNKNOWN_KEYS
    count: int = 0

    def __call__(self, keys: Keys) -> None:
        """Apply them."""
        self.keys, self.count = keys, self.count + 1

    def has(self, *names: str) -> Callable[[], bool]:
        """Whether just these keys are in force."""
        return lambda: self.keys.known and self.keys.names() == set(names)


@asynccontextmanager
async def followed(state: str) -> AsyncIterator[Applied]:
    """Follow the keys of a state database."""
    applied = Applied()
    async with KeyFollower(Link(StateDatabase.at(state, create=False)), applied):
        yield applied


async def test_changes_are_followed(state: str) -> None:
    """Those before the start at once, others soon; without a change nothing is applied."""
    async with followed(state) as applied:
        assert applied.has()()
        with keys_of(state) as keys:
            await asyncio.to_thread(create_key, keys, "alice")
            await eventually(applied.has("alice"))
            await asyncio.to_thread(create_key, keys, "bob")
            await eventually(applied.has("alice", "bob"))
            await asyncio.to_thread(revoke_key, keys, "alice")
            await eventually(applied.has("bob"))
            assert applied.count == 4
        async with followed(state) as late:
            assert late.has("bob")()


async def test_a_key_that_is_invalid(state: str, caplog: pytest.LogCaptureFixture) -> None:
    """The keys before it stay in force, and the log says which one it is, once."""
    caplog.set_level(logging.INFO)
    with keys_of(state) as keys:
        create_key(keys, "alice")
        async with followed(state) as applied:
            with KeyTable(keys.database).edited() as documents:
                documents["bob"] = '{"sha256": "secret"}'
            await eventually(lambda: "key 'bob': sha256" in caplog.text)
            assert applied.has("alice")()
            with KeyTable(keys.database).edited() as documents:
                del documents["bob"]
            await eventually(lambda: "API keys are followed again" in caplog.text)
    assert "secret" not in caplog.text


async def test_a_defect_is_not_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and the next look applies the change."""
    state, applied, failures = f"sqlite:///{tmp_path}/state.db", Applied(), [ZeroDivisionError()]

    def apply(keys: Keys) -> None:
        if keys.names() and failures:
            raise failures.pop()
        applied(keys)

    async with KeyFollower(Link(StateDatabase.at(state, create=False)), apply):
        with keys_of(state) as keys:
            await asyncio.to_thread(create_key, keys, "alice")
        await eventually(applied.has("alice"))
    assert "following API keys has a defect" in caplog.text


async def test_a_database_that_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One without keys changes nothing; one with keys does."""
    state = f"sqlite:///{tmp_path}/state.db"
    with keys_of(state) as keys:
        create_key(keys, "alice")
    async with followed(state) as applied:
        for each in tmp_path.glob("state.db*"):
            each.unlink()
        await eventually(lambda: "was made anew and has no API key" in caplog.text)
        assert applied.has("alice")()
        with keys_of(state) as keys:
            create_key(keys, "bob")
        await eventually(applied.has("bob"))


@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a_database_that_is_away(postgresql: PostgreSQL, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """The keys of the last read stay in force; a change is followed when it is back."""
    state = postgresql.new_database()
    with keys_of(state) as keys:
        create_key(keys, "alice")
    async with followed(state) as applied:
        with away(postgresql, how):
            await eventually(lambda: "the API keys of the last read stay in force" in caplog.text)
            assert applied.has("alice")()
        with keys_of(state) as keys:
            await asyncio.to_thread(revoke_key, keys, "alice")
        await eventually(applied.has())


async def test_a_gateway_that_starts_while_the_database_is_away(postgresql: PostgreSQL) -> None:
    """Clients get 503 until the keys have been read; nobody is admitted without a key."""
    state = postgresql.new_database()
    with keys_of(state) as keys:
        key = create_key(keys, "alice")
    settings = {"gateway": {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "state": state, "keys": "database"}}
    deployed = replace(deployment(settings, UNKNOWN_KEYS), state=state)
    async with running_fake() as fake:
        postgresql.stop()
        try:
            async with running_gateway(deployed) as fleet:
                with fleet.replicas(("hi", fake.url)):
                    await check_nobody_is_admitted(fleet, key)
                    postgresql.start()
                    await eventually(lambda: is_admitted(fleet, key))
                    postgresql.stop()
                    assert await is_admitted(fleet, key)
                    assert (await fleet.ask(HELLO, {"authorization": "Bearer other"})).status_code == 401
        finally:
            postgresql.start()


async def check_nobody_is_admitted(fleet: Fleet, key: str) -> None:
    """With a key or without one."""
    answer = await fleet.ask(HELLO, {"authorization": f"Bearer {key}"})
    assert (answer.status_code, error_of(answer)["code"]) == (503, "keys_unavailable")
    assert answer.headers["retry-after"]
    assert (await fleet.ask(HELLO)).status_code == 401


async def is_admitted(fleet: Fleet, key: str) -> bool:
    """Whether a key is answered."""
    return (await fleet.ask(HELLO, {"authorization": f"Bearer {key}"})).status_code == 200
