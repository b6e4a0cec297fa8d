"""Refuse before launch what would fail after minutes of loading, and what is no longer what was sealed.

Facts are read in one place (`reading`), judged in others, which are pure: a model and a machine in, reasons out.
"""

from serving.preflight.refusals import check_placement, check_servable, refuse_altered

__all__ = ["check_placement", "check_servable", "refuse_altered"]
