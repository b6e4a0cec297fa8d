"""Model directories for tests: a header-only one that needs no torch, and a tiny real Llama."""

import json
import math
import struct
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
}
SHAPES = {
    "model.embed_tokens.weight": (8, 576),
    "model.layers.0.self_attn.q_proj.weight": (576, 576),
    "model.layers.0.mlp.down_proj.weight": (576, 1536),
    "model.layers.0.input_layernorm.weight": (576,),
}


def write_hollow_model(directory: Path, **changes: Any) -> Path:
    """Write a model directory with all-zero bf16 weights: enough for every check that comes before torch."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(safetensors_of(SHAPES))
    return directory


def safetensors_of(shapes: dict[str, tuple[int, ...]]) -> bytes:
    """Serialize zero tensors of these shapes: 8 bytes of header length, the header, the data."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(end)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_llama(directory: Path, text: list[str], *, layers: int = 2) -> Path:
    """Write a random Llama (hidden size 128) in bf16 with a BPE tokenizer trained on `text`."""
    import torch  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    directory.mkdir(parents=True)
    vocabulary = write_tokenizer(directory, text)
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.6}))
    return directory


def write_tokenizer(directory: Path, text: list[str]) -> int:
    """Write a byte-level BPE tokenizer trained on `text`, with the ChatML template; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(told))
    (directory / "chat_template.jinja").write_text(CHATML)
    return int(tokenizer.get_vocab_size())
