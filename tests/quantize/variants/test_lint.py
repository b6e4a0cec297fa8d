"""The lint finds what would be refused, or served wrongly; a directory in order has no findings."""

import json
import math
import struct
from array import array
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Override, Scheme
from quantize.base import read_base
from quantize.errors import VariantError
from quantize.schemes.cache_scales import FP8_CACHE
from quantize.schemes.scheme import preset
from quantize.variants.artefact import read_artefact
from quantize.variants.lint import lint, require_clean
from quantize.variants.lint_rules import Finding, index_findings, machine_findings, size_findings
from quantize.variants.lint_values import index_problem, lost_columns, scale_problem, zero_problem
from tests.quantize.artefacts import (
    BLOCK,
    MATRICES,
    ONE_FP16,
    ONE_FP32,
    SCHEME,
    Stored,
    write_base,
    write_quantized,
    write_tensors,
)

pytest.importorskip("numpy", reason="scales are read with numpy: install the quantize extra")

Q, DOWN = f"{BLOCK}.self_attn.q_proj", f"{BLOCK}.mlp.down_proj"
SHUFFLED = array("i", (column % 2 for column in range(128))).tobytes()
NAN_FP16 = b"\x00\x7e"


def found(variant: Path, base: Path | None, scheme: Scheme = SCHEME) -> list[str]:
    """Run the lint, and give its findings as lines."""
    return [str(finding) for finding in lint(variant, read_base(base, digested=False) if base else None, scheme)]


@pytest.mark.parametrize(
    "name",
    ["w4a16-g64", "w4a16-g32", "w8a16-channel", "w8a8", "fp8-dynamic", "fp8-block", "nvfp4a16", "mxfp4"],
)
def test_a_variant_in_order_has_no_findings(tmp_path: Path, name: str) -> None:
    """Every format passes, with its base and without."""
    base = write_base(tmp_path / "base")
    variant = write_quantized(tmp_path / "v", preset(name))
    assert found(variant, base, preset(name)) == []
    assert found(variant, None, preset(name)) == []
    require_clean(variant, read_base(base), preset(name))


@pytest.mark.parametrize(
    "told,problem",
    [
        ({"bits": 8}, "config: config.json: bits is 8; the scheme has 4"),
        ({"bits": 3}, "config: config.json: vLLM loads GPTQ of 4 or 8 bits, not of 3"),
        (
            {"group_size": 16},
            "config: config.json: vLLM loads GPTQ in groups of 32, 64, 128 or -1 (all inputs), not of",
        ),
        ({"sym": False}, "config: config.json: vLLM loads symmetric GPTQ only"),
        ({"desc_act": True}, "config: config.json: vLLM no longer loads GPTQ with desc_act"),
        ({"quant_method": "quark"}, "config: config.json: quark is not supported; supported are GPTQ, AWQ"),
        (
            {"dynamic": {"+:.*mlp": {"desc_act": True}}},
            "config: config.json: vLLM no longer loads GPTQ (rule '+:.*mlp') with desc_act",
        ),
        ({"checkpoint_format": "marlin"}, "config: config.json: checkpoint_format is marlin; save it as gptq"),
        ({"quant_method": "awq"}, "config: config.json: has awq weights; the scheme is w4a16-g64 (gptq)"),
        ({"dynamic": {"-:.*q_proj": {}}}, f"tensors: {Q}: is quantized, and config.json says that it is not"),
        ({"dynamic": {"+:.*down_proj": {"group_size": 32}}}, f"tensors: {DOWN}.scales: has shape 2x64, not 4x64"),
        ({"meta": {"offload": "/tmp/gptqmodel_ab/x"}}, "machine: config.json: quantization_config.meta.offload has"),
    ],
)
def test_what_the_configuration_tells_is_checked(tmp_path: Path, told: dict[str, Any], problem: str) -> None:
    """Each key that vLLM reads is held against vLLM's rules, the scheme and the tensors."""
    variant = write_quantized(tmp_path / "v", **told)
    assert any(line.startswith(problem) for line in found(variant, write_base(tmp_path / "base")))


@pytest.mark.parametrize(
    "tensors,problem",
    [
        ({f"{Q}.qweight": None}, f"tensors: {Q}.weight: is in the base, and missing here"),
        ({f"{Q}.scales": None}, f"tensors: {Q}.scales: is missing"),
        ({"model.norm.weight": None}, "tensors: model.norm.weight: is in the base, and missing here"),
        ({"model.norm.weight": ("BF16", (32,), bytes(64))}, "tensors: model.norm.weight: has shape 32, and 64"),
        ({"model.other": ("BF16", (1,), bytes(2))}, "tensors: model.other: is not in the base"),
        ({f"{Q}.qzeros": ("I32", (2, 8), b"\x77" * 64)}, f"tensors: {Q}.qzeros: has shape 2x8, not 1x8"),
        ({f"{Q}.scales": ("I32", (1, 64), bytes(256))}, f"tensors: {Q}.scales: is I32, not F16 or BF16 or F32"),
        (
            {f"{DOWN}.g_idx": ("I32", (128,), SHUFFLED)},
            f"g_idx: {DOWN}.g_idx: input 1 is not in group 0; vLLM discards",
        ),
        ({f"{Q}.scales": ("F16", (1, 64), ONE_FP16 * 63 + NAN_FP16)}, f"scales: {Q}.scales: 1 of 64 are NaN or Inf"),
        ({f"{Q}.scales": ("F16", (1, 64), ONE_FP16 * 62 + bytes(4))}, f"scales: {Q}.scales: 2 of 64 are zero"),
        ({f"{Q}.qzeros": ("I32", (1, 8), b"\x77" * 31 + b"\x78")}, f"zeros: {Q}.qzeros: 1 of 32 bytes hold another"),
    ],
)
def test_tensors_are_checked(tmp_path: Path, tensors: dict[str, Any], problem: str) -> None:
    """Names, shapes, dtypes and the small tensors' values are told by name."""
    variant = write_quantized(tmp_path / "v", tensors=tensors)
    assert any(line.startswith(problem) for line in found(variant, write_base(tmp_path / "base")))


@pytest.mark.parametrize("name", ["w8a8", "fp8-dynamic"])
def test_scales_of_a_kv_cache_in_order(tmp_path: Path, name: str) -> None:
    """Two a layer, which the base doesn't have."""
    variant = write_quantized(tmp_path / "v", with_cache(name))
    assert found(variant, write_base(tmp_path / "base"), with_cache(name)) == []
    assert found(variant, None, with_cache(name)) == []


@pytest.mark.parametrize(
    "stored,problem",
    [
        (None, "is missing; vLLM would take 1.0"),
        (("F32", (1,), struct.pack("<f", math.inf)), "1 of 1 are NaN or Inf"),
        (("F32", (1,), struct.pack("<f", 0.0)), "1 of 1 are zero"),
        (("F32", (1,), struct.pack("<f", -1.0)), "1 of 1 are negative"),
        (("BF16", (1,), b"\x80\xbf"), "1 of 1 are negative"),
        (("I8", (1,), b"\x01"), "is I8, not F16 or BF16 or F32"),
    ],
)
def test_scales_of_a_kv_cache_are_positive_numbers(tmp_path: Path, stored: Stored | None, problem: str) -> None:
    """Any other would be served wrongly, silently."""
    scale = f"{BLOCK}.self_attn.k_scale"
    variant = write_quantized(tmp_path / "v", with_cache("w8a8"), tensors={scale: stored})
    assert f"cache: {scale}: {problem}" in found(variant, None, with_cache("w8a8"))


def test_a_kv_cache_that_the_scheme_does_not_have(tmp_path: Path) -> None:
    """vLLM goes by the configuration, and the gateway by the manifest."""
    with_scales = write_quantized(tmp_path / "v", with_cache("w8a8"))
    assert "cache: config.json: kv_cache_scheme is fp8; the scheme has none" in found(with_scales, None, preset("w8a8"))
    without = write_quantized(tmp_path / "w", preset("w8a8"))
    assert "cache: config.json: kv_cache_scheme is none; the scheme has fp8" in found(without, None, with_cache("w8a8"))


def with_cache(name: str) -> Scheme:
    """A preset with an FP8 KV cache."""
    return preset(name).model_copy(update={"kv_cache": FP8_CACHE})


def mixed(tmp_path: Path, pattern: str, modules: str) -> list[str]:
    """A variant whose matching modules have 8 bits, told by `pattern`; its scheme says so of `modules`."""
    scheme = SCHEME.model_copy(update={"overrides": (Override(modules=modules, bits=8),)})
    eight = write_quantized(tmp_path / "eight", preset("w8a16-g128").with_weights(group_size=64))
    variant = write_quantized(tmp_path / "v", dynamic={pattern: {"bits": 8}})
    _graft(eight, variant, modules)
    return found(variant, write_base(tmp_path / "base"), scheme)


def _graft(source: Path, target: Path, modules: str) -> None:
    theirs, ours = read_stored(source), read_stored(target)
    layers = [name for name in ours if fnmatchcase(name.rpartition(".")[0], modules)]
    write_tensors(target / "model.safetensors", {**ours, **{name: theirs[name] for name in layers}})


def read_stored(directory: Path) -> dict[str, Any]:
    """Read a directory's tensors as dtype, shape and bytes."""
    entries = read_artefact(directory).entries
    return {name: (entry.dtype, entry.shape, entry.read()) for name, entry in entries.items()}


def test_a_pattern_overrides_bits(tmp_path: Path) -> None:
    """Exceptions that configuration, scheme and tensors agree about are in order."""
    assert mixed(tmp_path, r"+:.*\.down_proj$", "*.down_proj") == []


def test_fused_layers_must_agree(tmp_path: Path) -> None:
    """One of gate and up at 8 bits can't be served: vLLM holds both in one matrix."""
    (line,) = mixed(tmp_path, r"+:.*\.up_proj$", "*.up_proj")
    assert line.startswith(
        f"fused: {BLOCK}.mlp.gate_up_proj: vLLM loads these as one, so they must agree: gate_proj is"
    )


def test_a_pattern_must_know_the_fused_name(tmp_path: Path) -> None:
    """vLLM asks about `gate_up_proj`, a name that the file never mentions; a pattern that misses it misleads vLLM."""
    (line,) = mixed(tmp_path, r"+:.*\.(gate|up)_proj$", "*.mlp.[gu]*")[-1:]
    assert line.startswith(f"fused: {BLOCK}.mlp.gate_up_proj: vLLM asks for this name")


def test_a_scheme_that_leaves_modules_alone(tmp_path: Path) -> None:
    """What the scheme leaves alone must not be quantized, and the rest must be."""
    scheme = SCHEME.model_copy(update={"overrides": (Override(modules="*.down_proj"),)})
    base = write_base(tmp_path / "base")
    assert f"tensors: {DOWN}: is int4 in groups of 64, and scheme w4a16-g64 wants it left alone" in found(
        write_quantized(tmp_path / "v"), base, scheme
    )
    spared: dict[str, Any] = {f"{DOWN}.{part}": None for part in ("qweight", "qzeros", "scales", "g_idx")}
    spared[f"{DOWN}.weight"] = ("BF16", (64, 128), bytes(2 * 64 * 128))
    variant = write_quantized(tmp_path / "w", tensors=spared, dynamic={r"-:.*\.down_proj": {}})
    assert found(variant, base, scheme) == []
    assert f"tensors: {DOWN}: is not quantized, and scheme w4a16-g64 wants it to be" in found(variant, base)


def write(name: str, text: str) -> Callable[[Path], object]:
    """Write a file into a variant."""
    return lambda variant: (variant / name).write_text(text)


@pytest.mark.parametrize(
    "spoil,problem",
    [
        (write("tokenizer.json", '{"vocab": []}'), "kept: tokenizer.json: differs from the base's"),
        (lambda variant: (variant / "chat_template.jinja").unlink(), "kept: chat_template.jinja: is in the base, and"),
        (write("merges.txt", "a b"), "kept: merges.txt: is not in the base"),
        (write("quant_log.csv", "layer"), "stray: quant_log.csv: is no part of a variant"),
        (
            write("quantize_config.json", "{}"),
            "quantize_config: quantize_config.json: differs from config.json in bits",
        ),
        (lambda variant: (variant / "quantize_config.json").unlink(), "quantize_config: quantize_config.json: "),
        (write("solved.json", '{"log": "/home/ann/x.log"}'), "machine: solved.json: log has a path of the machine"),
        (lambda variant: (variant / "tokenizer.json").unlink(), "tokenizer: v: has none of tokenizer.json"),
        (write("config.json", "{"), "config: v: "),
        (lambda variant: (variant / "model.safetensors").write_bytes(b"short"), "config: v: "),
        (lambda variant: (variant / "model.safetensors").unlink(), "config: v: "),
    ],
)
def test_files_are_checked(tmp_path: Path, spoil: Callable[[Path], object], problem: str) -> None:
    """Kept files, stray ones, twins and broken ones are told by name."""
    base, variant = write_base(tmp_path / "base"), write_quantized(tmp_path / "v")
    spoil(variant)
    assert any(line.startswith(problem) for line in found(variant, base))


def test_a_truncated_weight_file_is_told(tmp_path: Path) -> None:
    """A header that promises more than the file holds is found without reading the data."""
    variant = write_quantized(tmp_path / "v")
    whole = (variant / "model.safetensors").read_bytes()
    (variant / "model.safetensors").write_bytes(whole[:-1])
    (line,) = found(variant, None)
    assert "truncated: " in line


def test_words_of_the_parent_are_the_parents(tmp_path: Path) -> None:
    """A path that the base's own configuration holds says nothing about this machine."""
    base = write_base(tmp_path / "base", trained_in="/models/smol/v1")
    variant = write_quantized(tmp_path / "v")
    config = json.loads((variant / "config.json").read_bytes())
    (variant / "config.json").write_text(json.dumps({**config, "trained_in": "/models/smol/v1"}))
    assert found(variant, base) == []
    assert [finding.check for finding in lint(variant, None, SCHEME)] == ["machine"]


def test_where_transformers_loaded_a_model_from_is_no_finding(tmp_path: Path) -> None:
    """transformers 4 writes `_name_or_path` into every config.json, and nothing reads it."""
    variant = write_quantized(tmp_path / "v")
    config = json.loads((variant / "config.json").read_bytes())
    (variant / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/me/QwQ-32B"}))
    assert lint(variant, None, SCHEME) == ()


def test_many_findings_are_one_short_error(tmp_path: Path) -> None:
    """The error counts them and names the first."""
    variant = write_quantized(tmp_path / "v", tensors={f"{name}.scales": None for name in MATRICES})
    with pytest.raises(VariantError, match=r"v: the lint found 7 problems: tensors: .*; and 4 more") as told:
        require_clean(variant, None, SCHEME)
    assert len(str(told.value).splitlines()) == 1


def test_an_index_must_fit_its_files(tmp_path: Path) -> None:
    """A tensor that the index puts elsewhere, or that it forgot, is told; several files need an index."""
    variant = write_quantized(tmp_path / "v")
    index = variant / "model.safetensors.index.json"
    names = dict.fromkeys(read_artefact(variant).entries, "model.safetensors")
    index.write_text(json.dumps({"weight_map": names}))
    assert list(index_findings(read_artefact(variant))) == []
    index.write_text(json.dumps({"weight_map": {**names, "model.norm.weight": "other.safetensors", "ghost": "x"}}))
    assert [finding.where for finding in index_findings(read_artefact(variant))] == ["ghost", "model.norm.weight"]
    index.unlink()
    (variant / "second.safetensors").write_bytes((variant / "model.safetensors").read_bytes())
    assert {finding.check for finding in index_findings(read_artefact(variant))} == {"index"}


@pytest.mark.parametrize("weight_bytes,problems", [(100, 0), (104, 0), (105, 0), (106, 1), (96, 0), (94, 1), (1000, 1)])
def test_the_size_may_be_five_percent_off(weight_bytes: int, problems: int) -> None:
    """Both directions count."""
    assert len(list(size_findings(weight_bytes, 100))) == problems


@pytest.mark.parametrize(
    "text,local",
    [
        ("/tmp/gptqmodel_1a2b/x", True),
        ("file=/home/ann/model", True),
        ("C:\\Users\\ann", True),
        ("built on gpu-node-17 at noon", True),
        ("https://github.com/ModelCloud/GPTQModel", False),
        ("gptqmodel:7.6.0", False),
        (r"+:.*\.mlp\.(?:up|gate)_proj", False),
        ("Qwen/QwQ-32B", False),
        ("a/b or c/d", False),
        ("on gpu-node-171", False),
    ],
)
def test_words_of_a_machine(text: str, local: bool) -> None:
    """Paths and host names are found, addresses and model names are not."""
    found = list(machine_findings("f.json", {"a": [{"b": text}]}, ["gpu-node-17", "localhost"], frozenset()))
    assert found == ([Finding("machine", "f.json", found[0].problem)] if local else [])
    assert not local or found[0].problem.startswith("a.b has")


@given(st.lists(st.floats(width=16, allow_subnormal=True), min_size=1))
def test_scales_of_every_kind(values: list[float]) -> None:
    """Infinities, NaNs and zeros of either sign are counted; everything else passes, in fp16 and fp32."""
    flawed = sum(value == 0 or value != value or abs(value) == float("inf") for value in values)  # noqa: PLR0124
    for dtype, code in (("F16", "e"), ("F32", "f")):
        problem = scale_problem(dtype, struct.pack(f"<{len(values)}{code}", *values))
        assert (problem is None) == (flawed == 0)
        told = [int(part.split()[0]) for part in (problem or "").split(", ") if part]
        assert sum(told) == flawed


def test_rows_of_zeros_have_scales_of_zero(tmp_path: Path) -> None:
    """A model padded with zero rows is in order; where a scale of zero loses weights, it is told."""
    padded = {f"{Q}.scales": ("F16", (1, 64), ONE_FP16 * 62 + bytes(4))}
    zeros = {f"{Q}.qweight": ("I32", (8, 64), b"\x88" * (8 * 64 * 4))}
    base = write_base(tmp_path / "base")
    assert found(write_quantized(tmp_path / "v", tensors={**padded, **zeros}), base) == []
    (told,) = found(write_quantized(tmp_path / "lost", tensors=padded), base)
    assert told == f"scales: {Q}.scales: 2 of 64 are zero"


def test_int8_rows_of_zeros_have_scales_of_zero(tmp_path: Path) -> None:
    """The same holds for w8a8, where one scale is for a whole row."""
    weight = bytes(62 * 64) + b"\x01" + bytes(2 * 64 - 1)
    tensors: dict[str, Stored | None] = {
        f"{Q}.weight": ("I8", (64, 64), weight),
        f"{Q}.weight_scale": ("F32", (64, 1), ONE_FP32 * 62 + bytes(8)),
    }
    told = found(write_quantized(tmp_path / "v", preset("w8a8"), tensors=tensors), None, preset("w8a8"))
    assert told == [f"scales: {Q}.weight_scale: 1 of 64 are zero"]


@given(bits=st.sampled_from([4, 8]), data=st.data())
def test_only_weights_that_are_not_zero_are_lost(bits: int, data: st.DataObject) -> None:
    """Of the groups with a scale of zero those are counted that have an integer other than zero."""
    np = pytest.importorskip("numpy", reason="needs numpy: install the quantize extra")
    groups, outputs, per_word = 2, 3, 32 // bits
    integers = data.draw(
        st.lists(st.sampled_from([0, 0, 0, 1, -1]), min_size=groups * 32 * outputs, max_size=groups * 32 * outputs)
    )
    zero = data.draw(st.lists(st.booleans(), min_size=groups * outputs, max_size=groups * outputs))
    values = np.array(integers).reshape(groups * 32, outputs)
    scales = np.array(zero).reshape(groups, outputs)
    stored = (values + (1 << (bits - 1))).astype(np.uint32).reshape(-1, per_word, outputs)
    words = (stored << (np.arange(per_word, dtype=np.uint32) * bits)[None, :, None]).sum(axis=1, dtype=np.uint32)
    expected = sum(
        scales[group, output] and values[group * 32 : group * 32 + 32, output].any()
        for group in range(groups)
        for output in range(outputs)
    )
    assert lost_columns(words, scales, bits) == expected


def test_bf16_scales() -> None:
    """The upper half of an fp32 number."""
    assert scale_problem("BF16", b"\x80\x3f" * 3) is None
    assert scale_problem("BF16", b"\x80\x3f\x80\x7f\x00\x80") == "1 of 3 are NaN or Inf, 1 of 3 are zero"


@pytest.mark.parametrize("inputs,group_size", [(64, 32), (64, -1), (96, 64), (32, 32)])
def test_consecutive_groups_are_trivial(inputs: int, group_size: int) -> None:
    """Indices count groups up, a last short group included."""
    size = group_size if group_size > 0 else inputs
    indices = array("i", (column // size for column in range(inputs)))
    assert index_problem(indices.tobytes(), inputs, group_size) is None
    indices[inputs - 1] += 1
    assert f"input {inputs - 1} is not in group" in str(index_problem(indices.tobytes(), inputs, group_size))


@pytest.mark.parametrize("bits,byte", [(4, b"\x77"), (8, b"\x7f")])
def test_zero_points_are_the_middle(bits: int, byte: bytes) -> None:
    """AutoGPTQ stores the middle less one."""
    assert zero_problem(byte * 8, bits) is None
    assert str(zero_problem(byte * 7 + b"\x00", bits)).startswith("1 of 8 bytes")
