"""A model with the shape of QwQ-32B and random weights, two layers of its 64.

`python -m tests.benchmarks.qwq_shape DIR` writes it.
"""

import json
import sys
from pathlib import Path

LAYERS, WHOLE_LAYERS = 2, 64
SAMPLES, TOKENS = 128, 2048
VOCABULARY = 1024  # of 152,064: embeddings are not quantized, and small ones are made and loaded at once


def write(directory: Path) -> None:
    """Write it in bf16; a model without a tokenizer, since the samples are tokens already."""
    import torch  # noqa: PLC0415
    from transformers import Qwen2Config, Qwen2ForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = Qwen2Config(
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=LAYERS,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text(json.dumps({}))


def token_samples() -> list[list[int]]:
    """128 samples of 2,048 tokens: fixed ones without a pattern that a layer could see."""
    return [
        [(place * place * 7 + place * (31 * number + 17) + number) % VOCABULARY for place in range(TOKENS)]
        for number in range(SAMPLES)
    ]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
