"""Recorded revisions and the configuration: which ladder is in force, what runs, and who may pin what."""

from dataclasses import replace

import pytest

from gateway.errors import NotAllowed, UnknownModel
from gateway.keys import Caller
from gateway.rollout.machine import Split
from gateway.rollout.plan import PlanSettings
from gateway.rollout.preflight import compare_quality, plan_problems
from gateway.rollout.revision import AliasRevision, in_force, ladder_in_force, splits, use_of
from gateway.routing.target import Catalog
from serving.state.rollout_records import EMPTY, Demand, RevisionRecord, RolloutRecord
from tests.gateway.fleet import CONFIG, deployment
from tests.gateway.rollout.plans import plan

VARIANTS = {"old", "new", "low"}
RECORDED = AliasRevision(("old", "low"), ("new", "low"))


@pytest.mark.parametrize(
    "configured, active, expected",
    [
        (("old", "low"), False, ("new", "low")),
        (("new", "low"), False, ("new", "low")),
        (("low",), False, ("low",)),
        (("low",), True, ("new", "low")),
    ],
)
def test_the_ladder_in_force(configured: tuple[str, ...], active: bool, expected: tuple[str, ...]) -> None:
    """The recorded one, until the configuration is edited after the rollout."""
    assert ladder_in_force(configured, RECORDED, VARIANTS, active=active) == expected


def test_without_a_record_the_configuration_holds() -> None:
    """So it does if a recorded variant is not configured any more."""
    assert ladder_in_force(("old",), None, VARIANTS, active=True) == ("old",)
    assert ladder_in_force(("old",), RECORDED, {"old", "low"}, active=True) == ("old",)


def test_in_force() -> None:
    """Ladders of aliases, and replicas; an alias without a rollout is left as it is."""
    made = deployment(
        {"replicas": [{"variant": "hi"}], "aliases": {"smol": {"ladder": ["hi", "lo"]}, "x": {"ladder": ["lo"]}}}
    )
    revision = AliasRevision.of(Split(("hi", "lo"), ("odd", "hi", "lo"), 0.25, 2), ("hi", "lo"), "odd", "hi")
    record = RolloutRecord("r-1", "smol", "{}", "{}", "canary", True, 3, "anna", 0.0)
    snapshot = replace(
        EMPTY,
        active=(record,),
        aliases=(RevisionRecord("smol", 7, revision.document(), "", "anna", 0.0, "r-1"),),
        demands=(Demand("odd", "hi", True, "r-1"),),
    )
    found = in_force(made, snapshot)
    assert found.settings.aliases["smol"].ladder == ("hi", "lo")
    assert found.settings.aliases["x"] is made.settings.aliases["x"]
    assert [each.variant for each in found.settings.replicas] == ["hi", "odd"]
    assert splits(found, snapshot) == {"smol": ("r-1", revision)}
    assert splits(found, replace(snapshot, active=())) == {}
    gone = replace(made, variants={name: each for name, each in made.variants.items() if name != "odd"})
    assert splits(gone, snapshot) == {}


def test_alias_at_variant_belongs_to_the_alias() -> None:
    """It pins a variant of the ladder, or of a rollout, whatever the floor; a key that has the alias may send it."""
    made = deployment()
    catalog = Catalog(made.settings.aliases, made.variants)
    target = catalog.resolve("strict@lo")
    assert (target.name, target.pinned, [rung.name for rung in target.permitted]) == ("strict@lo", True, ["lo"])
    for name in ("strict@odd", "nobody@lo", "lo@lo", "strict@"):
        with pytest.raises(UnknownModel):
            catalog.resolve(name)
    catalog.pin("strict", ("odd",))
    assert catalog.resolve("strict@odd").rungs[0].name == "odd"
    Caller("key", frozenset({"strict"})).check_model("strict@lo")
    with pytest.raises(NotAllowed):
        Caller("key", frozenset({"smol"})).check_model("strict@lo")


def test_preflight_names_what_is_wrong() -> None:
    """Unknown aliases, variants and changed content; a plan for what is there passes."""
    made = deployment({"aliases": {"smol": {"ladder": ["hi", "lo"]}}})
    wrong = plan(("hi", "lo"), "nwe", "hi")
    aliases = made.settings.aliases
    assert plan_problems(wrong, made.variants, {}, compare_quality) == (
        "smol: there is no such alias in the configuration",
    )
    assert plan_problems(wrong, made.variants, aliases, compare_quality) == (
        "nwe: there is no such variant in the configuration",
    )
    changed = plan(("hi", "lo"), "odd", "hi")
    (problem,) = plan_problems(changed, made.variants, aliases, compare_quality)
    assert "its content has changed since the rollout was started" in problem
    assert PlanSettings().compare


CANARY = AliasRevision.of(Split(("hi",), ("odd", "hi"), 0.25, 2), ("hi",), "odd", "hi")
KEPT = AliasRevision.of(Split(("odd",)), ("hi",), "odd", "hi")


@pytest.mark.parametrize(
    "phase, revision, without, in_use, new",
    [
        ("preflight", CANARY, None, {"hi", "lo", "mid"}, set()),
        ("starting", CANARY, None, {"hi", "lo", "mid", "odd"}, {"odd"}),
        ("keeping", KEPT, None, {"hi", "lo", "mid", "odd"}, {"odd"}),
        ("keeping", KEPT, "smol", {"lo", "mid"}, set()),
        ("keeping", KEPT, "x", {"hi", "mid", "odd"}, {"odd"}),
        ("", KEPT, None, {"lo", "mid", "odd"}, set()),  # it has ended
    ],
)
def test_whose_replicas_are_in_use(
    phase: str, revision: AliasRevision, without: str | None, in_use: set[str], new: set[str]
) -> None:
    """Those of ladders in force, of active rollouts after preflight, and of the bases of adapters."""
    variants = {**CONFIG["variants"], "mid": {**CONFIG["variants"]["mid"], "lora": {"law": {}}}}
    aliases = {"smol": {"ladder": ["hi"]}, "x": {"ladder": ["lo"]}, "tuned": {"ladder": ["mid-law"]}}
    made = deployment({"variants": variants, "aliases": aliases})
    record = RolloutRecord("r-1", "smol", "{}", "{}", phase, True, 3, "anna", 0.0)
    recorded = RevisionRecord("smol", 7, revision.document(), "", "anna", 0.0, "r-1")
    found = use_of(made, replace(EMPTY, active=(record,) if phase else (), aliases=(recorded,)), without=without)
    assert (set(found.in_use), set(found.new)) == (in_use, new)
