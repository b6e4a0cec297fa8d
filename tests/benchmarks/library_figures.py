"""Figures of a variant: its format's own library reads it, transformers runs it and its base in fp32; all logits count.

GPTQ is read by GPTQModel. compressed-tensors is read by the library of that name, which also rounds activations.
"""

import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.benchmarks.figures import Figures, Sums, TokenSample


def figures_of(variant: Path, base: Path, samples: list[TokenSample], *, storage_format: str) -> Figures:
    """Run both models on token samples and compare what they predict for every token after the first."""
    import torch  # noqa: PLC0415

    sums = Sums()
    # The library prints configurations, and opens logs/ where it runs.
    with redirect_stdout(sys.stderr), TemporaryDirectory() as folder:
        places = variant.resolve(), base.resolve()
        with chdir(folder):
            parent = load_dense(places[1])
            child = load_as_gptqmodel_reads(*places) if storage_format == "gptq" else load_dense(places[0])
    with torch.inference_mode():
        for sample in samples:
            tokens, counts = torch.tensor([sample.ids]), torch.tensor(sample.counts)
            p, q = (model(tokens).logits[0, :-1].double().log_softmax(-1)[counts] for model in (parent, child))
            came = tokens[0, 1:, None][counts]
            sums.add(
                float((p.exp() * (p - q)).sum()),
                float((p.gather(-1, came) - q.gather(-1, came)).sum()),
                tokens=len(p),
                agreed=int((p.argmax(-1) == q.argmax(-1)).sum()),
            )
    return sums.figures()


def load_dense(base: Path) -> Any:
    """Load a base in fp32, or compressed-tensors, which transformers hands to its library."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True).eval()


def load_as_gptqmodel_reads(variant: Path, base: Path) -> Any:
    """Load the base's architecture with the variant's weights, its packed ones as the library dequantizes them.

    The library's own kernel takes 16-bit activations only, which would add their rounding to every figure.
    """
    from gptqmodel import BACKEND, GPTQModel  # noqa: PLC0415

    model = load_dense(base)
    read = GPTQModel.load(str(variant), backend=BACKEND.GPTQ_TORCH, device="cpu").model
    weights = _plain_tensors(variant)
    scales = {name: tensor for name, tensor in weights.items() if name.endswith(".scales")}
    for name, module in read.named_modules():
        if hasattr(module, "qweight"):
            module.scales = scales[f"{name}.scales"].float()  # as stored: loading rounds them to the model's dtype
            weights[f"{name}.weight"] = module.dequantize_weight().t()
    packed = {f"{name.removesuffix('.scales')}.{part}" for name in scales for part in ("qweight", "qzeros", "g_idx")}
    kept = {name: tensor for name, tensor in weights.items() if name not in packed | scales.keys()}
    missing, unexpected = model.load_state_dict(kept, strict=False)
    tied = [name for name in missing if name != "lm_head.weight"]
    if tied or unexpected:
        raise ValueError(f"{variant}: doesn't hold {tied}, and holds {unexpected}")
    return model.eval()


def _plain_tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file  # noqa: PLC0415

    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
