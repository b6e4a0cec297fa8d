"""Which versions of vLLM are supported, and the warning about others.

0.32 runs in the tests. Of 0.33, the sources have all that quantgate relies on (`python -m tests.contract.vllm`).
"""

import re

SUPPORTED = ((0, 32), (0, 33))


def version_warning(installed: str) -> str | None:
    """Return one line about a vLLM that is older or newer than the supported versions, or None."""
    match = re.match(r"(\d+)\.(\d+)", installed)
    if match is None:
        return f"vLLM {installed!r} has no version number that can be compared; quantgate supports {supported_text()}"
    version = (int(match[1]), int(match[2]))
    if version in SUPPORTED:
        return None
    age = "older" if version < SUPPORTED[0] else "newer"
    return (
        f"vLLM {installed} is {age} than the versions that quantgate supports, {supported_text()}; options may differ"
    )


def supported_text() -> str:
    """Return the supported versions as text."""
    return " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
