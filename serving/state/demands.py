"""The replicas that a configuration and rollouts want together. Pure."""

from collections.abc import Collection, Iterable

from config.schema import ReplicaSettings
from serving.state.rollouts import Demand


def with_demands(
    replicas: tuple[ReplicaSettings, ...], demands: Iterable[Demand], variants: Collection[str]
) -> tuple[ReplicaSettings, ...]:
    """Return what is to run: configured replicas, less those that are not wanted, and more of those that are.

    A wanted variant without an entry of its own is launched like the variant that its demand names, on any free port.
    Replicas with a `url` are never changed: other programs run them.
    """
    wanted = {demand.variant: demand for demand in demands if demand.variant in variants}
    kept = [each for each in replicas if each.url or each.variant not in wanted or wanted[each.variant].run]
    configured = {each.variant for each in replicas}
    for variant, demand in wanted.items():
        if demand.run and variant not in configured:
            models = [each for each in replicas if each.variant == demand.modeled_on and not each.url]
            kept += [each.model_copy(update={"variant": variant, "port": None}) for each in models]
    return tuple(kept)
