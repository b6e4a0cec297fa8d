"""What is refused before a launch."""

from pathlib import Path
from typing import Any

import pytest

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.errors import LaunchRefused
from serving.preflight import refuse_hopeless, unloadable
from serving.replica import Launch

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    "change,engine,word",
    [
        ({}, "cpu", None),
        ({"bits": 8}, "cuda", None),
        ({"bits": 8}, "cpu", "w8a8"),
        ({"bits": 3}, "cuda", "3 bits"),
        ({"sym": False}, "cuda", "asymmetric"),
        ({"group_size": 16}, "cuda", "group size 16"),
        ({"desc_act": True}, "cuda", "desc_act"),
        ({"desc_act": True, "group_size": -1}, "cuda", None),
        ({"quant_method": "compressed-tensors", "bits": 8}, "cpu", None),
    ],
)
def test_scheme_against_engine(change: dict[str, Any], engine: Any, word: str | None) -> None:
    """A scheme that the engine can't load is refused with the reason, everything else is not."""
    reason = unloadable({**GPTQ, **change}, engine)
    assert (reason is None) if word is None else (reason is not None and word in reason)


def test_unquantized_loads_everywhere() -> None:
    """A parent has nothing to refuse."""
    assert unloadable(None, "cpu") is None


def test_missing_directory_is_refused(tmp_path: Path) -> None:
    """A variant that isn't there is told with its path, not after a minute of loading."""
    variant = Variant("a", "bf16", PARENT_QUALITY, tmp_path / "nowhere")
    with pytest.raises(LaunchRefused, match="no such directory"):
        refuse_hopeless(Launch("a-1", variant, "cpu", ReplicaSettings(variant="a")))
