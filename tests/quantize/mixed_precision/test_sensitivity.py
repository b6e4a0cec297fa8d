"""Measuring on a tiny Llama: assignments as wholes and units alone, with the integers that solutions have."""

import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from quantize.base import read_base
from quantize.errors import RecipeError
from quantize.mixed_precision.module_groups import module_groups_of
from quantize.running.worker import WorkerChannel
from tests.quantize.chats import chat
from tests.quantize.models import write_tiny_llama

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.layer_checkpoint import LayerCheckpoint, ModuleSolution, dense_weight  # noqa: E402
from quantize.dense_models import load_base  # noqa: E402
from quantize.mixed_precision.sensitivity import (  # noqa: E402
    Assembled,
    divergence,
    linear_layers,
    measure,
    read_hidden,
    read_parent,
)

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(120)]

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base whose logits are far enough apart for divergences to be more than noise, with two solutions."""
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    text = [message["content"] for number in range(40) for message in chat(number)["messages"]]
    base = write_tiny_llama(tmp_path_factory.mktemp("sensitivity") / "tiny", text, layers=3)
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    tensors = load_file(base / "model.safetensors")
    tensors |= {name: 4 * tensor for name, tensor in tensors.items() if "_proj" in name or "embed" in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for bits in (4, 8):
        write_solution(base.parent / f"solved-{bits}", tensors, bits)
    return base


def write_solution(folder: Path, tensors: Mapping[str, Any], bits: int) -> None:
    """Round every layer to nearest, one scale an output, as a solver writes it down."""
    folder.mkdir()
    checkpoint = LayerCheckpoint(folder, torch.float32)
    half = 1 << (bits - 1)
    for name, tensor in tensors.items():
        if "_proj" in name:
            weight = tensor.float()
            scale = (weight.abs().amax(dim=1, keepdim=True) / (half - 0.5)).half().float()
            integers = (weight / scale).round().clamp(-half, half - 1) + half
            zero, g_idx = torch.full_like(scale, half), torch.zeros(weight.shape[1], dtype=torch.int32)
            dense = dense_weight(integers.to(torch.uint8), scale, zero, g_idx)
            checkpoint.write(name.removesuffix(".weight"), ModuleSolution(dense, scale, zero, g_idx, 0.1, 0.01, 9))


def texts(vocabulary: int = 250) -> list[dict[str, Any]]:
    """Token ids as good as any for a random model; of the second text, the end is scored."""
    generator = torch.Generator().manual_seed(3)
    return [
        {"ids": torch.randint(2, vocabulary, (length,), generator=generator).tolist(), "first": first}
        for length, first in ((150, 0), (90, 30))
    ]


def job(base: Path) -> dict[str, Any]:
    """What the parent asks for: both solutions as wholes, and every unit of the first alone."""
    module_groups = module_groups_of(read_base(base).shapes, "cuda")
    modules = [module for module_group in module_groups for module in module_group.modules]
    return {
        "base": str(base),
        "solved": [str(base.parent / f"solved-{bits}") for bits in (4, 8)],
        "whole": texts(),
        "short": texts()[1:],
        "assignments": [dict.fromkeys(modules, 0), dict.fromkeys(modules, 1)],
        "units": {group.name: list(group.modules) for group in module_groups},
    }


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the child's work here."""
    return measure(asked, WorkerChannel(io.TextIOWrapper(io.BytesIO())))


@pytest.fixture(scope="module")
def told(tiny: Path) -> dict[str, Any]:
    """What the child tells of the tiny base."""
    return measured(job(tiny))


def kl(base: Path, assignment: Mapping[str, int], read: list[dict[str, Any]]) -> float:
    """The divergence of an assignment, by the whole model from its first layer on."""
    with torch.inference_mode():
        model = load_base(base)
        parent = read_parent(model, read)
        assembled = Assembled(linear_layers(model, [*assignment], base), [*map(Path, job(base)["solved"])])
        assembled.put(assignment)
        return divergence(model, parent)


def test_assignments_are_measured_as_wholes(tiny: Path, told: dict[str, Any]) -> None:
    """The figure is that of the model with all these integers; 8 bits diverge less than a fiftieth of 4."""
    asked = job(tiny)
    for assignment, found in zip(asked["assignments"], told["kl"], strict=True):
        assert found == pytest.approx(kl(tiny, assignment, texts()), rel=1e-4)
    assert 0 < told["kl"][1] < told["kl"][0] / 50


def test_units_are_measured_alone_in_the_parent(tiny: Path, told: dict[str, Any]) -> None:
    """The first solution's integers in one unit and the parent's weights in all others, whatever was tried before."""
    asked = job(tiny)
    for unit in (DOWN, "model.layers.2.self_attn.qkv_proj"):
        alone = dict.fromkeys(asked["units"][unit], 0)
        assert told["units"][unit] == pytest.approx(kl(tiny, alone, texts()[1:]), rel=1e-3)


def test_units_add_up(tiny: Path, told: dict[str, Any]) -> None:
    """Errors of different units point in different directions: the whole diverges by about the sum of its units."""
    whole = kl(tiny, job(tiny)["assignments"][0], texts()[1:])
    assert sum(told["units"].values()) == pytest.approx(whole, rel=0.4)


def test_measuring_is_the_same_every_time(tiny: Path, told: dict[str, Any]) -> None:
    """A second run gives the same figures, bit for bit, with progress to the last measurement."""
    stream = io.TextIOWrapper(io.BytesIO())
    assert measure(job(tiny), WorkerChannel(stream)) == told
    stream.seek(0)
    assert stream.read().splitlines()[-1] == '{"progress": [14, 14]}'


def test_a_shortened_model_says_what_the_whole_one_says(tiny: Path) -> None:
    """Starting at a layer instead of at the embeddings changes nothing but the time it takes."""
    with torch.inference_mode():
        model = load_base(tiny)
        parent = read_parent(model, texts())
        hidden = read_hidden(model, parent)
        assert hidden
        module = model.get_submodule(DOWN)
        module.weight.data = module.weight.data * 1.05
        whole = divergence(model, parent)
        assert whole > 0
        assert divergence(model, parent, hidden, 1) == pytest.approx(whole, rel=1e-4)
        # From the layer behind the change on, nothing has changed.
        assert divergence(model, parent, hidden, 2) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("module", ["model.layers.1.mlp.experts.0.up_proj", "model.layers.1.mlp"])
def test_a_module_that_isn_t_in_the_model_is_told(tiny: Path, module: str) -> None:
    """Some architectures store layers apart that they compute together."""
    asked = job(tiny)
    asked["assignments"][0][module] = 0
    with pytest.raises(RecipeError, match=f"has no linear layer {module}; scheme auto can't measure this"):
        measured(asked)


def test_a_divergence_that_is_no_number_is_told(tiny: Path, tmp_path: Path) -> None:
    """It would win or lose every comparison."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.copytree(tiny, tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="its logits are no numbers; mend it or copy it again"):
        measured(job(tiny) | {"base": str(tmp_path / "broken")})
