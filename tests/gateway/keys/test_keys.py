"""Who may call, how far a key reaches, and the file that says it."""

import hashlib
import multiprocessing
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from config.errors import ConfigError
from config.schema import Floor
from gateway.errors import InvalidKey, NotAllowed
from gateway.keys import ANONYMOUS, Caller, KeyFile, KeyLimits, Keys, StoredKey, keys_in_force, read_keys
from gateway.keys.issuing import create_key, revoke_key, revoke_old_key, rotate_key
from tests.fakes.running import FakeReplica
from tests.gateway.fleet import CHAT, TEXT, deployment, error_of, running_gateway

KEY = "qg-alice"
NOW = 1_800_000_000.0


def digest(key: str) -> str:
    """What is kept of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = keys_in_force({"bob": StoredKey(sha256=("b" * 64,)), "alice": StoredKey(sha256=(digest(KEY),))})


def name_of(keys: Keys, key: str, now_seconds: float = NOW) -> str | None:
    """Whose key it is."""
    return keys.authenticate({b"x-api-key": key.encode()}, now_seconds).name


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer qg-alice"},
        {b"authorization": b"bearer  qg-alice "},
        {b"x-api-key": b"qg-alice"},
        {b"api-key": b" qg-alice"},
        {b"authorization": b"Basic YTpi", b"x-api-key": b"qg-alice"},
        {b"authorization": b"Bearer ", b"x-api-key": b"", b"api-key": b"qg-alice"},
        {b"authorization": b"Bearer qg-alice", b"api-key": b"other"},
    ],
)
def test_callers_with_a_key(headers: dict[bytes, bytes]) -> None:
    """A key is taken as a bearer token, or from the headers of Anthropic's and of Azure's clients, in this order."""
    assert KEYS.authenticate(headers, NOW) == Caller("alice")


@pytest.mark.parametrize(
    "headers, words",
    [
        ({}, "no API key; send 'authorization: Bearer KEY'"),
        ({b"authorization": b"Bearer "}, "no API key"),
        ({b"authorization": b"qg-alice"}, "no API key"),
        ({b"x-api-key": b"", b"api-key": b" "}, "no API key"),
        ({b"authorization": b"Bearer x"}, "the API key is not known"),
        ({b"authorization": b"Bearer " + b"b" * 64}, "not known"),
        ({b"authorization": b"Bearer x", b"x-api-key": b"qg-alice"}, "not known"),
        ({b"x-api-key": b"x", b"api-key": b"qg-alice"}, "not known"),
        ({b"authorization": b"Bearer caf\xe9\xff\x00"}, "not known"),
        ({b"authorization": b"Bearer QG-ALICE"}, "not known"),
    ],
)
def test_callers_without_one(headers: dict[bytes, bytes], words: str) -> None:
    """No key, a wrong one, or a digest in a key's place: nobody is let in."""
    with pytest.raises(InvalidKey, match=words) as caught:
        KEYS.authenticate(headers, NOW)
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_without_keys_everybody_is_let_in() -> None:
    """No file, nobody is asked, and nobody may send guarded fields; an empty file lets nobody in."""
    assert Keys().authenticate({}, NOW) is ANONYMOUS
    assert (ANONYMOUS.name, ANONYMOUS.may, ANONYMOUS.allows("any")) == (None, frozenset(), True)
    with pytest.raises(InvalidKey):
        Keys({}).authenticate({b"x-api-key": b"qg-alice"}, NOW)
    assert [keys.names() for keys in (Keys(), KEYS)] == [frozenset(), frozenset({"alice", "bob"})]


def test_a_key_ends() -> None:
    """From the second on that the file names, its holder learns that it expired, and nobody else learns of it."""
    ends = datetime(2027, 1, 31, tzinfo=UTC)
    keys = keys_in_force({"alice": StoredKey(sha256=(digest(KEY),), expires=ends)})
    assert name_of(keys, KEY, ends.timestamp() - 1) == "alice"
    with pytest.raises(
        InvalidKey, match="'alice' expired at 2027-01-31 00:00:00 UTC; ask the operator for a new one"
    ) as caught:
        name_of(keys, KEY, ends.timestamp())
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(InvalidKey, match="not known"):
        name_of(keys, "qg-bob", ends.timestamp())


def test_a_key_reaches_as_far_as_the_file_says(tmp_path: Path) -> None:
    """Everything that can be said of a key arrives at its caller."""
    path = tmp_path / "keys.yaml"
    path.write_text(
        f"alice:\n  sha256: {digest(KEY)}\n  aliases: [smol, lo]\n"
        "  floor: {top1_agreement: 0.97, length_ratio: 1.1}\n"
        "  requests_per_minute: 60\n  tokens_per_minute: 1000\n  concurrency: 2\n  max_tokens: 512\n"
        "  expires: 2099-01-01\n  may: [chat_template, kv_transfer_params]\n"
    )
    assert read_keys(path).authenticate({b"x-api-key": KEY.encode()}, NOW) == Caller(
        name="alice",
        aliases=frozenset({"smol", "lo"}),
        floor=Floor(top1_agreement=0.97, length_ratio=1.1),
        max_tokens=512,
        requests_per_minute=60,
        tokens_per_minute=1000,
        concurrency=2,
        may=frozenset({"chat_template", "kv_transfer_params"}),
    )


@pytest.mark.parametrize(
    "aliases, words",
    [(("smol", "lo"), "it may use: lo, smol"), ((), "it may use: none")],
)
def test_models_out_of_reach(aliases: tuple[str, ...], words: str) -> None:
    """A key with aliases may use those only; the refusal is bounded, whatever was asked for."""
    caller = Caller("alice", aliases=frozenset(aliases))
    for name in aliases:
        caller.check_model(name)
    with pytest.raises(NotAllowed, match=words) as caught:
        caller.check_model("x" * 10_000)
    assert (caught.value.status, caught.value.code, caught.value.param) == (403, "model_not_allowed", "model")
    assert len(caught.value.message) < 250
    Caller("bob").check_model("any")


def test_a_key_is_made_once_and_kept_nowhere(tmp_path: Path) -> None:
    """The file holds digests, is its owner's alone whatever it was, and keeps the keys that were there."""
    path = tmp_path / "keys.yaml"
    alice = create_key(KeyFile(path), "alice", KeyLimits(aliases=(), concurrency=3))
    path.chmod(0o644)
    bob = create_key(KeyFile(path), "bob")
    assert alice != bob
    assert alice.startswith("qg-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert alice not in path.read_text()
    keys = read_keys(path)
    assert [name_of(keys, key) for key in (alice, bob)] == ["alice", "bob"]
    caller = keys.authenticate({b"x-api-key": alice.encode()}, NOW)
    assert (caller.aliases, caller.concurrency) == (frozenset(), 3)
    assert {each.name for each in tmp_path.iterdir()} == {"keys.yaml", ".keys.yaml.lock"}, "nothing half-written"


def test_a_name_is_given_once(tmp_path: Path) -> None:
    """A second key of the same name is refused, and the first one stays in force."""
    path = tmp_path / "keys.yaml"
    key = create_key(KeyFile(path), "alice")
    with pytest.raises(ConfigError, match="there is already a key named 'alice'; choose another name, or use "):
        create_key(KeyFile(path), "alice")
    assert name_of(read_keys(path), key) == "alice"


@pytest.mark.parametrize("name", ["", "-x", "a b", "a\nb", "x" * 129])
def test_names_that_logs_could_not_bear(tmp_path: Path, name: str) -> None:
    """A name is one word; nothing is made for another."""
    with pytest.raises(ConfigError, match="is not a valid key name"):
        create_key(KeyFile(tmp_path / "keys.yaml"), name)
    assert list(tmp_path.iterdir()) == []


def test_a_key_is_replaced_without_a_gap(tmp_path: Path) -> None:
    """Both keys of a name are its caller's, with the same terms, until the older one is dropped."""
    path = tmp_path / "keys.yaml"
    old = create_key(KeyFile(path), "alice", KeyLimits(concurrency=3, expires=datetime(2099, 1, 1, tzinfo=UTC)))
    with pytest.raises(ConfigError, match="'alice' has only one key; `quantgate keys rotate alice` adds a second"):
        revoke_old_key(KeyFile(path), "alice")
    new = rotate_key(KeyFile(path), "alice")
    keys = read_keys(path)
    assert keys.authenticate({b"api-key": old.encode()}, NOW) == keys.authenticate({b"api-key": new.encode()}, NOW)
    with pytest.raises(
        ConfigError, match="already has two keys; remove the older one with `quantgate keys revoke alice"
    ):
        rotate_key(KeyFile(path), "alice")
    revoke_old_key(KeyFile(path), "alice")
    keys = read_keys(path)
    assert keys.authenticate({b"api-key": new.encode()}, NOW).concurrency == 3
    with pytest.raises(InvalidKey):
        name_of(keys, old)


def test_a_key_is_taken_back(tmp_path: Path) -> None:
    """A revoked name has no key any more; the last one leaves a file that admits nobody."""
    path = tmp_path / "keys.yaml"
    key = create_key(KeyFile(path), "alice")
    rotate_key(KeyFile(path), "alice")
    revoke_key(KeyFile(path), "alice")
    assert read_keys(path) == Keys({})
    with pytest.raises(InvalidKey):
        name_of(read_keys(path), key)


@pytest.mark.parametrize("change", [rotate_key, revoke_key, revoke_old_key])
def test_names_that_nobody_has(tmp_path: Path, change: object) -> None:
    """What isn't there can't be changed: the nearest name is told, and a file that is missing is not made."""
    assert callable(change)
    path = tmp_path / "keys.yaml"
    with pytest.raises(ConfigError, match="keys can't be read: No such file or directory"):
        change(KeyFile(path), "alice")
    assert list(tmp_path.iterdir()) == []
    create_key(KeyFile(path), "alice")
    with pytest.raises(ConfigError, match="there is no key named 'alise'; did you mean 'alice'"):
        change(KeyFile(path), "alise")


def _create_many(path: Path, who: str) -> None:
    for number in range(10):
        create_key(KeyFile(path), f"p{who}-{number}")


def test_keys_made_at_the_same_time(tmp_path: Path) -> None:
    """Nobody's entry is lost when several are written at once."""
    path = tmp_path / "keys.yaml"
    processes = [multiprocessing.get_context("spawn").Process(target=_create_many, args=(path, who)) for who in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(read_keys(path).names()) == 40


def test_a_link_stays_one(tmp_path: Path) -> None:
    """The file that a link points to is changed, not the link."""
    (tmp_path / "real").mkdir()
    path = tmp_path / "keys.yaml"
    path.symlink_to(tmp_path / "real" / "keys.yaml")
    key = create_key(KeyFile(path), "alice")
    assert path.is_symlink()
    assert name_of(read_keys(tmp_path / "real" / "keys.yaml"), key) == "alice"


SHA = "a" * 64


@pytest.mark.parametrize(
    "content, words",
    [
        (
            None,
            "keys can't be read: No such file or directory; create the file with `quantgate keys create NAME --file ",
        ),
        ("- a list", ":1:1: must be a mapping; write name: {sha256: ...}"),
        ("alice: secret", ":1:1: alice: must be a mapping; write name: {sha256: ...}"),
        ("alice: {sha256: secret}", "alice.sha256.0: is not a SHA-256 digest; write 64 digits 0-9 a-f"),
        ("alice: {sha256: []}", "alice.sha256: is empty; add an entry"),
        (f"alice: {{sha256: [{SHA}, {'b' * 64}, {'c' * 64}]}}", "alice.sha256: has more than 2 entries; remove some"),
        ("alice: {}", "alice.sha256: is missing"),
        (f"alice: {{sha256: {SHA}, alias: [x]}}", "alice.alias: unknown key; did you mean 'aliases'?"),
        (f"alice: {{sha256: {SHA}, floor: {{top1: 1}}}}", "alice.floor.top1: unknown key; known: kl_mean, "),
        (f"alice: {{sha256: {SHA}, floor: {{top1_agreement: 2}}}}", "alice.floor.top1_agreement: must be at most 1"),
        (f"alice: {{sha256: {SHA}, aliases: ['a b']}}", "alice.aliases.0: is not a valid name"),
        (f"alice: {{sha256: {SHA}, concurrency: 0}}", "alice.concurrency: must be at least 1"),
        (f"alice: {{sha256: {SHA}, concurrency: true}}", "alice.concurrency: must be a whole number"),
        (f"alice: {{sha256: {SHA}, may: [Chat]}}", "alice.may.0: is not the name of a field"),
        (f"alice: {{sha256: {SHA}, expires: tomorrow}}", "alice.expires: is not a date; write 2027-01-31 or "),
        (f"alice: {{sha256: {SHA}, expires: 20270131}}", "alice.expires: is not a date"),
        (f"alice: {{sha256: {SHA}, expires: '0001-01-01T00:00:00+14:00'}}", "alice.expires: is not a date"),
        (
            f"alice: {{sha256: {SHA}, expires: 2027-02-30}}",
            ":1:83: alice.expires: is not a date; write 2027-01-31 or ",
        ),
        (f"'a b': {{sha256: {SHA}}}", "a b: 'a b' is not a valid key name; use letters, digits"),
        (f"alice: {{sha256: {SHA}}}\nbob: {{sha256: {SHA}}}", "bob.sha256: same key as alice; create one key per name"),
        (
            f"alice: {{sha256: {SHA}}}\nalice: {{sha256: {'b' * 64}}}",
            ":2:1: alice: is a duplicate key; keep one",
        ),
        ("? [a]\n: {sha256: x}", ":1:3: a key is not a name; write 'name: value'"),
        ("alice: [", ":1:9: is not YAML: expected the node content"),
        (b"\xff\xfe", ":1:1: is not UTF-8 text; save it as UTF-8"),
        ("", "is empty; restore it, or create"),
        ("# alice\n", "is empty; restore it, or create"),
        ("alice: \x07", ":1:8: is not YAML: it contains the control character #x0007"),
    ],
)
def test_files_that_are_no_keys(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    """What can't be read as keys is refused, never taken for an open door; what stands in a key's place isn't told."""
    path = tmp_path / "keys.yaml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert words in str(caught.value)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())
    assert "secret" not in str(caught.value)


def test_all_problems_of_a_file_are_told(tmp_path: Path) -> None:
    """One line each, with the file's and the key's name."""
    path = tmp_path / "keys.yaml"
    path.write_text("alice: {sha256: abc, concurrency: no}\nbob: {}\n")
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    places = [": ".join(line.removeprefix(f"{path}:").split(": ")[:2]) for line in str(caught.value).splitlines()]
    assert places == ["1:9: alice.sha256.0", "1:22: alice.concurrency", "2:1: bob.sha256"]


@pytest.mark.parametrize(
    "written, seconds",
    [
        ("2027-01-31", 1801353600),
        ("'2027-01-31'", 1801353600),
        ("2027-01-31T12:00:00", 1801396800),
        ("'2027-01-31T12:00Z'", 1801396800),
        ("2027-01-31T12:00:00+02:00", 1801389600),
    ],
)
def test_when_a_key_ends(tmp_path: Path, written: str, seconds: int) -> None:
    """A date is its first moment, and what has no zone is UTC."""
    path = tmp_path / "keys.yaml"
    path.write_text(f"alice: {{sha256: {digest(KEY)}, expires: {written}}}")
    assert name_of(read_keys(path), KEY, seconds - 1) == "alice"
    with pytest.raises(InvalidKey, match="expired"):
        name_of(read_keys(path), KEY, seconds)


def test_an_empty_file_of_keys(tmp_path: Path) -> None:
    """A file that was truncated is refused, and takes a first key; one that says `{}` admits nobody."""
    path = tmp_path / "keys.yaml"
    path.touch()
    with pytest.raises(ConfigError, match="is empty"):
        read_keys(path)
    create_key(KeyFile(path), "alice")
    assert read_keys(path).names() == {"alice"}
    path.write_text("{}\n")
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
            for headers in ({"authorization": f"Bearer {KEY}"}, {"x-api-key": KEY}, {"api-key": KEY}):
                assert (await fleet.ask(headers=headers)).status_code == 200
                assert KEY not in str(fake.requests(CHAT)[-1]["headers"])
                assert (await fleet.client.get("/v1/models", headers=headers)).status_code == 200
        assert await fleet.total("quantgate_requests_total", code="401") == 4
