"""What is said about vLLM versions."""

import pytest

from serving.engine_version import version_warning


@pytest.mark.parametrize(
    "installed,word",
    [
        ("0.32.0", None),
        ("0.32.1+cpu", None),
        ("0.31.2", "older than 0.32.x"),
        ("0.33.0rc1", "newer than 0.32.x"),
        ("1.0", "newer"),
        ("dev", "no version number"),
    ],
)
def test_version_warning(installed: str, word: str | None) -> None:
    """The tested version is silent; any other is told in one line."""
    warning = version_warning(installed)
    assert (warning is None) if word is None else (warning is not None and word in warning and "\n" not in warning)
