"""Who may call."""

import hashlib
import os
import stat
from pathlib import Path

import pytest

from config.errors import ConfigError
from gateway.errors import InvalidKey
from gateway.keys import Keys, create_key, read_keys
from tests.fakes.running import FakeReplica
from tests.gateway.fleet import CHAT, TEXT, deployment, error_of, running_gateway

KEY = "qg-alice"
KEYS = Keys({"bob": "b" * 64, "alice": hashlib.sha256(KEY.encode()).hexdigest()})


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY} "},
        {"x-api-key": KEY},
        {"authorization": "Basic YTpi", "x-api-key": KEY},
    ],
)
def test_callers_with_a_key(headers: dict[str, str]) -> None:
    """A key is taken as a bearer token, or from the header that Anthropic's clients use."""
    assert KEYS.authenticate(headers) == "alice"


@pytest.mark.parametrize(
    "headers, words",
    [
        ({}, "no API key; send 'authorization: Bearer KEY'"),
        ({"authorization": "Bearer "}, "no API key"),
        ({"authorization": KEY}, "no API key"),
        ({"x-api-key": ""}, "no API key"),
        ({"authorization": "Bearer x"}, "the API key is not known here"),
        ({"authorization": f"Bearer {'b' * 64}"}, "not known"),
        ({"authorization": "Bearer x", "x-api-key": KEY}, "not known"),
        ({"authorization": "Bearer caf\xe9"}, "not known"),
    ],
)
def test_callers_without_one(headers: dict[str, str], words: str) -> None:
    """No key, a wrong one, or a digest in a key's place: nobody is let in."""
    with pytest.raises(InvalidKey, match=words) as caught:
        KEYS.authenticate(headers)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_without_keys_everybody_is_let_in() -> None:
    """No file, nobody is asked; an empty file lets nobody in."""
    assert Keys().authenticate({}) is None
    with pytest.raises(InvalidKey):
        Keys({}).authenticate({"x-api-key": KEY})


def test_a_key_is_made_once_and_kept_nowhere(tmp_path: Path) -> None:
    """The file holds digests, is its owner's alone whatever it was, and keeps the keys that were there."""
    path = tmp_path / "keys.yaml"
    alice = create_key(path, "alice")
    path.chmod(0o644)
    bob = create_key(path, "bob")
    assert alice != bob
    assert alice.startswith("qg-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert alice not in path.read_text()
    keys = read_keys(path)
    assert [keys.authenticate({"x-api-key": key}) for key in (alice, bob)] == ["alice", "bob"]
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left"


def test_a_name_is_given_once(tmp_path: Path) -> None:
    """A second key of the same name is refused, and the first one stays in force."""
    path = tmp_path / "keys.yaml"
    key = create_key(path, "alice")
    with pytest.raises(ConfigError, match="there is already a key named 'alice'; choose another name"):
        create_key(path, "alice")
    assert read_keys(path).authenticate({"x-api-key": key}) == "alice"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """One line says why."""
    with pytest.raises(ConfigError, match=r"nowhere/keys\.yaml: can't be written: No such file or directory"):
        create_key(tmp_path / "nowhere" / "keys.yaml", "alice")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "keys can't be read: No such file or directory; make one with `quantgate keys create NAME --file "),
        (b"- a list", "is no keys file (name: {sha256: ...})"),
        (b"alice: secret", "is no keys file"),
        (b"alice: {sha256: abc}", "is no keys file"),
        (b"alice: {sha256: '" + b"a" * 64 + b"', admin: true}", "is no keys file"),
        (b"alice: [", "is no keys file"),
        (b"\xff\xfe", "is no keys file"),
    ],
)
def test_files_that_are_no_keys(tmp_path: Path, content: bytes | None, words: str) -> None:
    """What can't be read as keys is refused, never taken for an open door."""
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_empty_file_of_keys(tmp_path: Path) -> None:
    """A file without keys is in force: it admits nobody."""
    path = tmp_path / "keys.yaml"
    path.touch()
    assert read_keys(path) == Keys({})


@pytest.mark.asyncio(loop_scope="session")
async def test_a_gateway_with_keys(fake: FakeReplica) -> None:
    """Inference wants a key, too, before it reads a body; the key does not reach the replica."""
    async with running_gateway(deployment(keys=KEYS)) as fleet:
        with fleet.replicas(("hi", fake.url)):
            for path in (CHAT, TEXT):
                for headers in ({}, {"authorization": "Bearer no"}):
                    answer = await fleet.ask(b"no json", headers, path)
                    assert (answer.status_code, error_of(answer)["type"]) == (401, "authentication_error")
                    assert answer.headers["www-authenticate"] == "Bearer"
            for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}):
                assert (await fleet.ask(headers=headers)).status_code == 200
                assert KEY not in str(fake.requests(CHAT)[-1]["headers"])
                assert (await fleet.client.get("/v1/models", headers=headers)).status_code == 200
        assert await fleet.total("quantgate_requests_total", code="401") == 4


def test_the_mode_of_a_new_file_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    """Even where everything is open by default, keys aren't."""
    before = os.umask(0)
    try:
        create_key(tmp_path / "keys.yaml", "alice")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "keys.yaml").stat().st_mode) == 0o600
