"""The verb `rollout`, as a shell sees it."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.rollout.hooks import payload, run_hooks
from gateway.rollout.machine import Event, Phase, Readiness
from gateway.rollout.operating import Operator
from gateway.rollout.plan import Hook
from gateway.rollout.record import Happening, change_of
from gateway.rollout.replica_use import ReplicaUse
from quantgate import main
from serving.state.rollout_records import LogEntry
from tests.fakes.running import running_fake
from tests.gateway.wire import answering, scripted, whole

QUALITY = {"kl_mean": 0.0, "top1_agreement": 0.97, "perplexity_ratio": 1.0}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration with a state database that nobody has made yet."""
    path = tmp_path / "quantgate.yaml"
    settings = {
        "gateway": {"state": "sqlite:///state.db"},
        "variants": {
            "old": {"precision": "int4", "quality": QUALITY},
            "new": {"precision": "int4", "quality": QUALITY},
            "bad": {"precision": "int4", "quality": {**QUALITY, "top1_agreement": 0.5}},
            "low": {"precision": "int8"},
        },
        "aliases": {"smol": {"ladder": ["old", "low"], "floor": {"top1_agreement": 0.9}, "trust_declared": True}},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def run(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> tuple[int, Any, str]:
    """Run a verb with --json; its code, what it printed, and its messages."""
    code = main(["rollout", *words, "--config", str(config), "--json"])
    out, err = capsys.readouterr()
    return code, json.loads(out) if out else None, err


def test_plan(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    """It changes nothing, and makes no database."""
    code, told, _ = run(capsys, config, "plan", "smol", "new", "--rate", "10", "--steps", "5,100")
    assert code == 0
    assert (told["plan"]["old"], told["plan"]["canary"], told["plan"]["final"]) == (
        *("old", ["new", "old", "low"]),
        ["new", "low"],
    )
    assert len(told["expected_minutes"]) == 2
    assert told["problems"] == []
    assert not (config.parent / "state.db").exists()


async def test_plan_beside_something_else(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    """Metrics that are none give no rate, and no traceback."""
    page = whole(b'quantgate_requests_total{alias="smol"} many\n', kind="text/plain")
    async with scripted(answering(page), polled=True) as other:
        settings = yaml.safe_load(config.read_text())
        settings["gateway"]["admin"] = other.url.removeprefix("http://")
        config.write_text(yaml.safe_dump(settings))
        code, told, _ = await asyncio.to_thread(run, capsys, config, "plan", "smol", "new")
    assert (code, told["conversations_per_second"]) == (0, None)


@pytest.mark.parametrize(
    "words, code, message",
    [
        (["start", "smol", "nwe"], 2, "there is no variant 'nwe'"),
        (["start", "small", "new"], 2, "there is no alias 'small'"),
        (["start", "smol"], 2, "name the new variant, or the new ladder"),
        (["start", "smol", "old"], 2, "is in the ladder of smol already"),
        (["start", "smol", "new", "--steps", "5,1"], 2, "steps must increase"),
        (["start", "smol", "bad"], 3, "does not meet the floor of smol: top1_agreement 0.5"),
        (["plan", "smol", "bad", "--rate", "1"], 3, ""),
        (["status", "smol"], 1, "there is no rollout of smol"),
        (["pause", "smol"], 1, "there is no rollout of smol"),
        (["undo", "smol"], 1, "no earlier revision"),
        (["start", "smol", "--ladder", "old,low"], 2, "is old, low already"),
    ],
)
def test_refusals(capsys: pytest.CaptureFixture[str], config: Path, words: list[str], code: int, message: str) -> None:
    """Each has its exit code, and says what to do."""
    got, _, err = run(capsys, config, *words)
    assert (got, message in err) == (code, True), err


def test_the_life_of_a_rollout(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    """Start, a second operator, pause, resume, abort, status, history, retry."""
    code, started, _ = run(capsys, config, "start", "smol", "new", "--reason", "ticket 7")
    assert code == 0
    code, _, err = run(capsys, config, "start", "smol", "new")
    assert code == 4
    assert f"already runs rollout {started['rollout']} of smol" in err
    assert run(capsys, config, "pause", "smol", "--reason", "lunch")[1]["phase"] == "paused"
    code, status, _ = run(capsys, config, "status", "smol")
    assert (code, status["phase"], status["pause"], status["weight"], status["driver"]) == (
        0,
        "paused",
        "lunch",
        0,
        None,
    )
    assert run(capsys, config, "resume", "smol")[1]["phase"] == "preflight"
    assert run(capsys, config, "promote", "smol")[0] == 1
    code, _, err = run(capsys, config, "promote", "smol", "--full")
    assert code == 1
    assert "new has no ready replica" in err
    assert run(capsys, config, "abort", "smol", "--reason", "wrong")[1]["phase"] == "failed"
    code, status, _ = run(capsys, config, "status", "smol")
    assert (code, status["failure"]) == (3, "abort: wrong")
    code, history, _ = run(capsys, config, "history", "smol")
    assert [event["event"] for event in history["events"]] == ["start", "pause", "resume", "abort"]
    assert history["events"][0]["why"] == "ticket 7"
    assert [revision["weight"] for revision in history["revisions"]] == [0.0, 0.0]
    assert run(capsys, config, "retry", "smol")[0] == 0
    assert main(["rollout", "status", "smol", "--config", str(config)]) == 0
    assert "old -> new" in capsys.readouterr().out
    assert main(["rollout", "history", "smol", "--config", str(config)]) == 0
    assert "start -> preflight: retry of" in capsys.readouterr().out


async def test_undo(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    """To the ladder before the rollout, at once, because the old variant answers at its address."""
    async with running_fake() as old:
        settings = yaml.safe_load(config.read_text())
        settings["replicas"] = [{"variant": "old", "url": old.url}]
        config.write_text(yaml.safe_dump(settings))
        assert run(capsys, config, "start", "smol", "new")[0] == 0
        operator = Operator.of(config)
        for event in (Event.VERIFIED, Event.READY, Event.PROMOTE_FULL, Event.DEADLINE, Event.DEADLINE):
            record = operator.latest("smol")
            what = Happening(event, "a test", "anna", time.time())
            ready = Readiness(old=True, new=True)
            _, change = change_of(record, what, ready, ("old", "low"), ReplicaUse())
            operator.database.change(record.id, record.version, change, "anna", time.time(), None)
        assert operator.latest("smol").phase == Phase.DONE
        assert operator.ladder("smol") == ("new", "low")
        code, undone, _ = run(capsys, config, "undo", "smol", "--reason", "complaints")
        assert code == 0
        assert "old, low" in undone["undo"]
        assert operator.ladder("smol") == ("old", "low")
        number = run(capsys, config, "history", "smol")[1]["revisions"][-1]["revision"]
        assert number == 1
        operator.close()


# Hooks


ENTRY = LogEntry("smol", 1.0, "anna", "failed", "rolling_back", "errors", '{"canary": 3}', "r-1", 7)


async def test_hooks_are_told(tmp_path: Path) -> None:
    """A command has the entry on its stdin; one for other events is left out."""
    seen = tmp_path / "seen"
    told = Hook(command=("sh", "-c", f"cat > {seen}"))
    other = Hook(command=("false",), events=("passed",))
    assert await run_hooks([told, other], ENTRY) == ()
    assert json.loads(seen.read_bytes()) == json.loads(payload(ENTRY))
    assert json.loads(payload(ENTRY))["figures"] == {"canary": 3}


@pytest.mark.parametrize(
    "hook, problem",
    [
        (Hook(command=("sh", "-c", "echo broken >&2; exit 3")), "sh: exit code 3: broken"),
        (Hook(command=("/no/such/program",)), "No such file or directory"),
        (Hook(command=("sleep", "60"), timeout_seconds=0.1), "sleep: not done within 0.1 s"),
        (Hook(url="http://127.0.0.1:9/hook"), "http://127.0.0.1:9/hook: "),
    ],
)
async def test_hooks_that_fail_are_only_told(hook: Hook, problem: str) -> None:
    """They are bounded in time, and raise nothing."""
    (told,) = await run_hooks([hook], ENTRY)
    assert problem in told
