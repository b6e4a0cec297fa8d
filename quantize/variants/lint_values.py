"""What must hold of the small tensors' values: scales, zero points and group indices, streamed one at a time.

vLLM 0.32 discards `g_idx` and takes 2^(bits-1) for every zero point: other values would be served wrongly, silently.
"""

from array import array
from collections.abc import Iterator
from typing import Any

from quantize.variants.artefact import Artefact
from quantize.variants.lint_rules import Finding
from quantize.variants.storage_format import Kind, StorageFormat, configured_format, kind_of, quantized_layers

# Exponent bits that mark NaN and Inf, by dtype, and the dtype of the word that holds them.
FLOAT_WORDS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000)}
_WORD_BITS = 32
_SCALES = ("scales", "weight_scale", "weight_scale_inv", "weight.absmax", "SCB")


def value_findings(artefact: Artefact) -> Iterator[Finding]:
    """Read every quantized layer's scales, zero points and group indices, and report invalid ones."""
    kind = kind_of(artefact.quantization_config)
    if kind is None:
        return
    for layer in quantized_layers(artefact.entries, kind):
        storage_format = configured_format(artefact.quantization_config, layer)
        yield from _scale_findings(artefact, layer, kind, storage_format)
        if storage_format is not None and kind == "gptq":
            yield from _gptq_findings(artefact, layer, storage_format)


def scale_problem(dtype: str, data: bytes, lost: int | None = None) -> str | None:
    """Say how many scales are non-finite or zero; `lost` of the zero ones have weights that are not (None: all)."""
    import numpy as np  # noqa: PLC0415

    word, exponent = FLOAT_WORDS[dtype]
    words: Any = np.frombuffer(data, dtype=word)
    non_finite = int(((words & exponent) == exponent).sum())
    zero = int(_is_zero(words).sum()) if lost is None else lost
    problems = [
        f"{count} of {words.size} are {what}" for count, what in ((non_finite, "NaN or Inf"), (zero, "zero")) if count
    ]
    return ", ".join(problems) or None


def lost_columns(words: Any, zero: Any, bits: int) -> int:
    """Count groups whose scale is zero although an integer in them is not: their weights are lost.

    `words` uint32 [K*bits/32, N] hold integers plus 2^(bits-1), `zero` bool [G, N] is true for scales of zero. Weights
    that are zero themselves (rows that pad a model) have such scales rightly.
    """
    groups, outputs = zero.shape
    middle = sum(1 << (place + bits - 1) for place in range(0, _WORD_BITS, bits))
    used = (words.reshape(groups, -1, outputs) != middle).any(axis=1)
    return int((zero & used).sum())


def index_problem(data: bytes, inputs: int, group_size: int) -> str | None:
    """Say where group indices are not those of consecutive groups."""
    size = group_size if group_size > 0 else inputs
    stored, expected = array("i", data), array("i", (position // size for position in range(inputs)))
    if stored == expected:
        return None
    pairs = enumerate(zip(stored, expected, strict=False))
    first = next((position for position, (ours, theirs) in pairs if ours != theirs), len(stored))
    return f"input {first} is not in group {first // size}; vLLM discards g_idx, so the groups must be consecutive"


def zero_problem(data: bytes, bits: int) -> str | None:
    """Say whether zero points differ from 2^(bits-1); stored ones are less by one, side by side in words."""
    stored = (1 << (bits - 1)) - 1
    byte = stored | stored << 4 if bits == 4 else stored
    other = len(data) - data.count(byte.to_bytes())
    return (
        f"{other} of {len(data)} bytes hold another zero point than {stored + 1}, which vLLM takes" if other else None
    )


def _scale_findings(
    artefact: Artefact, layer: str, kind: Kind, storage_format: StorageFormat | None
) -> Iterator[Finding]:
    name = next((each for part in _SCALES if (each := f"{layer}.{part}") in artefact.entries), "")
    entry = artefact.entries.get(name)
    if entry is None or entry.dtype not in FLOAT_WORDS:
        return
    data = entry.read()
    problem = scale_problem(entry.dtype, data)
    if problem and storage_format is not None:
        problem = scale_problem(entry.dtype, data, _lost(artefact, layer, kind, storage_format, entry.dtype, data))
    if problem:
        yield Finding("scales", name, problem)


def _lost(
    artefact: Artefact, layer: str, kind: Kind, storage_format: StorageFormat, dtype: str, data: bytes
) -> int | None:
    """Count scales of zero that lose weights; None where the integers can't be looked at."""
    import numpy as np  # noqa: PLC0415

    zero: Any = _is_zero(np.frombuffer(data, dtype=FLOAT_WORDS[dtype][0]))
    if kind == "gptq":
        words = artefact.entries.get(f"{layer}.qweight")
        if words is None or storage_format.bits not in (4, 8) or words.bytes * 8 % max(zero.size * _WORD_BITS, 1):
            return None
        packed: Any = np.frombuffer(words.read(), dtype="<u4").reshape(words.shape)
        return lost_columns(packed, zero.reshape(-1, words.shape[-1]), storage_format.bits)
    weight = artefact.entries.get(f"{layer}.weight")
    if kind != "int-quantized" or weight is None or len(weight.shape) != 2 or weight.shape[0] != zero.size:
        return None
    rows: Any = np.frombuffer(weight.read(), dtype=np.int8).reshape(weight.shape)
    return int((zero & rows.any(axis=1)).sum())


def _is_zero(words: Any) -> Any:
    """Tell for each float, given as an unsigned word, whether it is 0 or -0."""
    return (words << 1) == 0


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
