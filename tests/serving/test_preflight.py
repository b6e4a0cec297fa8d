"""What is refused before a launch."""

from pathlib import Path
from typing import Any

import pytest

from config.schema import ReplicaSettings
from config.variant import PARENT_QUALITY, Variant
from serving.errors import LaunchRefused
from serving.preflight import check_servable, refuse_altered
from serving.preflight.schemes import unloadable
from serving.replica import Launch
from tests.serving.sealed import seal_directory
from tests.serving.supervised import model_directory

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    "change,engine,word",
    [
        ({}, "cpu", None),
        ({"bits": 8}, "cuda", None),
        ({"bits": 8}, "cpu", "w8a8"),
        ({"bits": 3}, "cuda", "not of 3"),
        ({"sym": False}, "cuda", "symmetric GPTQ only"),
        ({"group_size": 16}, "cuda", "not of 16"),
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
        check_servable(Launch("a-1", variant, "cpu", ReplicaSettings(variant="a")))


def test_an_altered_variant_is_refused(tmp_path: Path) -> None:
    """A file of another size is refused at once, one with a changed byte before its engine starts; both by name."""
    path = model_directory(tmp_path / "v")
    (path / "model.safetensors").write_bytes(b"weights")
    launch = Launch(
        "a-1", Variant("a", "int4", PARENT_QUALITY, path, seal_directory(path)), "cpu", ReplicaSettings(variant="a")
    )
    check_servable(launch)
    refuse_altered(launch, tmp_path / "memory", lambda: False)
    (path / "model.safetensors").write_bytes(b"Weights")
    check_servable(launch)
    with pytest.raises(LaunchRefused, match=r"a-1: .*v: checksum mismatch: model\.safetensors; restore"):
        refuse_altered(launch, tmp_path / "memory", lambda: False)
    (path / "model.safetensors").write_bytes(b"more weights")
    with pytest.raises(LaunchRefused, match=r"checksum mismatch: model\.safetensors"):
        check_servable(launch)
