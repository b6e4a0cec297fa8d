"""One bytecode cache for all processes of a test run.

Compiling torch, transformers and vLLM takes longer than most tests that import them, and an installer need not have
compiled them. Python's own switch for writing bytecode may be off, too.
"""

import os
import sys
from pathlib import Path

from config.load import home_directory

VARIABLE = "PYTHONPYCACHEPREFIX"


def use_bytecode() -> None:
    """Have this process and its children read and write the cache, by default the one of quantgate's own children."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault(VARIABLE, str(home_directory() / "bytecode"))
    sys.dont_write_bytecode = False
    sys.pycache_prefix = os.environ[VARIABLE]


def share_bytecode(home: Path) -> None:
    """Link the cache into a home, where its replicas look for one: else each home compiles vLLM again."""
    cache, link = os.environ.get(VARIABLE), home / "bytecode"
    if cache and not link.exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        home.mkdir(parents=True, exist_ok=True)
        link.symlink_to(cache)
