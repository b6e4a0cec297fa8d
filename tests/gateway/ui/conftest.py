"""One browser, and one pair of engines, for all tests of the page."""

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser

from tests.gateway.ui.browser import running_browser
from tests.gateway.ui.scenario import Engines, rollout_in_canary, running_engines, state_in


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """A real Chromium."""
    async with running_browser() as started:
        yield started


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engines() -> AsyncIterator[Engines]:
    """Two fakes of vLLM."""
    async with running_engines() as running:
        yield running


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def recorded_rollout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the state database of a rollout half way; tests copy it."""
    folder = tmp_path_factory.mktemp("rollout")
    await rollout_in_canary(state_in(folder))
    return folder


@pytest.fixture
def state(recorded_rollout: Path, tmp_path: Path) -> str:
    """A state database of its own, with that rollout."""
    shutil.copytree(recorded_rollout, tmp_path, dirs_exist_ok=True)
    return state_in(tmp_path)
