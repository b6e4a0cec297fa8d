"""Checks before a launch: whatever would fail after minutes of loading, and files whose checksums have changed.

`reading` reads facts about model and machine. The rules are pure: facts in, reasons for a refusal out.
"""

from serving.preflight.refusals import check_placement, check_servable, refuse_altered

__all__ = ["check_placement", "check_servable", "refuse_altered"]
