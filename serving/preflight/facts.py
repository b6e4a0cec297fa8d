"""Facts about a model directory and a machine, which the rules check."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from config.hardware import Gpu
from config.quantization import kv_cache_of
from config.schema import ReplicaSettings

# vLLM's names for the length of a model (transformers_utils/model_arch_config_convertor.py).
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length")
# These kinds of rope have their factor in the length already (vllm/config/model.py, _get_and_verify_max_len).
_SCALED_ROPES = frozenset({"su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling"})
_DTYPE_BYTES = {"float32": 4}
_FP8 = "fp8"


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """Resources that replicas share; `gpus` is empty if there are none, `flags` are instruction sets of the CPU."""

    free_bytes: int
    numa_nodes: int = 1
    gpus: tuple[Gpu, ...] = ()
    busy_ports: frozenset[int] = frozenset()
    flags: frozenset[str] | None = None


@dataclass(frozen=True)
class ModelFacts:
    """A model directory, from its JSON files and file sizes."""

    config: Mapping[str, Any]
    weight_bytes: int = 0
    files: frozenset[str] = frozenset()
    special_tokens: frozenset[str] = frozenset()

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """The `quantization_config`; None for an unquantized model."""
        config = self.config.get("quantization_config") or self.config.get("compression_config")
        return config if isinstance(config, dict) else None

    def number(self, *keys: str) -> int | None:
        """Return the number under the first of these keys that has one."""
        return next((value for key in keys if isinstance(value := self.text.get(key), int)), None)

    @property
    def heads(self) -> int | None:
        return self.number("num_attention_heads", "n_head")

    @property
    def key_value_heads(self) -> int | None:
        return self.number("num_key_value_heads") or self.heads

    @property
    def head_size(self) -> int | None:
        hidden = self.number("hidden_size", "n_embd")
        return self.number("head_dim") or (hidden // self.heads if hidden and self.heads else None)

    @property
    def longest_tokens(self) -> int | None:
        """The maximum length that vLLM derives from the config; None if it cannot be derived simply."""
        length = self.number(*_LENGTH_KEYS)
        rope = self.text.get("rope_scaling") or self.text.get("rope_parameters") or {}
        if length is None or "gemma3" in str(self.text.get("model_type")) or not isinstance(rope, dict):
            return length
        if any(isinstance(value, dict) for value in rope.values()):
            return None  # one per kind of layer
        kind, factor = rope.get("rope_type", rope.get("type", "default")), rope.get("factor")
        return int(length * factor) if factor and kind not in _SCALED_ROPES else length

    def cache_bytes_per_token(self, settings: ReplicaSettings) -> int | None:
        """KV cache that one token takes on each rank; None where not every layer keeps all tokens."""
        layers, heads, size = self.number("num_hidden_layers", "n_layer"), self.key_value_heads, self.head_size
        kinds = set(self.text.get("layer_types") or ["full_attention"])
        windowed = self.text.get("sliding_window") and self.text.get("use_sliding_window", True)
        if not (layers and heads and size) or kinds != {"full_attention"} or windowed or "kv_lora_rank" in self.text:
            return None
        own_layers = -(-layers // settings.pipeline_parallel)
        own_heads = max(1, heads // settings.tensor_parallel)
        return 2 * own_layers * own_heads * size * _value_bytes(self.kv_cache_dtype(settings), settings.dtype)

    def kv_cache_dtype(self, settings: ReplicaSettings) -> str:
        """Return the dtype of the KV cache; `auto` is FP8 for a checkpoint with scales for that."""
        # vllm/model_executor/layers/attention/attention.py: kv_cache_scheme
        scheme = kv_cache_of(self.quantization) if settings.kv_cache_dtype == "auto" else None
        return _FP8 if scheme is not None and scheme.precision == _FP8 else settings.kv_cache_dtype

    def has_fp8_cache(self, settings: ReplicaSettings) -> bool:
        """Whether the KV cache is FP8: as configured, or with `auto` if the checkpoint has scales for it."""
        return self.kv_cache_dtype(settings).startswith(_FP8)

    @property
    def has_cache_scales(self) -> bool:
        """Whether the checkpoint has scales of an FP8 KV cache (vllm/model_executor/layers/attention/attention.py)."""
        return bool((self.quantization or {}).get("kv_cache_scheme"))

    def lora_bytes(self, rank: int, tensor_parallel: int) -> int | None:
        """Memory that each rank reserves for one LoRA adapter of a rank; None for an unusual architecture.

        Every linear layer of a decoder layer has `A` [rank, inputs], which all ranks have, and `B` [outputs, rank],
        which they share (vllm/lora/layers/column_parallel_linear.py), in 16 bits.
        """
        layers, hidden = self.number("num_hidden_layers", "n_layer"), self.number("hidden_size", "n_embd")
        heads, key_value, size, inner = (
            *(self.heads, self.key_value_heads, self.head_size),
            self.number("intermediate_size"),
        )
        if not (layers and hidden and heads and key_value and size and inner):
            return None
        queries, keys = heads * size, key_value * size
        shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
        shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
        elements = sum(inputs + -(-outputs // tensor_parallel) for inputs, outputs in shapes)
        return 2 * layers * rank * elements


def _value_bytes(kv_cache_dtype: str, dtype: str) -> int:
    """Bytes of one number in the KV cache."""
    if kv_cache_dtype.startswith(_FP8):
        return 1
    return _DTYPE_BYTES.get(dtype, 2) if kv_cache_dtype == "auto" else 2
