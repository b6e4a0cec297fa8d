"""A program that loads a tiny model of every format in the installed vLLM: `python -m tests.contract.loading FOLDER`.

It takes vLLM's own way from engine arguments to a model on the CPU, without an engine and without a KV cache, and runs
one matrix: the product must be that of the weights as `quantize.variants.weights` reads them back. A line of JSON for
each: `{"name", "kernel"}` or `{"name", "error"}`. Then the scales that attention has of an FP8 KV cache, with
`--kv-cache-dtype auto` and `fp8`: `{"name", "cache": {"auto": [keys, values], ...}}`.
"""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from config.quantization import QuantizationScheme
from quantize.errors import VariantError
from quantize.schemes.cache_scales import FP8_CACHE, KEYS, VALUES
from quantize.variants.checkpoint import quantization_config as variant_config
from quantize.variants.storage_format import Kind, StorageFormat, parts_of, scheme_format
from quantize.variants.weights import read_dense
from tests.contract.formats import CACHE_CASES, CACHE_SCALES, CASES, MIXED_CASES, quantization_config

HIDDEN, INNER, HEADS, VOCABULARY = 256, 256, 4, 128
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
BLOCK = "model.layers.0"
# Beside int8 and FP8 activations, bf16 products: wrong scales, zero points or orders are off by their own size.
_MOST_ERROR = 0.05
MATRICES: Mapping[str, tuple[int, int]] = {
    **{f"{BLOCK}.self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"{BLOCK}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    f"{BLOCK}.mlp.down_proj": (HIDDEN, INNER),
}


def write_uniform(folder: Path, scheme: QuantizationScheme, *, cache: bool = False) -> Path:
    """Write a model whose matrices are all stored alike; `cache`: with scales of an FP8 KV cache."""
    form = StorageFormat.of(scheme.compression, scheme.weights)
    return write_model(folder, dict.fromkeys(MATRICES, form), quantization_config(scheme), cache=cache)


def write_mixed(folder: Path, scheme: Scheme) -> Path:
    """Write a model of a scheme with exceptions, with the configuration that a variant of it has."""
    kind: Kind = "gptq" if scheme.compression == "gptq" else "pack-quantized"
    forms = {name: form for name in MATRICES if (form := scheme_format(scheme, name, kind)) is not None}
    return write_model(folder, forms, variant_config(scheme, 0.01, [*MATRICES]))


def write_model(
    folder: Path, forms: Mapping[str, StorageFormat], quantization: dict[str, Any], *, cache: bool = False
) -> Path:
    """Write a model of one layer with random weights, stored as the lint expects them."""
    import torch  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    folder.mkdir()
    torch.manual_seed(0)
    tensors: dict[str, Any] = {
        name: torch.randn(VOCABULARY, HIDDEN).bfloat16() for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    norms = (f"{BLOCK}.input_layernorm", f"{BLOCK}.post_attention_layernorm", "model.norm")
    tensors |= {f"{name}.weight": torch.ones(HIDDEN).bfloat16() for name in norms}
    for name, (outputs, inputs) in MATRICES.items():
        for part, (dtypes, shape) in parts_of(forms[name], outputs, inputs).items():
            tensors[f"{name}.{part}"] = _filled(part, dtypes, shape, outputs, inputs, forms[name])
    if cache:
        scales = zip((KEYS, VALUES), CACHE_SCALES, strict=True)
        tensors |= {f"{BLOCK}.self_attn{part}": torch.tensor([scale]) for part, scale in scales}
        quantization["kv_cache_scheme"] = FP8_CACHE.model_dump(exclude_none=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {**CONFIG, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _filled(
    part: str, dtypes: tuple[str, ...], shape: tuple[int, ...], outputs: int, inputs: int, form: StorageFormat
) -> Any:
    import torch  # noqa: PLC0415

    if part == "weight_shape":
        return torch.tensor([outputs, inputs])
    if part == "g_idx":
        return (torch.arange(inputs) // (form.group_size if form.group_size > 0 else inputs)).int()
    if part == "qzeros" and form.kind == "gptq":  # vLLM takes the middle, whatever is stored
        return torch.full(shape, 0x7F7F7F7F if form.bits == 8 else 0x77777777, dtype=torch.int32)
    if "I32" in dtypes:
        return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    if "I8" in dtypes:
        return torch.randint(-127, 128, shape, dtype=torch.int8)
    if dtypes[0] == "U8":  # packed numbers, or exponents of scales
        return torch.randint(110, 127, shape, dtype=torch.uint8)
    random = torch.rand(shape) * 0.01
    return random.to(torch.float8_e4m3fn) if "F8_E4M3" in dtypes else random.bfloat16()


def require_same_product(model: Path, inputs: Any, product: Any) -> None:
    """Raise ValueError if a product with q, k and v is not that of the weights that are read back from the files."""
    import torch  # noqa: PLC0415

    try:
        dense, _ = read_dense(model)
    except VariantError:
        return  # measured where it is served
    weight = torch.cat([dense[f"{BLOCK}.self_attn.{name}_proj.weight"].float() for name in "qkv"])
    expected = inputs.float() @ weight.t()
    error = float((product.float() - expected).norm() / expected.norm())
    if error > _MOST_ERROR:
        raise ValueError(f"the product is {error:.1%} off that of the weights as they are read back")


class Loader:
    """vLLM's CPU platform in this process, with one rank."""

    def __init__(self, folder: Path) -> None:
        # Before vLLM is imported. The address of a group of one process is a file.
        os.environ.update(VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", VLLM_CPU_KVCACHE_SPACE="1")
        from vllm.plugins import load_general_plugins  # noqa: PLC0415
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop  # noqa: PLC0415

        load_general_plugins()
        _set_torch_accelerator_to_noop()
        self._group = f"file://{folder / 'group'}"
        self._has_group = False

    def _loaded(self, model: Path, cache: str = "auto") -> Iterator[Any]:
        from vllm.config import set_current_vllm_config  # noqa: PLC0415
        from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415
        from vllm.model_executor.model_loader import get_model  # noqa: PLC0415

        arguments: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 64, "enforce_eager": True}
        arguments |= {"dtype": "bfloat16", "kv_cache_dtype": cache}
        config = EngineArgs(model=str(model), **arguments).create_engine_config()
        with set_current_vllm_config(config):
            self._make_group()
            yield get_model(vllm_config=config)

    def cache_scales_of(self, model: Path, cache: str) -> list[float] | None:
        """Load a model, and give the scales of keys and values that attention has; None: the cache is not FP8."""
        with contextmanager(self._loaded)(model, cache) as loaded:
            (attention,) = [module for module in loaded.modules() if hasattr(module, "_k_scale_float")]
            if not attention.kv_cache_dtype.startswith("fp8"):
                return None
            return [attention._k_scale_float, attention._v_scale_float]

    def kernel_of(self, model: Path) -> str:
        """Load a model, multiply by its first matrix, and name the kernel."""
        import torch  # noqa: PLC0415

        with contextmanager(self._loaded)(model) as loaded:
            (layer,) = [module for name, module in loaded.named_modules() if name.endswith("qkv_proj")]
            # Always the same: of activations in FP8, a few tokens are now and then more than `_MOST_ERROR` off.
            inputs = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
            product, _ = layer(inputs)
        if product.shape != (3, 3 * HIDDEN) or not torch.isfinite(product).all():
            raise ValueError("the product has NaN or Inf")
        require_same_product(model, inputs, product)
        method = getattr(layer, "scheme", None) or layer.quant_method
        kernel = getattr(method, "kernel", None) or getattr(method, "fp8_linear", None) or method
        return type(kernel).__name__

    def _make_group(self) -> None:
        from vllm.distributed import (  # noqa: PLC0415
            ensure_model_parallel_initialized,
            init_distributed_environment,
        )

        if not self._has_group:
            init_distributed_environment(1, 0, self._group, 0, backend="gloo")
            ensure_model_parallel_initialized(1, 1)
            self._has_group = True


def main(folder: Path) -> None:
    """Load every case and print what came of it."""
    loader = Loader(folder)
    for name, scheme in CASES.items():
        print(json.dumps({"name": name, **outcome_of(loader, write_uniform(folder / name, scheme))}), flush=True)
    for name, mixed in MIXED_CASES.items():
        print(json.dumps({"name": name, **outcome_of(loader, write_mixed(folder / name, mixed))}), flush=True)
    for name in CACHE_CASES:
        model = write_uniform(folder / f"{name}-cache", CASES[name], cache=True)
        print(json.dumps({"name": f"{name}, cache", "cache": cache_outcomes(loader, model)}), flush=True)


def outcome_of(loader: Loader, model: Path) -> dict[str, Any]:
    """Load a model and multiply by its first matrix: the kernel, or what vLLM says."""
    try:
        return {"kernel": loader.kernel_of(model)}
    except Exception as error:  # noqa: BLE001 - what vLLM raises is the result
        return {"error": f"{type(error).__name__}: {error}"}


def cache_outcomes(loader: Loader, model: Path) -> dict[str, Any]:
    """Load a model with each dtype of the KV cache; the scales, or what vLLM says."""
    outcomes: dict[str, Any] = {}
    for cache in ("auto", "fp8"):
        try:
            outcomes[cache] = loader.cache_scales_of(model, cache)
        except Exception as error:  # noqa: BLE001 - what vLLM raises is the result
            outcomes[cache] = f"{type(error).__name__}: {error}"
    return outcomes


if __name__ == "__main__":
    main(Path(sys.argv[1]))
