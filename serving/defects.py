"""The outermost loop of a task: a defect in one step must not be the last one."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def logged_defects(work: str) -> Iterator[None]:
    """Log an exception that nothing handles, and go on after the block; `work` is what it does, for the message."""
    try:
        yield
    except Exception:
        log.exception("%s has a defect", work)
