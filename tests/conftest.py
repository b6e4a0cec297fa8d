"""Settings for all tests."""

import asyncio
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import settings

from tests.bytecode import use_bytecode

# No deadline: on a shared machine a slow example is not a defect.
settings.register_profile("quantgate", deadline=None)
settings.load_profile("quantgate")
use_bytecode()

# Before pytest-timeout's signal, which the event loop waits through.
EARLIER_SECONDS = 5.0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a parallel run start the files that wait for minutes first, then those with the most tests.

    A file stays in one process: one that began last would be waited for alone.
    """
    for item in items:
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.obj):
            item.obj = limited(item.obj, timeout_seconds(item) - EARLIER_SECONDS)
    if not hasattr(config, "workerinput"):
        return
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("long_wait") is None, -tests[item.path]))


def timeout_seconds(item: pytest.Item) -> float:
    """How long a test may take, by its marker or the settings; endless where that is 0."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0] if marker else item.config.getini("timeout"))
    return seconds or float("inf")


def limited(test: Callable[..., Coroutine[Any, Any, None]], seconds: float) -> Callable[..., Coroutine[Any, Any, None]]:
    """Limit the time of a test that is a coroutine function."""

    @functools.wraps(test)
    async def limited_test(*arguments: Any, **fixtures: Any) -> None:
        async with asyncio.timeout(seconds if seconds < float("inf") else None):
            await test(*arguments, **fixtures)

    return limited_test
