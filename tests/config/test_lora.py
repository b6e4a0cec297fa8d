"""LoRA adapters: what vLLM loads, and the variants that they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from config.errors import ManifestError
from config.lora import LORA_RANKS, engine_rank, largest_rank, read_lora, unsupported
from config.schema import Settings, VariantSettings
from config.variant import QualityMeasures, read_variants
from tests.config.sealed import seal

PEFT = {"peft_type": "LORA", "r": 12, "lora_alpha": 24, "target_modules": ["q_proj"], "bias": "none"}


def adapter(folder: Path, **config: Any) -> Path:
    """A directory that looks like an adapter to everything that doesn't load it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**PEFT, **config}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    "config,reason",
    [
        ({}, None),
        ({"init_lora_weights": "gaussian"}, None),
        ({"rank_pattern": {"q_proj": 64}}, None),
        ({"use_rslora": True}, None),
        ({"peft_type": "IA3"}, "peft_type IA3 is not supported"),
        ({"r": 0}, "rank 0 is not supported"),
        ({"r": 1024}, "from 1 to 512"),
        ({"r": None}, "rank None is not supported"),
        ({"rank_pattern": {"q_proj": 513}}, "is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
        ({"bias": "all"}, "bias is not supported"),
        ({"lora_bias": True}, "bias is not supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa changes the base model"),
    ],
)
def test_what_vllm_loads(config: dict[str, Any], reason: str | None) -> None:
    """An adapter that vLLM would refuse at its start is refused when the configuration is read."""
    found = unsupported({**PEFT, **config})
    assert found == reason if reason is None else reason in (found or "")


@pytest.mark.parametrize("rank,flag", [(1, 1), (2, 8), (8, 8), (12, 16), (65, 128), (300, 320), (512, 512)])
def test_rank_of_the_engine(rank: int, flag: int) -> None:
    """vLLM accepts few values of --max-lora-rank; the smallest that is large enough costs least memory."""
    assert engine_rank(rank) == flag
    assert flag in LORA_RANKS


def test_an_adapter_is_read(tmp_path: Path) -> None:
    """Its rank is the largest of all modules."""
    path = adapter(tmp_path / "math", rank_pattern={"v_proj": 32})
    lora = read_lora("math", path)
    assert (lora.name, lora.path, lora.rank) == ("math", path, 32)
    assert largest_rank(PEFT) == 12


@pytest.mark.parametrize(
    "missing,word",
    [("adapter_config.json", "has no adapter_config"), ("adapter_model.safetensors", "has no adapter_m")],
)
def test_not_an_adapter(tmp_path: Path, missing: str, word: str) -> None:
    """A directory without configuration or weights is refused."""
    path = adapter(tmp_path / "math")
    (path / missing).unlink()
    with pytest.raises(ManifestError, match=word):
        read_lora("math", path)


def variant(path: Path, **lora: Any) -> VariantSettings:
    """A variant with adapters."""
    return VariantSettings.model_validate({"path": str(path), "lora": lora})


def test_an_adapter_is_a_variant(tmp_path: Path) -> None:
    """It has the precision of its base; its quality is unknown, declared, or that of a reference."""
    (tmp_path / "bf16").mkdir()
    (tmp_path / "bf16" / "config.json").write_text('{"dtype": "bfloat16"}')
    (tmp_path / "int4").mkdir()
    seal(tmp_path / "int4", bits=4)
    path = str(adapter(tmp_path / "math"))
    variants = read_variants(
        {
            "hi": variant(tmp_path / "bf16", math=path),
            "lo": variant(tmp_path / "int4", math=path, law={"path": path, "quality": {"top1_agreement": 0.9}}),
        },
        Path(),
    )
    assert list(variants) == ["hi", "lo", "hi-math", "lo-math", "lo-law"]
    assert variants["lo"].names == {"lo", "lo-math", "lo-law"}
    assert [variants[name].precision for name in ("hi-math", "lo-math")] == ["bf16", "int4"]
    assert variants["hi-math"].quality.source == "parent"
    assert variants["lo-math"].quality == QualityMeasures("unknown")
    assert variants["lo-law"].quality == QualityMeasures("declared", None, 0.9, None)
    assert variants["lo-math"].path is None


def test_an_adapter_of_a_failed_base_has_failed(tmp_path: Path) -> None:
    """The base's own evaluation counts for what is built on it."""
    seal(tmp_path, bits=4, verdict="fail")
    variants = read_variants({"lo": variant(tmp_path, math=str(adapter(tmp_path / "math")))}, Path())
    assert variants["lo-math"].failure == variants["lo"].failure
    assert variants["lo-math"].failure is not None


def test_a_broken_adapter_is_left_out(tmp_path: Path) -> None:
    """The base and the other adapters stay; the error is placed at the adapter."""
    (tmp_path / "config.json").write_text("{}")
    settings = {"a": variant(tmp_path, good=str(adapter(tmp_path / "good")), bad=str(tmp_path / "none"))}
    errors = []
    variants = read_variants(settings, Path(), lambda location, error: errors.append((location, str(error))))
    assert list(variants) == ["a", "a-good"]
    ((location, error),) = errors
    assert location == ("a", "lora", "bad")
    assert "no such directory" in error
    with pytest.raises(ManifestError):
        read_variants(settings, Path())


def test_adapters_are_served_by_the_replicas_of_their_base() -> None:
    """A replica of the base makes both served."""
    table = {"precision": "int4", "lora": {"math": {}}}
    settings = Settings.model_validate(
        {"variants": {"a": table, "b": table}, "replicas": [{"variant": "a", "url": "http://h"}]}
    )
    assert settings.served_variants == {"a", "a-math"}
    assert settings.loras == {"a-math": ("a", "math"), "b-math": ("b", "math")}
