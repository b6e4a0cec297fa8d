"""Which vLLM is tested, and what to say about another one."""

import re

TESTED = (0, 32)


def version_warning(installed: str) -> str | None:
    """One line about a vLLM that is older or newer than what quantgate is tested with, or None."""
    match = re.match(r"(\d+)\.(\d+)", installed)
    tested = ".".join(map(str, TESTED))
    if match is None:
        return f"vLLM {installed!r} has no version number that can be compared; quantgate is tested with {tested}.x"
    found = (int(match[1]), int(match[2]))
    if found == TESTED:
        return None
    age = "older" if found < TESTED else "newer"
    return f"vLLM {installed} is {age} than {tested}.x, which quantgate is tested with; options may differ"
