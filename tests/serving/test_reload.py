"""When a configuration is taken over, and what is told of it."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from config.errors import ConfigError
from serving.errors import UpdateFailed
from serving.reload import Reload
from tests.fakes.running import eventually


async def test_a_changed_file_and_sighup_are_taken_once_each(tmp_path: Path) -> None:
    """A look that finds nothing new does nothing; a reload that fails is told, and the next one is tried."""
    path, outcomes, problems = tmp_path / "file", list[str](), list[Exception]()
    path.write_text("one")
    began = asyncio.Event()

    async def apply() -> None:
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


async def test_what_is_refused_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says what was wrong, and that nothing changed."""

    async def apply() -> None:
        raise ConfigError("quantgate.yaml:3:1: aliases: unknown key")

    async with Reload(list, apply):
        os.kill(os.getpid(), signal.SIGHUP)
        await eventually(lambda: "stays in force: quantgate.yaml:3:1: aliases: unknown key" in caplog.text)
