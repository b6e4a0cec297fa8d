"""What must hold of the small tensors' values: scales, zero points and group indices, streamed one at a time.

vLLM 0.32 discards `g_idx` and takes 2^(bits-1) for every zero point: other values would be served wrongly, silently.
"""

from array import array
from collections.abc import Iterator
from typing import Any

from quantize.variants.artefact import Artefact
from quantize.variants.lint_rules import Finding
from quantize.variants.storage_format import StorageFormat, configured_format, kind_of, quantized_layers

# Exponent bits of a float that is no number, by dtype, and the dtype of the word that holds it.
_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}


def value_findings(artefact: Artefact) -> Iterator[Finding]:
    """Read every quantized layer's scales, zero points and group indices, and tell which can't be right."""
    kind = kind_of(artefact.quantization_config)
    if kind is None:
        return
    scales = "scales" if kind == "gptq" else "weight_scale"
    for layer in quantized_layers(artefact.entries, kind):
        storage_format = configured_format(artefact.quantization_config, layer)
        entry = artefact.entries.get(f"{layer}.{scales}")
        if entry and entry.dtype in _EXPONENTS:
            problem = scale_problem(entry.dtype, entry.read())
            if problem:
                yield Finding("scales", f"{layer}.{scales}", problem)
        if storage_format is not None and kind == "gptq":
            yield from _gptq_findings(artefact, layer, storage_format)


def scale_problem(dtype: str, data: bytes) -> str | None:
    """Say what is wrong with scales: some are no numbers, or zero, which loses the weights."""
    import numpy as np  # noqa: PLC0415

    word, exponent = _EXPONENTS[dtype]
    words: Any = np.frombuffer(data, dtype=word)
    not_finite = int(((words & exponent) == exponent).sum())
    zero = int(((words << 1) == 0).sum())  # without the sign
    quantization_config = [
        f"{count} of {words.size} are {what}" for count, what in ((not_finite, "no numbers"), (zero, "zero")) if count
    ]
    return ", ".join(quantization_config) or None


def index_problem(data: bytes, inputs: int, group_size: int) -> str | None:
    """Say where group indices are not those of consecutive groups."""
    size = group_size if group_size > 0 else inputs
    quantization_config, wanted = array("i", data), array("i", (position // size for position in range(inputs)))
    if quantization_config == wanted:
        return None
    first = next(
        (at for at, (ours, theirs) in enumerate(zip(quantization_config, wanted, strict=False)) if ours != theirs),
        len(quantization_config),
    )
    return f"input {first} is not in group {first // size}; vLLM discards g_idx, so the groups must be consecutive"


def zero_problem(data: bytes, bits: int) -> str | None:
    """Say whether zero points differ from 2^(bits-1); stored ones are less by one, side by side in words."""
    stored = (1 << (bits - 1)) - 1
    byte = stored | stored << 4 if bits == 4 else stored
    other = len(data) - data.count(byte.to_bytes())
    return (
        f"{other} of {len(data)} bytes hold another zero point than {stored + 1}, which vLLM takes" if other else None
    )


def _gptq_findings(artefact: Artefact, layer: str, storage_format: StorageFormat) -> Iterator[Finding]:
    g_idx, qzeros = (artefact.entries.get(f"{layer}.{part}") for part in ("g_idx", "qzeros"))
    if g_idx and g_idx.dtype == "I32":
        problem = index_problem(g_idx.read(), g_idx.shape[0], storage_format.group_size)
        if problem:
            yield Finding("g_idx", f"{layer}.g_idx", problem)
    if qzeros and qzeros.dtype == "I32" and storage_format.bits in (4, 8):
        problem = zero_problem(qzeros.read(), storage_format.bits)
        if problem:
            yield Finding("zeros", f"{layer}.qzeros", problem)
