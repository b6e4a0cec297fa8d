"""Revisions of an alias: what a rollout recorded, and what gateways make of it together with the configuration. Pure.

=====================  =============================================================================================
rollout of the alias   ladder in force
=====================  =============================================================================================
active                 the recorded one; edits of the configuration wait for its end
none is active         the recorded one, while the configuration has the ladder of that time or the recorded one
none is active         else the configured one: it was edited after the last rollout
none, nothing recorded the configured one
=====================  =============================================================================================
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

import msgspec

from config.schema import AliasSettings
from gateway.deployment import Deployment
from gateway.rollout.machine import Phase, Split
from gateway.rollout.replica_use import ReplicaUse
from serving.state.demands import with_demands
from serving.state.rollout_records import RevisionRecord, RolloutSnapshot

Ladder = tuple[str, ...]


class AliasRevision(msgspec.Struct, frozen=True):
    """The ladders of an alias at one revision, and their weight; `configured` is the one in the configuration then.

    `canary` None: every conversation uses `stable`. Otherwise a share of `weight` is drawn to `canary`, in a step.
    """

    configured: Ladder
    stable: Ladder
    canary: Ladder | None = None
    weight: float = 0.0
    step: int = 0
    new: str = ""
    old: str = ""
    shadow: float = 0.0  # the share of the old variant's answers that are scored on the new one

    @classmethod
    def of(cls, split: Split, configured: Ladder, new: str, old: str) -> "AliasRevision":
        """Record how an alias divides its conversations."""
        return cls(configured, split.stable, split.canary, split.weight, split.step, new, old, split.shadow)

    def document(self) -> str:
        """Encode it."""
        return msgspec.json.encode(self).decode()


_DECODER = msgspec.json.Decoder(AliasRevision)


def read_revision(record: RevisionRecord) -> AliasRevision:
    """Decode a recorded revision."""
    return _DECODER.decode(record.document)


def ladder_in_force(
    configured: Ladder, revision: AliasRevision | None, variants: Collection[str], *, active: bool
) -> Ladder:
    """Return the ladder that holds; see the table above. A recorded variant that is not configured holds nothing."""
    if revision is None or not set(revision.stable) <= set(variants):
        return configured
    return revision.stable if active or configured in (revision.configured, revision.stable) else configured


def revisions_of(snapshot: RolloutSnapshot) -> dict[str, AliasRevision]:
    """The latest revisions by alias."""
    return {record.alias: read_revision(record) for record in snapshot.aliases}


def in_force(deployment: Deployment, snapshot: RolloutSnapshot) -> Deployment:
    """Return a configuration with the recorded ladders, and with the replicas that rollouts want."""
    if not snapshot.aliases and not snapshot.demands:
        return deployment
    settings, revisions = deployment.settings, revisions_of(snapshot)
    active = {record.alias for record in snapshot.active}
    aliases = {
        name: _with_ladder(
            alias, ladder_in_force(alias.ladder, revisions.get(name), deployment.variants, active=name in active)
        )
        for name, alias in settings.aliases.items()
    }
    replicas = with_demands(settings.replicas, snapshot.demands, deployment.variants)
    return replace(deployment, settings=settings.model_copy(update={"aliases": aliases, "replicas": replicas}))


def use_of(deployment: Deployment, snapshot: RolloutSnapshot, *, without: str | None = None) -> ReplicaUse:
    """Return what aliases and their active rollouts use, all of them or all but one alias.

    A rollout in preflight needs its new variant no more than one that has not been started: it demands that later.
    """
    bases = {name: base for name, (base, _) in deployment.settings.loras.items()}
    revisions = revisions_of(snapshot)
    rollouts = [each for each in snapshot.active if each.phase != Phase.PREFLIGHT and each.alias != without]
    active = [revisions[each.alias] for each in rollouts if each.alias in revisions]
    aliases = in_force(deployment, snapshot).settings.aliases
    used = [name for alias, each in aliases.items() if alias != without for name in each.ladder]
    # A promoted rollout keeps its old variant for the way back, while that is in no ladder.
    used += [name for each in active for name in (*each.stable, *(each.canary or ()), each.new, each.old)]
    plain = ReplicaUse(bases=bases)
    return ReplicaUse(plain.bases_of(used), plain.bases_of(each.new for each in active), bases)


def splits(deployment: Deployment, snapshot: RolloutSnapshot) -> Mapping[str, tuple[str, AliasRevision]]:
    """The active rollout and the revision of each alias whose conversations are drawn to two arms."""
    revisions = revisions_of(snapshot)
    found = {}
    for record in snapshot.active:
        revision = revisions.get(record.alias)
        if revision is None or revision.canary is None or record.alias not in deployment.settings.aliases:
            continue
        if set(revision.canary) <= deployment.variants.keys():
            found[record.alias] = (record.id, revision)
    return found


def _with_ladder(alias: AliasSettings, ladder: Ladder) -> AliasSettings:
    return alias if ladder == alias.ladder else alias.model_copy(update={"ladder": ladder})
