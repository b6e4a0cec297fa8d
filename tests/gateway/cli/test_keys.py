"""The verb `keys`, as a shell sees it."""

import asyncio
import json
import os
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from config.errors import ConfigError
from gateway.cli.keys import parse_expiry
from gateway.keys import Caller, read_keys
from quantgate import main
from tests.fakes.running import DEADLINE_SECONDS, ROOT
from tests.gateway.cli.test_serve import run

NOW = datetime(2027, 1, 1, tzinfo=UTC)
KEY = re.compile(r"qg-[\w-]{43}\n")

TERMS = [
    *("--alias", "smol", "lo", "--floor", "top1_agreement=0.97", "kl_p99=0.5", "--requests-per-minute", "60"),
    *("--tokens-per-minute", "1000", "--concurrency", "2", "--max-tokens", "512", "--expires", "2099-01-01"),
    *("--may", "chat_template", "--may", "kv_transfer_params"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the keys are."""
    return tmp_path / "keys.yaml"


def holder(path: Path, key: str) -> Caller:
    """Whose key it is."""
    return read_keys(path).authenticate({b"authorization": f"Bearer {key.strip()}".encode()}, NOW.timestamp())


def test_keys_are_handed_out(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The key alone is on stdout; a second one of the name is refused."""
    assert main(["keys", "create", "alice", "--file", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert KEY.fullmatch(out)
    assert holder(path, out) == Caller("alice")
    assert main(["keys", "create", "alice", "--file", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"{path}: there is already a key named 'alice'; choose another name, or use `quantgate keys rotate alice`\n"
    )


def test_every_option_reaches_the_caller(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a key may is said when it is made, listed for people and for programs, and held against requests."""
    assert main(["keys", "create", "alice", "--file", str(path), *TERMS]) == 0
    caller = holder(path, capsys.readouterr().out)
    assert caller.aliases == frozenset({"smol", "lo"})
    assert caller.may == frozenset({"chat_template", "kv_transfer_params"})
    assert (caller.floor.top1_agreement, caller.floor.kl_p99) == (0.97, 0.5)
    limits = (caller.requests_per_minute, caller.tokens_per_minute, caller.concurrency, caller.max_tokens)
    assert limits == (60, 1000, 2, 512)
    assert main(["keys", "list", "--file", str(path)]) == 0
    digest = yaml.safe_load(path.read_text())["alice"]["sha256"]
    assert capsys.readouterr().out.splitlines() == [
        "NAME   SHA256    EXPIRES               LIMITS",
        f"alice  {digest[:8]}  2099-01-01T00:00:00Z  aliases=smol,lo floor.top1_agreement=0.97 floor.kl_p99=0.5 "
        "requests_per_minute=60 tokens_per_minute=1000 concurrency=2 max_tokens=512 "
        "may=chat_template,kv_transfer_params",
    ]


def test_keys_are_listed(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each key with the beginnings of its digests and whether it has expired; never more of them."""
    path.write_text(
        yaml.safe_dump(
            {
                "old": {"sha256": "a" * 64, "expires": "2020-01-01", "aliases": []},
                "new": {"sha256": ["b" * 64, "c" * 64]},
            },
            sort_keys=False,
        )
    )
    path.chmod(0o640)
    assert main(["keys", "list", "--file", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "NAME  SHA256             EXPIRES                         LIMITS",
        "old   aaaaaaaa           2020-01-01T00:00:00Z (expired)  aliases=none",
        "new   bbbbbbbb,cccccccc  never                           none",
    ]
    assert err == f"{path}: readable by other users (mode 640); run chmod 600 {path}\n"
    path.chmod(0o600)
    assert main(["keys", "list", "--json", "--file", str(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)[0] == {
        "name": "old",
        "sha256": ["aaaaaaaa"],
        "aliases": [],
        "shadow": True,
        "floor": {},
        "requests_per_minute": None,
        "tokens_per_minute": None,
        "concurrency": None,
        "max_tokens": None,
        "expires": "2020-01-01T00:00:00Z",
        "may": [],
        "expired": True,
    }
    assert [(row["name"], row["sha256"], row["expired"]) for row in json.loads(out)[1:]] == [
        ("new", ["bbbbbbbb", "cccccccc"], False)
    ]


def test_a_key_is_replaced_and_taken_back(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rotating prints a second key; the old one goes alone, or the name with all it has."""
    where = ["--file", str(path)]
    keys = []
    for verb in ("create", "rotate"):
        assert main(["keys", verb, "alice", *where]) == 0
        keys.append(capsys.readouterr().out)
    assert [holder(path, key).name for key in keys] == ["alice", "alice"]
    assert main(["keys", "rotate", "alice", *where]) == 2
    assert "already has two keys" in capsys.readouterr().err
    assert main(["keys", "revoke", "alice", "--old", *where]) == 0
    assert holder(path, keys[1]).name == "alice"
    assert main(["keys", "revoke", "alice", *where]) == 0
    assert capsys.readouterr() == ("", "")
    assert read_keys(path).names() == frozenset()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["revoke", "alice"], "keys can't be read: No such file or directory"),
        (["list"], "keys can't be read: No such file or directory"),
        (["create", "a b"], "'a b' is not a valid key name"),
        (
            ["create", "a", "--floor", "top1_agreement"],
            "floor: 'top1_agreement' is not MEASURE=NUMBER; write top1_agreement=0.97",
        ),
        (
            ["create", "a", "--floor", "top1=1"],
            "floor.top1: unknown key; known: kl_mean, kl_p99, length_ratio, perplexity_ratio, top1_agreement",
        ),
        (["create", "a", "--floor", "kl_mean=x"], "floor.kl_mean: must be a number"),
        (["create", "a", "--concurrency", "0", "--may", "X"], "may.0: is not the name of a field"),
        (
            ["create", "a", "--concurrency", "0", "--may", "X"],
            "concurrency: must be at least 1",
        ),
        (["create", "a", "--expires", "soon"], "expires: 'soon' is not a date; write 2027-01-31 or 30d"),
        (["create", "a", "--expires", "2020-01-01"], "expires: '2020-01-01' is in the past; choose a later date"),
    ],
)
def test_what_cannot_be_done(path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    """Every problem is told on stderr, the exit code is 2, and no file is made."""
    assert main(["keys", *arguments, "--file", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(
    "text, after",
    [
        ("30d", timedelta(days=30)),
        ("12h", timedelta(hours=12)),
        ("2027-01-31", timedelta(days=30)),
        ("2027-01-01T00:00:01Z", timedelta(seconds=1)),
    ],
)
def test_times_to_come(text: str, after: timedelta) -> None:
    """A key ends so much later, or at a date."""
    assert parse_expiry(text, NOW) == NOW + after


@pytest.mark.parametrize("text", ["0d", "9999999999d", "-1d", "30", "30m", "", "2027-01-01"])
def test_times_that_are_none(text: str) -> None:
    """What is past, or no time, is refused."""
    with pytest.raises(ConfigError, match="quantgate keys create: expires: "):
        parse_expiry(text, NOW)


@pytest.mark.asyncio(loop_scope="session")
async def test_a_reader_that_has_enough(path: Path) -> None:
    """A pipe that nobody reads is no failure."""
    path.write_text("{}")
    path.chmod(0o600)
    reading, writing = os.pipe()
    os.close(reading)
    argv = [sys.executable, str(ROOT / "quantgate.py"), "keys", "list", "--file", str(path)]
    process = await asyncio.create_subprocess_exec(*argv, cwd=ROOT, stdout=writing, stderr=asyncio.subprocess.PIPE)
    os.close(writing)
    async with asyncio.timeout(DEADLINE_SECONDS):
        _, err = await process.communicate()
    assert (process.returncode, err) == (0, b"")


@pytest.mark.asyncio(loop_scope="session")
async def test_keys_from_a_shell(path: Path) -> None:
    """Keys that several shells make at once are all there; help says what becomes of comments."""
    made = await asyncio.gather(*(run("keys", "create", f"user-{number}", "--file", path) for number in range(4)))
    assert [(each.code, each.err) for each in made] == [(0, "")] * 4
    assert {holder(path, each.out).name for each in made} == {f"user-{number}" for number in range(4)}
    listed, gone, helped = await asyncio.gather(
        run("keys", "list", "--json", "--file", path), run("keys", "revoke", "usr-1", "--file", path), run("keys", "-h")
    )
    assert (listed.code, len(json.loads(listed.out))) == (0, 4)
    assert (gone.code, gone.out) == (2, "")
    assert "there is no key named 'usr-1'; did you mean 'user-1'?" in gone.err
    assert "without its comments" in " ".join(helped.out.split())
