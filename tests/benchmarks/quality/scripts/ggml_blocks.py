"""llama.cpp's block formats, by its own quantizers: the library that `xllamacpp` carries. argv[1] is a job.

Each matrix becomes what `llama-quantize` makes of it without an importance matrix, then is dequantized by `gguf` and
written as fp32 safetensors, so that the same code evaluates it as all others. The choice of formats per tensor is that
of `llama_tensor_get_type` for a dense model: Q4_K_M gives Q6_K to the embeddings (which are the output matrix, too) and
to `attn_v` and `ffn_down` of some layers. Rows that are no multiple of 256 fall back to Q5_0 and Q8_0, as there.
"""

import ctypes
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SUPER_BLOCK = 256
_FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
_LAYER = re.compile(r"\.layers\.(\d+)\.")


def main(job_file: str) -> None:
    """Quantize as a job says: `{base, into, options: {format: Q4_K_M | Q8_0}}`; the bytes go to `stored_bytes.json`."""
    from safetensors.torch import save_file  # noqa: PLC0415

    job = json.loads(Path(job_file).read_bytes())
    base, into = Path(job["base"]), Path(job["into"])
    into.mkdir(parents=True)
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy(file, into)
    layers = json.loads((base / "config.json").read_bytes())["num_hidden_layers"]
    library, tensors, stored = ggml(), {}, {}
    for name, tensor in tensors_of(base):
        form = format_of(name, tuple(tensor.shape), layers, job["options"]["format"])
        tensors[name], stored[name] = rounded(library, tensor, form)
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    (into / "stored_bytes.json").write_text(json.dumps(stored))


def format_of(name: str, shape: tuple[int, ...], layers: int, mixture: str) -> str:
    """Choose a tensor's format by its name and shape; norms stay in fp32."""
    if len(shape) < 2:
        return "F32"
    if mixture == "Q8_0":
        return "Q8_0"
    wanted = "Q6_K" if "embed_tokens" in name or "lm_head" in name else "Q4_K"
    place = _LAYER.search(name)
    if place and ("v_proj" in name or "down_proj" in name) and use_more_bits(int(place[1]), layers):
        wanted = "Q6_K"
    return wanted if shape[-1] % _SUPER_BLOCK == 0 else _FALLBACK[wanted]


def use_more_bits(layer: int, layers: int) -> bool:
    """Tell whether Q4_K_M gives Q6_K to a layer: the first and last eighth, and every third between them."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def ggml() -> Any:
    """Load llama.cpp's library for its block quantizers."""
    package = find_spec("xllamacpp")
    if package is None or package.origin is None:
        raise SystemExit("ggml_blocks: the package xllamacpp is missing")
    library = ctypes.CDLL(str(next(Path(package.origin).parent.glob("*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        *[ctypes.c_int64] * 3,
        ctypes.c_void_p,
    ]
    return library


def rounded(library: Any, tensor: Any, form: str) -> tuple[Any, int]:
    """Quantize and dequantize one tensor; gives it in fp32, and the bytes that its format takes."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415
    from gguf.quants import dequantize  # noqa: PLC0415

    weights = np.ascontiguousarray(tensor.float().numpy())
    if form == "F32":
        return torch.from_numpy(weights), weights.nbytes
    kind = GGMLQuantizationType[form]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = weights.shape
    packed = np.zeros((rows, columns // block * block_bytes), dtype=np.uint8)
    written = library.ggml_quantize_chunk(kind, weights.ctypes.data, packed.ctypes.data, 0, rows, columns, None)
    if written != packed.nbytes:
        raise SystemExit(f"ggml_blocks: {form} took {written} bytes, not {packed.nbytes}")
    return torch.from_numpy(dequantize(packed, kind)), packed.nbytes


def tensors_of(base: Path) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a model directory."""
    from safetensors.torch import load_file  # noqa: PLC0415

    for file in sorted(base.glob("*.safetensors")):
        yield from sorted(load_file(file).items())


if __name__ == "__main__":
    main(sys.argv[1])
