"""Refuse before launch what would fail after minutes of loading, and what is no longer what was sealed.

Facts are read in one place (`reading`), judged in others, which are pure: a model and a machine in, reasons out.
"""

from serving.preflight.refusals import refuse_altered, refuse_fleet, refuse_hopeless

__all__ = ["refuse_altered", "refuse_fleet", "refuse_hopeless"]
