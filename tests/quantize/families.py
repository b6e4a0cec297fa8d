"""Tiny random models of the families that people fine-tune: two to four layers, 128 features wide, as saved on disk.

`write_family(directory, name)` writes one in bf16 with a byte-level BPE tokenizer, as transformers saves it;
`restored` families are then rewritten to another form that checkpoints of the family are published in.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tests.quantize.models import write_tokenizer

_DENSE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_WIDE_HEADS = {**_DENSE, "head_dim": 32}
_EXPERTS = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_ROUTED = {
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
_GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 64, "tie_word_embeddings": True}
_GLM = {"partial_rotary_factor": 0.5}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_VISION = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}

Tensors = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers and what differs from its defaults; `experts` in every sparse block (0: dense).

    `rewritten` changes the saved tensors to another published form.
    """

    model_type: str
    config: Mapping[str, Any]
    experts: int = 0
    multimodal: bool = False
    rewritten: Callable[[Tensors], Tensors] | None = field(default=None, compare=False)


def _stacked_experts(tensors: Tensors) -> Tensors:
    """Stack the experts of each block to `experts.gate_up_proj` [E, 2I, H] and `experts.down_proj` [E, H, I]."""
    import torch  # noqa: PLC0415

    kept = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for stem in sorted({name.partition(".experts.")[0] for name in tensors.keys() - kept.keys()}):
        count = len({name for name in tensors if name.startswith(f"{stem}.experts.") and ".down_proj." in name})
        each = [f"{stem}.experts.{expert}" for expert in range(count)]
        halves = [[tensors[f"{name}.{part}_proj.weight"] for part in ("gate", "up")] for name in each]
        kept[f"{stem}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        kept[f"{stem}.experts.down_proj"] = torch.stack([tensors[f"{name}.down_proj.weight"] for name in each])
    return kept


def _with_next_token_layer(tensors: Tensors) -> Tensors:
    """Add the layer that predicts a second token (MTP, NextN), as its family publishes it and transformers drops it."""
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith("model.layers."))
    prefix, added = f"model.layers.{last}.", f"model.layers.{last + 1}."
    layer = {added + name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    norm = tensors["model.norm.weight"]
    layer["eh_proj"] = norm.new_ones(len(norm), 2 * len(norm))
    layer |= dict.fromkeys(("enorm", "hnorm", "shared_head.norm"), norm)
    return tensors | {
        name if name.startswith(added) else f"{added}{name}.weight": tensor.clone() for name, tensor in layer.items()
    }


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", {**_DENSE, "tie_word_embeddings": True}),
        "mistral": Family("mistral", {**_WIDE_HEADS, "sliding_window": None}),
        "ministral3": Family("ministral3", _WIDE_HEADS),
        "qwen2": Family("qwen2", _DENSE),
        "qwen3": Family("qwen3", _WIDE_HEADS),
        "gemma2": Family("gemma2", {**_WIDE_HEADS, **_GEMMA}),
        "gemma3_text": Family("gemma3_text", {**_WIDE_HEADS, **_GEMMA}),
        "phi3": Family("phi3", _DENSE),
        "glm": Family("glm", {**_WIDE_HEADS, **_GLM, "attention_bias": True}),
        "glm4": Family("glm4", {**_WIDE_HEADS, **_GLM, "attention_bias": False}),
        "olmo2": Family("olmo2", _DENSE),
        "olmo3": Family("olmo3", {**_DENSE, "sliding_window": 64}),
        "exaone4": Family("exaone4", {**_WIDE_HEADS, "sliding_window": 64}),
        "smollm3": Family("smollm3", _DENSE),
        "granite": Family("granite", _DENSE),
        "cohere2": Family("cohere2", {**_WIDE_HEADS, "sliding_window": 64, "tie_word_embeddings": True}),
        "seed_oss": Family("seed_oss", _WIDE_HEADS),
        "ernie4_5": Family("ernie4_5", {**_WIDE_HEADS, "tie_word_embeddings": True}),
        "hunyuan_v1_dense": Family("hunyuan_v1_dense", _WIDE_HEADS),
        "qwen3_5_text": Family("qwen3_5_text", {**_WIDE_HEADS, **_LINEAR_ATTENTION}),
        "mixtral": Family("mixtral", {**_WIDE_HEADS, "num_local_experts": 8, "num_experts_per_tok": 2}, 8),
        "qwen2_moe": Family("qwen2_moe", {**_DENSE, **_EXPERTS, "shared_expert_intermediate_size": 256}, 16),
        "qwen3_moe": Family("qwen3_moe", {**_WIDE_HEADS, **_EXPERTS}, 16),
        "qwen3_moe (stacked)": Family("qwen3_moe", {**_WIDE_HEADS, **_EXPERTS}, 16, rewritten=_stacked_experts),
        "qwen3_next": Family(
            "qwen3_next",
            {**_WIDE_HEADS, **_EXPERTS, **_LINEAR_ATTENTION, "shared_expert_intermediate_size": 128},
            16,
        ),
        "glm4_moe": Family("glm4_moe", {**_WIDE_HEADS, **_ROUTED, **_GLM}, 16),
        "glm4_moe (NextN)": Family(
            "glm4_moe",
            {**_WIDE_HEADS, **_ROUTED, **_GLM, "num_nextn_predict_layers": 1},
            16,
            rewritten=_with_next_token_layer,
        ),
        "deepseek_v3": Family(
            "deepseek_v3", {**_DENSE, **_ROUTED, **_MLA, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc"}, 16
        ),
        "olmoe": Family("olmoe", {**_DENSE, "intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}, 16),
        "gpt_oss": Family(
            "gpt_oss",
            {
                **_WIDE_HEADS,
                "intermediate_size": 128,
                "num_local_experts": 16,
                "num_experts_per_tok": 4,
                "sliding_window": 64,
            },
            16,
        ),
        "gemma3": Family(
            "gemma3",
            {
                "text_config": {**_WIDE_HEADS, **_GEMMA},
                "vision_config": {**_VISION, "num_hidden_layers": 2},
                "mm_tokens_per_image": 1,
                "image_token_index": 510,
                "boi_token_index": 511,
                "eoi_token_index": 509,
            },
            multimodal=True,
        ),
        "mistral3": Family(
            "mistral3",
            {
                "text_config": {"model_type": "mistral", **_WIDE_HEADS},
                "vision_config": {"model_type": "pixtral", **_VISION, "num_hidden_layers": 2},
                "image_token_index": 510,
            },
            multimodal=True,
        ),
        "qwen2_5_vl": Family(
            "qwen2_5_vl",
            {
                "text_config": {
                    **_DENSE,
                    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
                },
                "vision_config": {
                    "depth": 2,
                    "hidden_size": 128,
                    "intermediate_size": 256,
                    "num_heads": 4,
                    "out_hidden_size": 128,
                    "fullatt_block_indexes": [1],
                },
                "image_token_id": 507,
                "video_token_id": 508,
                "vision_start_token_id": 509,
                "vision_end_token_id": 510,
                "tie_word_embeddings": False,
            },
            multimodal=True,
        ),
    }
)


def write_family(directory: Path, name: str, text: list[str]) -> Path:
    """Write the tiny model of a family in bf16, with random weights and a tokenizer trained on `text`."""
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText  # noqa: PLC0415

    family = FAMILIES[name]
    directory.mkdir(parents=True)
    size = (write_tokenizer(directory, text) + 63) // 64 * 64
    config = AutoConfig.for_model(family.model_type, **_sized(family, size))
    loader = AutoModelForImageTextToText if family.multimodal else AutoModelForCausalLM
    torch.manual_seed(0)
    model = loader.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.08)
    model.to(torch.bfloat16).save_pretrained(directory)
    if family.rewritten:
        _rewrite(directory, family.rewritten)
    if family.multimodal:
        (directory / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    return directory


def _sized(family: Family, vocab_size: int) -> dict[str, Any]:
    if "text_config" in family.config:
        return {**family.config, "text_config": {**family.config["text_config"], "vocab_size": vocab_size}}
    return {**family.config, "vocab_size": vocab_size}


def _rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    file = directory / "model.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
