"""Tiny GGUF files: a random Llama of one layer, with a vocabulary of single characters."""

from pathlib import Path
from typing import Any

_WIDTH, _INNER = 32, 64
_TOKENS = ["<unk>", "<s>", "</s>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
_MATRICES = {
    "attn_q": (_WIDTH, _WIDTH),
    "attn_k": (_WIDTH, _WIDTH),
    "attn_v": (_WIDTH, _WIDTH),
    "attn_output": (_WIDTH, _WIDTH),
    "ffn_gate": (_INNER, _WIDTH),
    "ffn_up": (_INNER, _WIDTH),
    "ffn_down": (_WIDTH, _INNER),
}


def write_gguf(file: Path, model: str, flags: dict[str, Any], chat_template: str = "") -> Path:
    """Write a file whose tokenizer is of a kind ("llama", "gpt2"); `flags` are `add_bos_token` and the like."""
    from gguf import GGUFWriter  # noqa: PLC0415

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_INNER)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    _add_tokenizer(writer, model, flags)
    if chat_template:
        writer.add_chat_template(chat_template)
    _add_tensors(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: Any, model: str, flags: dict[str, Any]) -> None:
    writer.add_tokenizer_model(model)
    writer.add_token_list(_TOKENS)
    writer.add_token_scores([-float(place) for place in range(len(_TOKENS))])
    writer.add_token_types([3 if token in ("<unk>", "<s>", "</s>") else 1 for token in _TOKENS])
    if model == "gpt2":
        writer.add_tokenizer_pre("default")
        writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)


def _add_tensors(writer: Any) -> None:
    import numpy as np  # noqa: PLC0415

    draw = np.random.default_rng(0)
    shapes = {"token_embd": (len(_TOKENS), _WIDTH), **{f"blk.0.{name}": shape for name, shape in _MATRICES.items()}}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(0, 0.02, shape).astype(np.float32))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{norm}.weight", np.ones(_WIDTH, np.float32))
