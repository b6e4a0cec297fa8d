"""Programs that the tests of the chart run."""

from collections.abc import Iterator

import pytest

from tests.deploy.chart import Chart, NoTools, unpacked_chart


@pytest.fixture(scope="session")
def chart() -> Iterator[Chart]:
    """The chart, and the real helm and kubectl; skipped where the package that has both is not installed."""
    try:
        with unpacked_chart() as found:
            yield found
    except NoTools as error:
        pytest.skip(str(error))
