"""Settings for all tests."""

from collections import Counter

import pytest
from hypothesis import settings

from tests.bytecode import use_bytecode

# No deadline: on a shared machine a slow example is not a defect.
settings.register_profile("quantgate", deadline=None)
settings.load_profile("quantgate")
use_bytecode()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a parallel run start the files that wait for minutes first, then those with the most tests.

    A file stays in one process: one that began last would be waited for alone.
    """
    if not hasattr(config, "workerinput"):
        return
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("long_wait") is None, -tests[item.path]))
