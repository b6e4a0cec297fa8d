"""Plans and states for tests."""

from typing import Any

from gateway.rollout.plan import PlanSettings, RolloutPlan, replacement

NOW = 1_800_000_000.0


def plan(ladder: tuple[str, ...] = ("old", "low"), new: str = "new", old: str = "old", **settings: Any) -> RolloutPlan:
    """A plan that replaces a variant of a ladder."""
    canary, final = replacement(ladder, new, old)
    return RolloutPlan(
        alias="smol",
        new=new,
        old=old,
        fingerprint="n1",
        old_fingerprint="o1",
        stable=ladder,
        canary=canary,
        final=final,
        settings=PlanSettings(**settings),
    )
