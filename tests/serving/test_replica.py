"""Configured replicas become launches and foreign replicas."""

from pathlib import Path

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.replica import external_replicas, plan_launches

VARIANTS = {name: Variant(name, name, PARENT_QUALITY, Path("/m") / name) for name in ("int4", "bf16")}
REPLICAS = tuple(
    ReplicaSettings.model_validate(each)
    for each in (
        {"variant": "int4", "count": 2, "gpus": [4, 5, 6, 7], "tensor_parallel": 2, "port": 8100},
        {"variant": "bf16", "url": "http://far:8000", "api_key": "k"},
        {"variant": "int4"},
    )
)


def test_count_spreads_gpus_and_ports() -> None:
    """Each server gets its own id, GPUs and port; numbering goes on over several entries of one variant."""
    launches = plan_launches(REPLICAS, VARIANTS, "cuda")
    assert [(each.replica_id, each.gpus, each.port) for each in launches] == [
        ("int4-1", (4, 5), 8100),
        ("int4-2", (6, 7), 8101),
        ("int4-3", (), None),
    ]


def test_urls_are_not_launched() -> None:
    """A replica with a url belongs to somebody else; its key is kept for calling it."""
    (far,) = external_replicas(REPLICAS, VARIANTS)
    assert (far.id, far.url, far.api_key, far.precision) == ("bf16-url-1", "http://far:8000", "k", "bf16")
