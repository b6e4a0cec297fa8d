"""Precision and quality of a variant: from its manifest, its config.json or the configuration."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import ManifestError
from config.quality import Interval, Quality
from config.schema import DeclaredQuality, Floor, VariantSettings
from config.variant import PARENT_QUALITY, QualityMeasures, Variant, measured_quality, read_variants
from tests.config.sealed import manifest_of, seal


def read(settings: VariantSettings, relative_to: Path = Path("/")) -> Variant:
    """Read one variant."""
    return read_variants({"v": settings}, relative_to)["v"]


def test_sealed_variant_is_measured(tmp_path: Path) -> None:
    """Precision, quality and id come from the manifest; a relative path is resolved against the file's directory."""
    (tmp_path / "int4").mkdir()
    manifest = seal(tmp_path / "int4", bits=4)
    variant = read(VariantSettings(path="int4"), tmp_path)
    assert (variant.precision, variant.id, variant.quality.source) == ("int4", manifest.id, "measured")
    assert variant.quality == QualityMeasures("measured", 0.02, 0.95, 1.01, 0.4)
    assert variant.failure is None


def test_a_ladder_of_precisions(tmp_path: Path) -> None:
    """A parent, FP8, int8 and int4: each has the precision of its weights, and floors that it meets or misses."""
    schemes: dict[str, dict[str, Any]] = {
        "fp8": {
            "name": "fp8-dynamic",
            "compression": "float-quantized",
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        },
        "int8": {**manifest_of(8)["scheme"], "format": "compressed-tensors", "activation_bits": 8, "group_size": -1},
        "int4": manifest_of(4)["scheme"],
    }
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "config.json").write_text('{"dtype": "bfloat16"}')
    for name, scheme in schemes.items():
        (tmp_path / name).mkdir()
        manifest = seal(tmp_path / name, bits=4)
        written = {**json.loads(manifest.to_json()), "scheme": scheme}
        (tmp_path / name / "manifest.json").write_text(json.dumps(written))
    variants = read_variants({name: VariantSettings(path=name) for name in ("bf16", *schemes)}, tmp_path)
    assert {name: variant.precision for name, variant in variants.items()} == {name: name for name in variants}
    assert all(variant.quality.shortfall(Floor(top1_agreement=0.9)) is None for variant in variants.values())
    assert [name for name, each in variants.items() if not each.quality.shortfall(Floor(top1_agreement=0.99))] == [
        "bf16"
    ]


@pytest.mark.parametrize(
    "config,precision,source",
    [
        ({"dtype": "bfloat16"}, "bf16", "parent"),
        ({"torch_dtype": "float16"}, "fp16", "parent"),
        ({}, "fp32", "parent"),
        ({"quantization_config": {"bits": 4}}, "int4", "unknown"),
        ({"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}, "fp8", "unknown"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "int4", "unknown"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "fp4", "unknown"),
        ({"quantization_config": {}}, "unknown", "unknown"),
    ],
)
def test_unsealed_directory(tmp_path: Path, config: dict[str, Any], precision: str, source: str) -> None:
    """Without a manifest a directory is a parent, or of unknown quality if it is quantized."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    variant = read(VariantSettings(path=str(tmp_path)))
    assert (variant.precision, variant.quality.source, variant.id) == (precision, source, "v")


def test_declared_variant() -> None:
    """A variant without a path has the declared quality, marked as declared."""
    settings = VariantSettings(precision="fp8", quality=DeclaredQuality(top1_agreement=0.98))
    assert read(settings).quality == QualityMeasures("declared", None, 0.98, None)
    assert read(VariantSettings(precision="fp8")).quality.source == "unknown"


@pytest.mark.parametrize("content,word", [(None, "has no config.json"), ("{", "not readable JSON"), ("[]", "object")])
def test_directory_without_model(tmp_path: Path, content: str | None, word: str) -> None:
    """A path without a model is an error that names the problem."""
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ManifestError, match=word):
        read(VariantSettings(path=str(tmp_path)))
    with pytest.raises(ManifestError, match="no such directory"):
        read(VariantSettings(path=str(tmp_path / "nowhere")))


def test_floors_are_held_against_the_worse_end_of_the_interval() -> None:
    """A value that meets its floor by chance does not meet it; the message has both, an end without bound, too."""
    quality = Quality(
        dataset_sha256="d",
        tokens=100,
        kl_mean=0.02,
        kl_p99=0.4,
        top1_agreement=0.95,
        perplexity_ratio=1.01,
        length_ratio=1.0,
        intervals={
            "kl_mean": Interval(low=0.015, high=0.026),
            "top1_agreement": Interval(low=0.94, high=0.96),
            "length_ratio": Interval(low=0.0, high=None),
        },
        verdict="not shown",
    )
    measured = measured_quality(quality)
    assert measured.shortfall(Floor(kl_mean=0.026, top1_agreement=0.94, kl_p99=0.4)) is None
    missed = "kl_mean 0.02, at most 0.026 with 95 % confidence, misses the floor 0.025"
    assert measured.shortfall(Floor(kl_mean=0.025)) == missed
    assert "0.95, at least 0.94 with" in str(measured.shortfall(Floor(top1_agreement=0.945)))
    assert "at most inf" in str(measured.shortfall(Floor(length_ratio=100)))


MEASURED = QualityMeasures("measured", kl_mean=0.02, top1_agreement=0.95, perplexity_ratio=1.01, kl_p99=0.4)


@pytest.mark.parametrize(
    "floor,word",
    [
        ({}, None),
        ({"top1_agreement": 0.95}, None),
        ({"top1_agreement": 0.96}, "top1_agreement 0.95 misses the floor 0.96"),
        ({"kl_mean": 0.02}, None),
        ({"kl_mean": 0.01}, "kl_mean 0.02 misses"),
        ({"perplexity_ratio": 1.0}, "perplexity_ratio 1.01 misses"),
        ({"kl_p99": 0.4}, None),
        ({"kl_p99": 0.39}, "kl_p99 0.4 misses the floor 0.39"),
        ({"length_ratio": 2}, "length_ratio is unknown, the floor is 2"),
    ],
)
def test_shortfall(floor: dict[str, float], word: str | None) -> None:
    """A value equal to the limit, or better, meets a floor."""
    shortfall = MEASURED.shortfall(Floor(**floor))
    assert (shortfall is None) if word is None else (shortfall is not None and word in shortfall)


@given(
    st.builds(
        Floor,
        top1_agreement=st.floats(0, 1),
        kl_mean=st.floats(0, 9),
        perplexity_ratio=st.floats(1, 9),
        kl_p99=st.floats(0, 9),
        length_ratio=st.floats(1, 9),
    )
)
def test_parent_and_unknown_quality(floor: Floor) -> None:
    """The parent meets every floor; unknown quality meets none."""
    assert PARENT_QUALITY.shortfall(floor) is None
    assert QualityMeasures("unknown").shortfall(floor) is not None
