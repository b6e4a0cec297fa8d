"""A directory that somebody else quantized is linted, measured and sealed where it lies, or refused."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.manifest import Manifest, Override
from config.quality import Quality
from config.quantization import QuantizationScheme, grouped
from quantize.base import read_base
from quantize.errors import TargetError, VariantError
from quantize.schemes.scheme import preset
from quantize.variants.adoption import adopt, exceptions, maker, scheme_told
from quantize.variants.artefact import read_artefact
from quantize.variants.storage_format import StorageFormat, measurable_by, parts_of
from tests.contract.formats import CASES, quantization_config
from tests.quantize.artefacts import BLOCK, MATRICES, packed, write_base, write_quantized
from tests.quantize.manifests import quality

pytest.importorskip("numpy", reason="scales are read with numpy: install the quantize extra")

ONES = {
    "F32": struct.pack("<f", 1.0),
    "F16": struct.pack("<e", 1.0),
    "F8_E4M3": b"\x38",
    "I32": bytes(4),
    "I64": bytes(8),
    "I8": b"\1",
    "U8": b"\1",
}
FOUR, EIGHT = StorageFormat("gptq", 4, 64), StorageFormat("gptq", 8, 64)


class Bench:
    """A measurement that counts how often it was asked for."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self) -> Quality:
        self.runs += 1
        return quality()


def adopted(tmp_path: Path, variant: Path, bench: Bench) -> tuple[Manifest, list[str]]:
    """Adopt a directory, and give what was told."""
    told: list[str] = []
    base = tmp_path / "base"
    return adopt(variant, read_base(base if base.exists() else write_base(base)), bench, told.append), told


def test_a_directory_in_order_becomes_a_variant(tmp_path: Path) -> None:
    """Its manifest names base, scheme, maker and quality, and seals every file; only the manifest is new."""
    variant = write_quantized(tmp_path / "v", meta={"quantizer": ["gptqmodel:6.0.3"]}, damp_percent=0.05)
    before = {path.name: path.read_bytes() for path in variant.iterdir()}
    manifest, told = adopted(tmp_path, variant, Bench())
    assert told == []
    assert Manifest.read(variant) == manifest
    assert manifest.altered_files(variant) == []
    assert {path.name: path.read_bytes() for path in variant.iterdir() if path.name != "manifest.json"} == before
    assert manifest.id.startswith("base-int4-")
    assert manifest.base == manifest.base.model_copy(update={"name": "base", "dtype": "bf16"})
    assert manifest.scheme == preset("w4a16-g64")
    assert manifest.calibration is None
    assert (manifest.quantizer.backend, manifest.quantizer.version) == ("gptqmodel", "6.0.3")
    assert manifest.quantizer.settings == {"damp_percent": 0.05}
    assert manifest.quantizer.modules == len(MATRICES)


def test_harmless_findings_are_told(tmp_path: Path) -> None:
    """Other tokenizer bytes, a leaked path and a stray log don't stand in the way."""
    variant = write_quantized(tmp_path / "v", meta={"offload_to_disk_path": "/tmp/gptqmodel_ab/cd"})
    (variant / "tokenizer.json").write_text("{}")
    (variant / "quant_log.csv").write_text("layer")
    manifest, told = adopted(tmp_path, variant, Bench())
    assert [line.split(": ")[1] for line in told] == ["kept", "machine", "machine", "stray"]
    assert "quant_log.csv" in manifest.files


@pytest.mark.parametrize(
    "told,tensors,problem",
    [
        ({"desc_act": True}, {}, "vLLM no longer loads GPTQ with desc_act"),
        ({"sym": False}, {}, "vLLM loads symmetric GPTQ only"),
        ({}, {f"{BLOCK}.mlp.up_proj.scales": None}, "up_proj.scales: is missing"),
        ({}, {f"{BLOCK}.mlp.up_proj.g_idx": ("I32", (64,), b"\1\0\0\0" * 64)}, "vLLM discards g_idx"),
        ({"bits": 3}, {}, "gptq layers are not supported; GPTQ, AWQ"),
        ({"quant_method": "quark"}, {}, "quark layers are not supported"),
        ({"quant_method": "awq"}, {}, "qweight: has shape 16x64, not 128x8"),
    ],
)
def test_what_vllm_would_stumble_over_is_refused(
    tmp_path: Path, told: dict[str, Any], tensors: dict[str, Any], problem: str
) -> None:
    """It is neither measured nor sealed."""
    variant, bench = write_quantized(tmp_path / "v", tensors=tensors, **told), Bench()
    with pytest.raises(VariantError, match=problem):
        adopted(tmp_path, variant, bench)
    assert bench.runs == 0
    assert not (variant / "manifest.json").exists()


def foreign(tmp_path: Path, scheme: QuantizationScheme) -> Path:
    """A directory as another tool leaves it."""
    form = StorageFormat.of(scheme.compression, scheme.weights)
    plain = preset("w4a16-g64")  # whose tensors make room
    gone: dict[str, Any] = {name: None for layer, shape in MATRICES.items() for name in packed(layer, shape, plain)}
    for layer, (outputs, inputs) in MATRICES.items():
        for part, (dtypes, shape) in parts_of(form, outputs, inputs).items():
            dtype = "F32" if "F32" in dtypes and scheme.compression != "pack-quantized" else dtypes[0]
            gone[f"{layer}.{part}"] = (dtype, shape, ONES[dtype] * math.prod(shape))
        if scheme.compression == "bitsandbytes":
            gone[f"{layer}.weight.quant_state.bitsandbytes__nf4"] = ("U8", (9,), bytes(9))
    variant = write_quantized(tmp_path / "v", tensors=gone)
    config = json.loads((variant / "config.json").read_bytes())
    (variant / "config.json").write_text(json.dumps({**config, "quantization_config": quantization_config(scheme)}))
    (variant / "quantize_config.json").unlink()
    return variant


@pytest.mark.parametrize(
    "case,name,precision,measured_by,warning",
    [
        ("awq", "w4a16-asym-g32", "int4", "replica", ""),
        ("pack-4", "w4a16-g64", "int4", "transformers", ""),
        ("fp8-dynamic", "fp8-dynamic", "fp8", "transformers", ""),
        ("fp8-block", "fp8-block", "fp8", "transformers", ""),
        ("ct-fp8-block", "fp8-block", "fp8", "transformers", ""),
        ("fp8-tensor", "fp8-tensor", "fp8", "transformers", ""),
        ("nvfp4a16", "nvfp4a16", "fp4", "replica", ""),
        ("modelopt-nvfp4", "nvfp4", "fp4", "replica", ""),
        ("mxfp4", "mxfp4", "fp4", "replica", ""),
        ("nf4", "nf4", "fp4", "replica", "engine: config.json: vLLM does not load bitsandbytes"),
    ],
)
def test_formats_of_other_tools(
    tmp_path: Path, case: str, name: str, precision: str, measured_by: str, warning: str
) -> None:
    """They are recognized, linted and sealed; what no supported vLLM has is a warning."""
    scheme = CASES[case]
    if scheme.weights.type == "int":  # the matrices are too small for groups of 128
        size = 32 if case == "awq" else 64
        scheme = replace(scheme, weights=grouped(4, size, symmetric=scheme.weights.symmetric))
    manifest, told = adopted(tmp_path, foreign(tmp_path, scheme), Bench())
    assert (manifest.scheme.name, manifest.scheme.precision) == (name, precision)
    assert measurable_by(manifest.scheme.compression) == measured_by
    assert manifest.id.startswith(f"base-{precision}-")
    assert manifest.quantizer.modules == len(MATRICES)
    assert manifest.scheme.overrides == ()
    assert [line.partition(": ")[2].startswith(warning) for line in told] == [True] * bool(warning)


def test_a_matrix_in_another_format_is_refused(tmp_path: Path) -> None:
    """FP8 in a directory whose config.json says so is held against names, shapes and dtypes."""
    variant = foreign(tmp_path, CASES["fp8-dynamic"])
    config = json.loads((variant / "config.json").read_bytes())
    config["quantization_config"]["config_groups"]["0"]["weights"]["strategy"] = "tensor"
    (variant / "config.json").write_text(json.dumps(config))
    with pytest.raises(VariantError, match=r"weight_scale: has shape 64x1, not scalar"):
        adopted(tmp_path, variant, Bench())


def test_a_manifest_is_never_replaced(tmp_path: Path) -> None:
    """Adopting twice is told."""
    variant, bench = write_quantized(tmp_path / "v"), Bench()
    adopted(tmp_path, variant, bench)
    before = (variant / "manifest.json").read_bytes()
    with pytest.raises(TargetError, match="has a manifest already; nothing was changed"):
        adopted(tmp_path, variant, bench)
    assert (variant / "manifest.json").read_bytes() == before
    assert bench.runs == 1


def test_the_same_files_get_the_same_name(tmp_path: Path) -> None:
    """The name tells contents apart, not places."""
    first, _ = adopted(tmp_path, write_quantized(tmp_path / "v"), Bench())
    second, _ = adopted(tmp_path, write_quantized(tmp_path / "w"), Bench())
    other, _ = adopted(tmp_path, write_quantized(tmp_path / "x", preset("w4a16-g32")), Bench())
    assert first.id == second.id != other.id


@pytest.mark.parametrize(
    "name", ["w4a16-g64", "w4a16-g32", "w8a16-channel", "w8a8", "fp8-dynamic", "fp8-block", "nvfp4a16", "mxfp4"]
)
def test_presets_are_recognized(tmp_path: Path, name: str) -> None:
    """A directory with a preset's numbers gets its name."""
    assert scheme_told(read_artefact(write_quantized(tmp_path / "v", preset(name))), MATRICES) == preset(name)


@pytest.mark.parametrize(
    "formats,expected",
    [
        ({"a.0.up": FOUR, "a.1.up": FOUR}, ()),
        ({"a.0.up": EIGHT, "a.1.up": EIGHT, "a.0.q": FOUR}, (Override(modules="a.*.up", bits=8, group_size=64),)),
        ({"a.0.up": EIGHT, "a.1.up": FOUR}, (Override(modules="a.0.up", bits=8, group_size=64),)),
        ({"a.0.up": None, "a.1.up": None, "a.0.q": FOUR}, (Override(modules="a.*.up"),)),
    ],
)
def test_layers_that_differ_are_exceptions(
    formats: dict[str, StorageFormat | None], expected: tuple[Override, ...]
) -> None:
    """One pattern over all blocks where they agree, single names where they don't."""
    assert exceptions(formats, FOUR) == expected


@pytest.mark.parametrize(
    "told,program",
    [
        ({"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:7.6.0"]}}, ("gptqmodel", "7.6.0")),
        ({"quant_method": "gptq", "meta": {"quantizer": "gptqmodel:1.2"}}, ("gptqmodel", "1.2")),
        ({"quant_method": "gptq", "meta": None}, ("unknown", "unknown")),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "version": "0.9"},
            ("compressed-tensors", "0.9"),
        ),
    ],
)
def test_the_maker_is_told_where_it_is_known(tmp_path: Path, told: dict[str, Any], program: tuple[str, str]) -> None:
    """AutoGPTQ left no trace of itself."""
    variant = write_quantized(tmp_path / "v")
    (variant / "config.json").write_text(json.dumps({"quantization_config": told}))
    made = maker(read_artefact(variant))
    assert (made.backend, made.version) == program
