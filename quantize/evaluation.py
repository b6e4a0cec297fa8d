"""How far a variant is from its parent: both read the same held-out text, teacher-forced, side by side.

Runs as a child process with transformers alone, so that the figures owe nothing to the program that quantized.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantize.errors import VariantError
from quantize.weights import read_dense, read_packing
from quantize.worker import Report, run_child

# Positions per forward pass (with a cache behind it) and per softmax: logits of a whole sample never exist at once.
_FORWARD_TOKENS = 512
_SOFTMAX_TOKENS = 64
_INT8_MAX = 127


def fake_quantize_tokens(activations: Any) -> Any:
    """[..., K] -> the same, rounded to symmetric int8 with one scale a token, as w8a8 kernels do."""
    scale = (activations.abs().amax(dim=-1, keepdim=True) / _INT8_MAX).clamp(min=1e-10)
    return (activations / scale).round().clamp(-_INT8_MAX - 1, _INT8_MAX) * scale


def measure(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Child's work: `{base, variant, samples: [[token id]]}` -> Quality's figures."""
    import torch  # noqa: PLC0415

    torch.manual_seed(0)
    parent, child = load_pair(Path(job["base"]), Path(job["variant"]))
    total = sum(max(len(ids) - 1, 0) for ids in job["samples"])
    divergences, nll_parent, nll_child, agreed, done = [], 0.0, 0.0, 0, 0
    with torch.inference_mode():
        for ids in job["samples"]:
            for tokens, ours, theirs in _aligned_logits(parent, child, ids):
                divergence, of_parent, of_child, same = compare(ours, theirs, tokens)
                divergences.append(divergence)
                nll_parent, nll_child, agreed = nll_parent + of_parent, nll_child + of_child, agreed + same
                done += len(tokens)
                report.progress(done, total)
    every = torch.cat(divergences).double()
    if not bool(torch.isfinite(every).all()):
        raise VariantError(f"{job['variant']}: gives logits that are no numbers; quantize it anew")
    return {
        "tokens": total,
        "kl_mean": float(every.mean()),
        "kl_p99": float(every.sort().values[int(0.99 * (len(every) - 1))]),
        "top1_agreement": agreed / total,
        "perplexity_ratio": float(torch.tensor((nll_child - nll_parent) / total).exp()),
    }


def compare(parent: Any, child: Any, targets: Any) -> tuple[Any, float, float, int]:
    """Logits [T, V] of both and the next tokens [T] -> KL(parent||child) [T] in nats, both NLLs, equal argmaxes."""
    of_parent, of_child = parent.float().log_softmax(-1), child.float().log_softmax(-1)
    divergence = (of_parent.exp() * (of_parent - of_child)).sum(-1).clamp(min=0)
    index = targets.unsqueeze(-1)
    nll_parent, nll_child = -of_parent.gather(-1, index).double().sum(), -of_child.gather(-1, index).double().sum()
    same = (of_parent.argmax(-1) == of_child.argmax(-1)).sum()
    return divergence, float(nll_parent), float(nll_child), int(same)


def load_pair(base: Path, variant: Path) -> tuple[Any, Any]:
    """Load parent and child as dense transformers models: fp32 on CPU, bf16 on CUDA."""
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    parent = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, local_files_only=True).to(device).eval()
    dense, layers = read_dense(variant)
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    child = type(parent).from_pretrained(None, config=config, state_dict=dense, dtype=dtype).to(device).eval()
    if read_packing(variant).activation_bits == 8:
        _quantize_inputs(child, set(layers))
    return parent, child


def _quantize_inputs(model: Any, layers: set[str]) -> None:
    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (fake_quantize_tokens(inputs[0]), *inputs[1:])

    for name, module in model.named_modules():
        if name in layers:
            module.register_forward_pre_hook(rounded)
            layers.discard(name)
    if layers:
        raise VariantError(f"{min(layers)}: no such module in the base; its activations can't be rounded")


def _aligned_logits(parent: Any, child: Any, ids: list[int]) -> Iterator[tuple[Any, Any, Any]]:
    """Yield (next tokens [T], parent logits [T, V], child logits [T, V]) over one sample."""
    import torch  # noqa: PLC0415

    tokens = torch.tensor(ids, device=parent.device)
    caches: tuple[Any, Any] = (None, None)
    for start in range(0, len(ids) - 1, _FORWARD_TOKENS):
        stop = min(start + _FORWARD_TOKENS, len(ids) - 1)
        outputs = [
            model(tokens[None, start:stop], past_key_values=cache, use_cache=True)
            for model, cache in zip((parent, child), caches, strict=True)
        ]
        caches = (outputs[0].past_key_values, outputs[1].past_key_values)
        for first in range(0, stop - start, _SOFTMAX_TOKENS):
            last = min(first + _SOFTMAX_TOKENS, stop - start)
            ours, theirs = (output.logits[0, first:last] for output in outputs)
            yield tokens[start + first + 1 : start + last + 1], ours, theirs


if __name__ == "__main__":
    sys.exit(run_child(measure))
