"""llm-compressor's `oneshot` with one of its recipes. Runs with `llmcompressor` alone; argv[1] is a job."""

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, samples, into, options: {recipe, group_size}}`."""
    from datasets import Dataset  # noqa: PLC0415
    from llmcompressor import oneshot  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    job = json.loads(Path(job_file).read_bytes())
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype="auto")
    allow_sampling(model)
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=Dataset.from_list(rows),
        recipe=modifiers(**job["options"], norms={name.rpartition(".")[2] for name, _ in model.named_modules()}),
        num_calibration_samples=len(rows),
        max_seq_length=max(map(len, job["samples"])),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(job["into"], save_compressed=True)
    tokenizer.save_pretrained(job["into"])


def allow_sampling(model: Any) -> None:
    """Let a generation config that has a temperature or the like be saved: without `do_sample` transformers refuses."""
    if model.generation_config is not None:
        model.generation_config.do_sample = True


def modifiers(recipe: str, group_size: int, norms: set[str]) -> list[Any]:
    """Build the recipes of llm-compressor's examples, with the group size of the comparison.

    `norms` are the last parts of the names of the model's modules.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier  # noqa: PLC0415

    int4, asymmetric = int4_groups(group_size, symmetric=True), int4_groups(group_size, symmetric=False)
    if recipe == "gptq":
        return [GPTQModifier(config_groups=int4, ignore=["lm_head"])]
    if recipe == "gptq-asym":
        return [GPTQModifier(config_groups=asymmetric, ignore=["lm_head"])]
    if recipe == "awq":
        leave_memory_unpinned()
        return [AWQModifier(), QuantizationModifier(config_groups=asymmetric, ignore=["lm_head"])]
    if recipe == "spinquant-gptq":
        # The plain Hadamard needs powers of 2, and `random-matrix` is not orthogonal, which no norm survives.
        rotation = SpinQuantModifier(rotations=["R1", "R2"], transform_type="random-hadamard")
        return [rotation, GPTQModifier(config_groups=int4, ignore=["lm_head"])]
    smooth = SmoothQuantModifier(smoothing_strength=0.8, mappings=smoothed_layers(norms))
    return [smooth, GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]


def smoothed_layers(norms: set[str]) -> list[tuple[list[str], str]] | None:
    """Name the norms whose scales move where 0.14.0.1 names the wrong one: of Gemma it takes one after the attention.

    Its scales would change what the model computes. None: llm-compressor's own choice.
    """
    before = "pre_feedforward_layernorm"
    if before not in norms:
        return None
    attention = ["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"]
    return [(attention, "re:.*input_layernorm"), (["re:.*gate_proj", "re:.*up_proj"], f"re:.*{before}")]


def leave_memory_unpinned() -> None:
    """Without an accelerator nothing can be pinned, and 0.14.0.1 fails as it tries; it would only be quicker."""
    import torch  # noqa: PLC0415
    from llmcompressor.pipelines.cache import IntermediatesCache  # noqa: PLC0415

    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None


def int4_groups(group_size: int, *, symmetric: bool) -> dict[str, Any]:
    """Describe W4A16 with another group size than the preset's 128."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "strategy": "group",
        "group_size": group_size,
        "symmetric": symmetric,
        "dynamic": False,
    }
    return {"group_0": {"targets": ["Linear"], "weights": weights}}


if __name__ == "__main__":
    main(sys.argv[1])
