"""Refuse before launch what would fail after minutes of loading, and what is no longer what was sealed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from config.errors import ManifestError
from config.manifest import Engine
from config.variant import read_model_config
from serving.errors import LaunchRefused
from serving.replica import Launch
from serving.seal import SealCheck, resized_files

GROUP_SIZES = (-1, 32, 64, 128)


def refuse_hopeless(launch: Launch) -> None:
    """Raise LaunchRefused if no vLLM can load this variant on this engine."""
    if launch.variant.path is None:
        raise LaunchRefused(f"{launch.replica_id}: variant {launch.variant.name!r} has no path to serve from")
    try:
        config = read_model_config(launch.variant.path)
    except ManifestError as error:
        raise LaunchRefused(f"{launch.replica_id}: {error}") from error
    reason = unloadable(config.get("quantization_config"), launch.engine)
    if reason:
        raise LaunchRefused(f"{launch.replica_id}: {launch.variant.path}: {reason}")
    if launch.variant.manifest:
        _refuse(launch, resized_files(launch.variant.path, launch.variant.manifest))


def refuse_altered(launch: Launch, memory: Path, stopped: Callable[[], bool]) -> None:
    """Raise LaunchRefused if a sealed file's bytes have changed; reads those that `memory` doesn't know yet.

    Interrupted: `stopped` said so on the way. A variant without a manifest was never sealed.
    """
    variant = launch.variant
    if variant.path and variant.manifest:
        _refuse(launch, SealCheck(variant.path, memory, stopped).altered_files(variant.manifest))


def _refuse(launch: Launch, altered: list[str]) -> None:
    if altered:
        raise LaunchRefused(
            f"{launch.replica_id}: {launch.variant.path}: altered since it was sealed: {', '.join(altered)}; "
            "restore the files or make the variant anew"
        )


def unloadable(quantization: dict[str, Any] | None, engine: Engine) -> str | None:
    """Say why vLLM 0.32 can't load a `quantization_config` on an engine, or None if it can.

    Rules: vllm/model_executor/layers/quantization/auto_gptq.py and gptq_utils.py of 0.32.
    """
    if quantization is None or quantization.get("quant_method") != "gptq":
        return None
    bits, group_size = quantization.get("bits"), quantization.get("group_size")
    if bits not in (4, 8):
        return f"GPTQ with {bits} bits is not served by vLLM; quantize to 4 or 8 bits"
    if quantization.get("sym") is not True:
        return "asymmetric GPTQ is not served by vLLM; quantize with sym: true"
    if group_size not in GROUP_SIZES:
        return f"GPTQ group size {group_size} is not served by vLLM; use one of {', '.join(map(str, GROUP_SIZES))}"
    if quantization.get("desc_act") and group_size != -1:
        return "GPTQ with desc_act is not served by vLLM; quantize with desc_act: false"
    if bits == 8 and engine == "cpu":
        return "GPTQ int8 does not load on CPU; use scheme w8a8, which loads on CPU and CUDA"
    return None
