"""The child that measures scales of an FP8 KV cache, `python -m quantize.calibration.cache_scales_child`."""

import sys
from pathlib import Path
from typing import Any

from quantize.dense_models import layered_base
from quantize.errors import SolveError
from quantize.kv_cache import E4M3_MAX, LargestRecorder, attention_modules, read_texts, recorded
from quantize.running.worker import WorkerChannel, run_child

# Other texts have larger keys, which would be cut; a power of two costs a float its smallest numbers alone.
_HEADROOM = 2.0


def measure(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, layers, samples}` -> `{"scales": {layer: [of keys, of values]}}`.

    The largest value of a layer becomes half the largest of E4M3. SolveError for values that are no numbers, and for a
    layer that writes no keys.
    """
    import torch  # noqa: PLC0415

    layered = layered_base(Path(job["base"]))
    modules = attention_modules(layered.model)
    missing = [layer for layer in job["layers"] if layer not in modules]
    if missing:
        raise SolveError(f"{job['base']}: {missing[0]} writes no keys and values; leave out --kv-cache fp8")
    recorders = {layer: LargestRecorder() for layer in job["layers"]}
    total = sum(map(len, job["samples"]))
    done = 0
    with torch.inference_mode(), recorded(modules, recorders), layered.reading() as model:
        for tokens in read_texts(model, job["samples"]):
            done += tokens
            channel.progress(done, total)
    return {"scales": {layer: scales_of(layer, recorder.largest) for layer, recorder in recorders.items()}}


def scales_of(layer: str, largest: tuple[float, float]) -> list[float]:
    """Give the scales of a layer's keys and values."""
    if not all(0 < value < float("inf") for value in largest):
        raise SolveError(f"{layer}: its largest key is {largest[0]}, its largest value {largest[1]}; nothing to scale")
    return [_HEADROOM * value / E4M3_MAX for value in largest]


if __name__ == "__main__":
    sys.exit(run_child(measure))
