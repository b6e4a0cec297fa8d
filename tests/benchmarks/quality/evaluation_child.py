"""Measure a contender's directory against the base by the code that measures our variants.

A child of `quantize.running.worker`. Unlike `quantize.evaluation.evaluation_child` it takes dense directories, and
models whose config differs from the base's: a rotated one has an output matrix of its own.
"""

import json
import sys
from pathlib import Path
from typing import Any

from quantize.calibration.tokenizing import load_tokenizer
from quantize.dense_models import layered_base, layered_variant
from quantize.evaluation.evaluation_child import Meter, read_measurements, require_finite_metrics
from quantize.evaluation.inputs import prepare
from quantize.evaluation.lm_head import find_lm_head
from quantize.evaluation.parent_outputs import ParentCaches, read_parent
from quantize.evaluation.sample_metrics import LmHeads, read_samples
from quantize.layered_models import LayeredModel
from quantize.running.worker import WorkerChannel, run_child


def measure(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, base_digest, directory, cache, scratch, samples}` -> `config.measurements.Measurements`."""
    import torch  # noqa: PLC0415

    base = Path(job["base"])
    tokenizer = load_tokenizer(base, chats=False)
    nothing: dict[str, Any] = {"prompted": [], "prompts": 0, "seeds": 1, "new_tokens": 1, "questions": []}
    inputs = prepare({**job, **nothing, "task_tokens": 1}, tokenizer)
    meter = Meter(channel, inputs.tokens)
    caches = ParentCaches(Path(job["cache"]), Path(job["scratch"]), base, job["base_digest"])
    parent = read_parent(inputs, caches, meter.announce)
    with torch.inference_mode():
        layered = opened(Path(job["directory"]))
        with layered.without_layers() as model:
            heads = LmHeads(parent.lm_head(model, base), find_lm_head(model, inputs.samples[0]))
        with layered.reading() as model:
            reading = read_samples(model, heads, parent.tensor(), inputs.samples, meter)
        require_finite_metrics(reading, {**job, "variant": job["directory"]})
        return dict(read_measurements(reading, inputs, tokenizer, parent.kl_floor)["measurements"])


def opened(directory: Path) -> LayeredModel:
    """Open a model directory by its own config, quantized or not."""
    quantized = "quantization_config" in json.loads((directory / "config.json").read_bytes())
    return layered_variant(directory, directory) if quantized else layered_base(directory)


if __name__ == "__main__":
    sys.exit(run_child(measure))
