"""What must hold of the scales of an FP8 KV cache: there for every layer, positive numbers, as the scheme says."""

from collections.abc import Iterator

from config.manifest import Scheme
from config.quantization import kv_cache_of
from config.vllm import cache_scales_refusal
from quantize.schemes.cache_scales import KEYS, VALUES, attention_names, layer_count
from quantize.variants.artefact import Artefact
from quantize.variants.lint_rules import Finding
from quantize.variants.lint_values import FLOAT_WORDS, scale_problem
from quantize.variants.storage_format import kind_of


def cache_findings(artefact: Artefact, scheme: Scheme) -> Iterator[Finding]:
    """Hold the scales of keys and values against configuration and scheme."""
    kind, cache = kind_of(artefact.quantization_config), kv_cache_of(artefact.quantization_config)
    if kind is None or cache != scheme.kv_cache:
        if kind is not None:
            said, wanted = (one.precision if one else "none" for one in (cache, scheme.kv_cache))
            yield Finding("cache", "config.json", f"kv_cache_scheme is {said}; the scheme has {wanted}")
        return
    if cache is None or cache_scales_refusal(kind):
        return
    names = attention_names(artefact.entries, layer_count(artefact.config))
    if not names:
        yield Finding("cache", "config.json", "has a kv_cache_scheme, and no layer has keys and values")
    for name in names:
        for part in (KEYS, VALUES):
            yield from _scale_findings(artefact, f"{name}{part}")


def _scale_findings(artefact: Artefact, name: str) -> Iterator[Finding]:
    entry = artefact.entries.get(name)
    if entry is None:
        yield Finding("cache", name, "is missing; vLLM would take 1.0")
    elif entry.dtype not in FLOAT_WORDS:
        yield Finding("cache", name, f"is {entry.dtype}, not {' or '.join(FLOAT_WORDS)}")
    else:
        problem = scale_problem(entry.dtype, entry.read()) or _negative(entry.dtype, entry.read())
        if problem:
            yield Finding("cache", name, problem)


def _negative(dtype: str, data: bytes) -> str | None:
    """Say how many scales are negative: little-endian floats, whose last byte has the sign."""
    size = 4 if dtype == "F32" else 2
    count = sum(data[place] >> 7 for place in range(size - 1, len(data), size))
    return f"{count} of {len(data) // size} are negative" if count else None
