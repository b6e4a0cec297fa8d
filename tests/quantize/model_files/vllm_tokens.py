"""Continues token ids with vLLM and with transformers: `python -m tests.quantize.model_files.vllm_tokens DIRECTORY`.

Prints a JSON object, the greedy continuations by program.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

PROMPTS = ([3, 5, 7, 9], [2, 4, 8, 16, 32], [11, 10])
NEW_TOKENS = 4


def by_transformers(directory: Path) -> list[list[int]]:
    """What transformers generates in fp32."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    continued = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        continued.append(ids[len(prompt) :])
    return continued


def by_vllm(directory: Path) -> list[list[int]]:
    """What vLLM generates in fp32, in this process."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    engine = LLM(str(directory), dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in engine.generate(prompts, sampling, use_tqdm=False)]


if __name__ == "__main__":
    model = Path(sys.argv[1])
    tokens = {"transformers": by_transformers(model), "vllm": by_vllm(model)}
    # vLLM may have put something of its own in the place of stdout.
    print("TOKENS" + json.dumps(tokens), file=sys.__stdout__, flush=True)
