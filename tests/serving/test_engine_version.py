"""Supported minor releases of vLLM, and the warning about any other."""

import pytest

from serving.engine_version import is_supported, version_warning


@pytest.mark.parametrize(
    "installed,word",
    [
        ("0.32.0", None),
        ("0.32.1+cpu", None),
        ("0.33.0rc1", None),
        ("0.31.2", "older than the versions that quantgate supports, 0.32 and 0.33"),
        ("0.34.0", "newer than"),
        ("1.0", "newer"),
        ("dev", "no version number"),
    ],
)
def test_version_warning(installed: str, word: str | None) -> None:
    """There is no warning about a supported version, and one line about any other."""
    assert is_supported(installed) == (word is None)
    warning = version_warning(installed)
    assert (warning is None) if word is None else (warning is not None and word in warning and "\n" not in warning)
