"""Which versions of vLLM are supported, and the warning about others.

0.32 runs in the tests. Of 0.33, the sources have all that quantgate relies on (`python -m tests.contract.vllm`).
"""

import re

SUPPORTED = ((0, 32), (0, 33))


def is_supported(installed: str) -> bool:
    """Whether a version of vLLM, such as `0.32.1+cpu`, is of a supported minor release."""
    return _minor_release(installed) in SUPPORTED


def version_warning(installed: str) -> str | None:
    """Return one line about a vLLM that is older or newer than the supported versions, or None."""
    release = _minor_release(installed)
    if release is None:
        return f"vLLM {installed!r} has no version number that can be compared; quantgate supports {supported_text()}"
    if release in SUPPORTED:
        return None
    age = "older" if release < SUPPORTED[0] else "newer"
    return (
        f"vLLM {installed} is {age} than the versions that quantgate supports, {supported_text()}; options may differ"
    )


def supported_text() -> str:
    """Return the supported versions as text."""
    return " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)


def _minor_release(installed: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)\.(\d+)", installed)
    return (int(match[1]), int(match[2])) if match else None
