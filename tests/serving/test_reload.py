"""When a configuration is taken over, and what is told of it."""

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from config.errors import ConfigError, ReloadRefused
from serving.app import read_wanted, replicas_alone
from serving.errors import UpdateFailed
from serving.registry import Registry
from serving.reload import Reload
from serving.replica import State
from tests.fakes.running import eventually
from tests.serving.supervised import fake_machine, model_directory


async def test_a_changed_file_and_sighup_are_taken_once_each(tmp_path: Path) -> None:
    """A look that finds nothing new does nothing; a reload that fails is told, and the next one is tried."""
    path, outcomes, problems = tmp_path / "file", list[str](), list[Exception]()
    path.write_text("one")
    began = asyncio.Event()

    async def apply(confirmed: bool) -> None:
        assert not confirmed
        began.set()
        if problems:
            raise problems.pop()

    async with Reload(lambda: [path], apply, outcomes.append, every_seconds=0.01):
        path.write_text("two, longer")
        await eventually(lambda: outcomes == ["applied"])
        problems.append(ConfigError("line 1: no"))
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: outcomes[1:] == ["refused"])
        problems.append(UpdateFailed("int4-1 doesn't start"))
        path.write_text("three, longer still")
        await eventually(lambda: outcomes[2:] == ["failed"])
        problems.append(ZeroDivisionError("a defect"))
        path.unlink()
        await eventually(lambda: outcomes[3:] == ["failed"])
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: outcomes[4:] == ["applied"])


@dataclass(slots=True)
class Refusing:
    """Refuses every configuration that is not confirmed, and counts; `now` is what its clock shows."""

    refused: int = 0
    applied: int = 0
    now: float = 0.0

    async def apply(self, confirmed: bool) -> None:
        """Refuse, or apply."""
        if not confirmed:
            self.refused += 1
            raise ReloadRefused("quantgate.yaml: nothing would remain")
        self.applied += 1

    async def signal(self) -> None:
        """Send SIGHUP, and wait until it was handled."""
        before = self.refused + self.applied
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: self.refused + self.applied > before)


async def test_a_second_sighup_confirms(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What would leave nothing is refused, also as a changed file; a second SIGHUP within 10 s applies it."""
    path, reloading = tmp_path / "file", Refusing()
    path.write_text("one")
    async with Reload(lambda: [path], reloading.apply, every_seconds=0.01, clock=lambda: reloading.now):
        path.write_text("two, longer")
        await eventually(lambda: reloading.refused == 1)
        await eventually(lambda: "apply it with two SIGHUPs within 10 s (quantgate reload --force)" in caplog.text)
        await reloading.signal()
        assert (reloading.refused, reloading.applied) == (2, 0)
        how = "restore the file, or apply it with another SIGHUP within 10 s (quantgate reload --force)"
        assert f"nothing would remain; {how}" in caplog.text
        reloading.now = 10.0
        await reloading.signal()
        assert (reloading.refused, reloading.applied) == (2, 1)
        await reloading.signal()
        assert (reloading.refused, reloading.applied) == (3, 1), "a confirmation is for one reload"


async def test_a_late_sighup_and_another_file_confirm_nothing(tmp_path: Path) -> None:
    """The second SIGHUP must come within 10 s, and be about the same files."""
    path, reloading = tmp_path / "file", Refusing()
    path.write_text("one")
    async with Reload(lambda: [path], reloading.apply, every_seconds=60, clock=lambda: reloading.now):
        await reloading.signal()
        reloading.now = 10.1
        await reloading.signal()
        path.write_text("two, longer")
        await reloading.signal()
        assert (reloading.refused, reloading.applied) == (3, 0)
        await reloading.signal()
        assert (reloading.refused, reloading.applied) == (3, 1)


async def test_what_is_refused_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says what was wrong, and that nothing changed."""

    async def apply(confirmed: bool) -> None:
        raise ConfigError("quantgate.yaml:3:1: aliases: unknown key")

    async with Reload(list, apply):
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: "stays in force: quantgate.yaml:3:1: aliases: unknown key" in caplog.text)


def write(path: Path, folder: Path, **tables: object) -> None:
    """Replace a configuration file by one with a variant and these tables."""
    variants = {"own": {"path": str(model_directory(folder / "own"))}}
    path.write_text(yaml.safe_dump({"variants": variants, **tables}))


async def test_serve_keeps_its_last_replicas_until_it_is_told_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file without replicas of this machine is refused, one that is empty always; options that wait are named."""
    path, registry = tmp_path / "quantgate.yaml", Registry()
    write(path, tmp_path, replicas=[{"variant": "own"}])

    def states() -> list[State]:
        return [status.state for status in registry.snapshot()]

    async with replicas_alone(read_wanted(path), fake_machine(tmp_path), registry, tmp_path, path):
        await eventually(lambda: states() == [State.READY])
        path.write_text("")
        await eventually(lambda: "quantgate.yaml:1:1: is empty" in caplog.text)
        write(path, tmp_path, serving={"start_attempts": 9})
        await eventually(lambda: caplog.text.count("no replica that runs here would remain") == 1)
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: caplog.text.count("no replica that runs here would remain") == 2)
        assert states() == [State.READY]
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: states() == [])
        assert "serving has changed; it takes effect at the next start" in caplog.text
