"""Transformed models compute what their bases compute, in every family that has transforms; others are refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config.manifest import Manifest
from quantize.base import read_base
from quantize.errors import RecipeError
from quantize.model_files.safetensors_header import StoredTensor
from quantize.planning.block_form import BLOCK_FORMS
from quantize.planning.transforms import (
    ROTATED_FAMILIES,
    TRANSFORMS,
    planned_base,
    require_transformable,
    settled_transforms,
    transform_bytes,
    unsmoothed_reason,
)
from quantize.schemes.scheme import preset
from tests.quantize.chats import chat, write_chats
from tests.quantize.command_line import run
from tests.quantize.families import FAMILIES, write_family
from tests.quantize.models import write_hollow_model, write_tiny_llama

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(400),
    # transformers loads torchao, whose docstrings say "\\." when they are first compiled.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

TEXT = [message["content"] for number in range(60) for message in chat(number)["messages"]]
# Of the largest logit, between two fp32 models of two layers.
CLOSE = 1e-5


class Silent:
    """Stands at the parent's end of a worker's channel."""

    def progress(self, done: int, total: int) -> None:
        """Ignore the progress."""


SMOOTHED = [name for name in FAMILIES if FAMILIES[name].model_type in BLOCK_FORMS]
ROTATIONS = [("rotate-r1",), ("rotate-r2",), TRANSFORMS]


@pytest.fixture(scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a family in fp32, whose norms and biases are not the trivial ones."""
    directory = write_family(tmp_path_factory.mktemp(request.param) / "base", request.param, TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_()
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "base, names",
    [
        (name, names)
        for name in SMOOTHED
        for names in [("smooth",), *(ROTATIONS if FAMILIES[name].model_type in ROTATED_FAMILIES else [])]
    ],
    indirect=["base"],
)
def test_logits_stay(base: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Alone and together, with biases, tied embeddings, grouped keys and values, norms of keys, joined matrices."""
    samples = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(1))
    transformed(base, tmp_path, names, samples.tolist())
    wanted, found = logits(base, samples), logits(tmp_path / "into", samples)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < CLOSE
    untied = json.loads((tmp_path / "into" / "config.json").read_text())["tie_word_embeddings"] is False
    assert untied or "rotate-r1" not in names


@pytest.mark.parametrize("base", SMOOTHED, indirect=True)
def test_what_is_added_to_the_residual_stream(base: Path) -> None:
    """The outputs of o and down themselves, in the families of which the table says so, and in no other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    form = BLOCK_FORMS[model.config.model_type]
    block, seen = model.get_decoder().layers[1], dict[str, Any]()
    if hasattr(block, "residual_multiplier"):
        block.residual_multiplier = 0.22  # as IBM's models have it
    block.register_forward_hook(lambda _block, inputs, output: seen.update(before=inputs[0], after=output))
    reader = block.get_submodule(form.mlp_norm or "mlp")
    reader.register_forward_pre_hook(lambda _reader, inputs: seen.update(middle=inputs[0]))
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        if writer := dict(block.named_modules()).get(name):
            writer.register_forward_hook(lambda _writer, _inputs, output: seen.setdefault("added", []).append(output))
    with torch.inference_mode():
        model(torch.randint(2, 256, (1, 40), generator=torch.Generator().manual_seed(1)))
    first, second = [*seen["added"], torch.zeros(1)][:2]  # of experts there are many
    assert form.adds == (
        torch.allclose(seen["middle"], seen["before"] + first, atol=1e-5)
        and torch.allclose(seen["after"], seen["middle"] + second, atol=1e-5)
    )


def transformed(base: Path, folder: Path, names: tuple[str, ...], samples: list[list[int]]) -> None:
    """Run the child's work in this process, for w8a8."""
    from quantize.transforms.transform_child import transform  # noqa: PLC0415

    job: dict[str, Any] = {
        "base": str(base),
        "transforms": list(names),
        "seed": 0,
        "samples": samples,
        "roundings": dict.fromkeys(read_base(base, digested=False).shapes, (8, -1, 8)),
        "scratch": str(folder / "scratch"),
        "into": str(folder / "into"),
    }
    transform(job, Silent())  # type: ignore[arg-type]


def logits(directory: Path, tokens: Any) -> Any:
    """What a model says in fp32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return model(tokens).logits


def test_a_variant_of_a_transformed_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solved, written, linted, and measured against the original; the manifest names the transforms."""
    monkeypatch.setenv("QUANTGATE_HOME", str(tmp_path / "home"))
    write_tiny_llama(tmp_path / "tiny", TEXT)
    write_chats(tmp_path / "chats.jsonl", 60)
    flags = [flag for name in TRANSFORMS for flag in ("--transform", name)]
    evaluation = ("--eval-prompts", 0, "--eval-tokens", 500)
    data, out = ("--data", tmp_path / "chats.jsonl"), tmp_path / "variant"
    done = run("quantize_main", tmp_path / "tiny", "--scheme", "w8a8", *flags, *data, *evaluation, "--out", out)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(out)
    assert manifest.quantizer.settings["transforms"] == "rotate-r1 rotate-r2 smooth"
    assert manifest.base.digest == read_base(tmp_path / "tiny").digest
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["gemma3_text", "glm4"])
def test_w8a8_is_smoothed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where no transform is named; with norms of another formula, and with joined matrices on disk."""
    monkeypatch.setenv("QUANTGATE_HOME", str(tmp_path / "home"))
    write_family(tmp_path / "tiny", name, TEXT)
    write_chats(tmp_path / "chats.jsonl", 60)
    evaluation = ("--eval-prompts", 0, "--eval-tokens", 500)
    data, out = ("--data", tmp_path / "chats.jsonl"), tmp_path / "variant"
    done = run("quantize_main", tmp_path / "tiny", "--scheme", "w8a8", *data, *evaluation, "--out", out)
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(out)
    assert manifest.quantizer.settings["transforms"] == "smooth"
    assert manifest.quality.kl_mean < 0.05


def test_smoothing_lowers_the_error_of_rounded_inputs(tmp_path: Path) -> None:
    """A channel a hundred times as large as the others takes all of int8's steps; scales give them back."""
    from quantize.schemes.module_config import WeightArgs  # noqa: PLC0415
    from quantize.transforms.smoothing import ChannelActivations, Rounding, ScaleGroup, best_scales  # noqa: PLC0415

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(64, 32, generator=generator)
    tokens[:, 5] *= 100
    read = ChannelActivations(tokens.abs().amax(0), tokens.square().mean(0), tokens)
    weights = {"layer": torch.randn(16, 32, generator=generator)}
    roundings = {"layer": Rounding(WeightArgs(8, -1), 8)}
    scales = best_scales(ScaleGroup("norm", ("layer",)), read, weights, roundings)
    assert int(scales.argmax()) == 5
    assert float(scales[5] / scales.median()) > 3


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].model_type not in BLOCK_FORMS])
def test_other_families_are_refused(tmp_path: Path, name: str) -> None:
    """Linear attention, MLA, several modalities: refused where scales are asked for, else solved without."""
    base = read_base(write_hollow_model(tmp_path / "base", model_type=FAMILIES[name].model_type), digested=False)
    with pytest.raises(RecipeError, match="not supported"):
        require_transformable(base, preset("w8a8"), ("smooth",))
    assert settled_transforms(None, base, preset("w8a8")) == ()
    assert "not supported" in unsmoothed_reason(base)


@pytest.mark.parametrize("name", sorted(BLOCK_FORMS.keys() - ROTATED_FAMILIES))
def test_families_without_rotations(tmp_path: Path, name: str) -> None:
    """Norms after the layers or with another formula, joined matrices, experts: scales only."""
    base = read_base(write_hollow_model(tmp_path / "base", model_type=name), digested=False)
    require_transformable(base, preset("w8a8"), ("smooth",))
    with pytest.raises(RecipeError, match="rotations"):
        require_transformable(base, preset("w8a8"), ("rotate-r2", "smooth"))


def test_the_scheme_decides_where_nothing_is_named(tmp_path: Path) -> None:
    """Schemes that round activations are smoothed, others are not; what is named counts, also nothing."""
    base = read_base(write_hollow_model(tmp_path / "base"), digested=False)
    assert settled_transforms(None, base, preset("w8a8")) == ("smooth",)
    assert settled_transforms((), base, preset("w8a8")) == ()
    assert settled_transforms(("rotate-r2",), base, preset("w8a8")) == ("rotate-r2",)
    assert settled_transforms(None, base, preset("w4a16-g64")) == ()
    assert settled_transforms(None, base, preset("fp8-dynamic")) == ()


def test_a_scheme_without_data_takes_no_transforms(tmp_path: Path) -> None:
    """FP8 is rounded straight from the base."""
    base = read_base(write_hollow_model(tmp_path / "base"), digested=False)
    with pytest.raises(RecipeError, match="takes no transforms"):
        require_transformable(base, preset("fp8-dynamic"), ("rotate-r2",))


def test_r1_costs_an_output_matrix_where_embeddings_are_tied(tmp_path: Path) -> None:
    """As large as the embeddings; a base that has one pays nothing."""
    base = read_base(write_hollow_model(tmp_path / "base"), digested=False)
    assert planned_base(base, ("rotate-r2", "smooth")) is base
    untied = planned_base(base, ("rotate-r1",))
    assert untied.tensors["lm_head.weight"].bytes == base.tensors["model.embed_tokens.weight"].bytes
    own = replace(base, tensors={**base.tensors, "lm_head.weight": StoredTensor((8, 576), 8 * 576 * 2)})
    assert planned_base(own, ("rotate-r1",)).tensors.keys() == own.tensors.keys()
    assert transform_bytes(base, TRANSFORMS) == 2 * transform_bytes(base, ("rotate-r1",))
