"""Sensitivity on a tiny Llama: what is measured is what rounding costs there, and the rest follows from it."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from quantize.base import read_base
from quantize.errors import RecipeError
from quantize.mixed_precision.module_groups import module_groups_of
from quantize.running.worker import WorkerChannel
from quantize.schemes.module_config import WeightArgs
from tests.quantize.chats import chat
from tests.quantize.models import write_tiny_llama

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.scales import best_scales  # noqa: E402
from quantize.dense_models import load_base  # noqa: E402
from quantize.mixed_precision import sensitivity  # noqa: E402
from quantize.mixed_precision.sensitivity import divergence, measure, record_reference, rounded, second_moments  # noqa: E402

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(120)]

DOWN = "model.layers.1.mlp.down_proj"
SMALLEST, FINEST = WeightArgs(4, 128), WeightArgs(4, 32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random base whose logits are far enough apart for divergences to be more than noise."""
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    text = [message["content"] for number in range(40) for message in chat(number)["messages"]]
    base = write_tiny_llama(tmp_path_factory.mktemp("sensitivity") / "tiny", text, layers=3)
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    tensors = load_file(base / "model.safetensors")
    tensors |= {name: 4 * tensor for name, tensor in tensors.items() if "_proj" in name or "embed" in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.fixture
def model(tiny: Path) -> Iterator[Any]:
    """The base in memory, fresh."""
    with torch.inference_mode():
        yield load_base(tiny)


def samples(vocabulary: int = 250) -> list[list[int]]:
    """Token ids as good as any for a random model."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, vocabulary, (length,), generator=generator).tolist() for length in (150, 90)]


def job(base: Path) -> dict[str, Any]:
    """What the parent asks for: every unit, on CUDA, where there are most choices."""
    module_groups = module_groups_of(read_base(base).shapes, "cuda")
    asked = {
        module_group.name: {
            "modules": list(module_group.modules),
            "choices": [[one.bits, one.group_size] for one in module_group.choices],
        }
        for module_group in module_groups
    }
    return {"base": str(base), "samples": samples(), "units": asked}


@pytest.fixture(scope="module")
def told(tiny: Path) -> dict[str, list[float]]:
    """What the child tells of the tiny base."""
    return dict(measure(job(tiny), WorkerChannel(io.TextIOWrapper(io.BytesIO())))["kl"])


def cost(model: Any, changed: Mapping[str, WeightArgs]) -> float:
    """The divergence with some modules rounded, by the whole model from its first layer on."""
    taken = samples()
    reference_outputs = record_reference(model, taken)
    moments = second_moments(model, taken, {name: model.get_submodule(name) for name in changed})
    for name, weight_args in changed.items():
        module = model.get_submodule(name)
        module.weight.data = rounded(module.weight.data, moments[name], weight_args)
    return divergence(model, reference_outputs, taken, 0)


@pytest.mark.parametrize("bits,group_size", [(4, 32), (4, 128), (8, 32), (8, -1)])
def test_rounding_gives_what_a_file_can_hold(bits: int, group_size: int) -> None:
    """One scale a group, with integers of so many bits, and nothing further off than these leave."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 128, generator=generator)
    found = rounded(weight, torch.ones(128), WeightArgs(bits, group_size))
    size = 128 if group_size < 0 else group_size
    half = 1 << (bits - 1)
    for first in range(0, 128, size):
        group = slice(first, first + size)
        integers = found[:, group] / best_scales(weight[:, group], torch.ones(size), bits).unsqueeze(1)
        assert torch.allclose(integers, integers.round(), atol=1e-3)
        assert -half <= integers.round().min()
        assert integers.round().max() <= half - 1
    assert (found - weight).norm() < (0.2 if bits == 4 else 0.02) * weight.norm()


def test_rounding_spares_the_inputs_that_count() -> None:
    """An input that is large keeps its weights better than it would among equals."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 32, generator=generator)
    moment = torch.ones(32)
    moment[5] = 1000.0
    alike, weighed = ((rounded(weight, one, FINEST) - weight)[:, 5].square().sum() for one in (torch.ones(32), moment))
    assert weighed < 0.5 * alike


def test_the_reference_is_measured_at_the_logits(tiny: Path, model: Any, told: dict[str, list[float]]) -> None:
    """The figure of a unit's smallest numbers is the divergence of the model with that unit rounded."""
    assert told[DOWN][0] == pytest.approx(cost(model, {DOWN: SMALLEST}), rel=1e-4)


@pytest.mark.parametrize("module_group,choice", [(DOWN, 2), ("model.layers.0.self_attn.qkv_proj", 1), (DOWN, 3)])
def test_other_numbers_follow_from_the_reference(
    tiny: Path, model: Any, told: dict[str, list[float]], module_group: str, choice: int
) -> None:
    """Divergence is quadratic in small errors: what is scaled is close to what would be measured."""
    asked = job(tiny)["units"][module_group]
    direct = cost(model, dict.fromkeys(asked["modules"], WeightArgs(*asked["choices"][choice])))
    assert told[module_group][choice] == pytest.approx(direct, rel=0.3)


def test_units_add_up(tiny: Path, model: Any, told: dict[str, list[float]]) -> None:
    """The errors of different units point in different directions: the sum is what all of them cost together."""
    asked = job(tiny)["units"]
    everything = {module: SMALLEST for module_group in asked.values() for module in module_group["modules"]}
    assert sum(costs[0] for costs in told.values()) == pytest.approx(cost(model, everything), rel=0.3)


def test_finer_numbers_cost_less(told: dict[str, list[float]]) -> None:
    """Among those of equal bits, and 8 bits less than a hundredth of 4 bits."""
    for costs in told.values():
        assert sorted(costs, reverse=True) == costs
        assert 0 < costs[3] < costs[0] / 50


def test_measuring_leaves_the_model_as_it_was_and_is_the_same_every_time(
    tiny: Path, told: dict[str, list[float]]
) -> None:
    """A second run gives the same figures, bit for bit, with progress to the last unit."""
    stream = io.TextIOWrapper(io.BytesIO())
    assert measure(job(tiny), WorkerChannel(stream))["kl"] == told
    stream.seek(0)
    assert stream.read().splitlines()[-1] == '{"progress": [12, 12]}'


def test_a_shortened_model_says_what_the_whole_one_says(tiny: Path, model: Any) -> None:
    """Starting at a layer instead of at the embeddings changes nothing but the time it takes."""
    reference_outputs = record_reference(model, samples())
    assert reference_outputs.hidden
    module = model.get_submodule(DOWN)
    module.weight.data = module.weight.data * 1.05
    whole = divergence(model, sensitivity.ReferenceOutputs(reference_outputs.answers, ()), samples(), 0)
    assert whole > 0
    assert divergence(model, reference_outputs, samples(), 1) == pytest.approx(whole, rel=1e-4)
    # From the layer behind the change on, nothing has changed.
    assert divergence(model, reference_outputs, samples(), 2) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "changes,problem",
    [
        ({"modules": ["model.layers.1.mlp.experts.0.up_proj"]}, r"has no linear layer model.layers.1.mlp.experts.0"),
        ({"modules": ["model.layers.1.mlp"]}, r"has no linear layer model.layers.1.mlp;"),
    ],
)
def test_a_module_that_isn_t_in_the_model_is_told(tiny: Path, changes: dict[str, Any], problem: str) -> None:
    """Some architectures store layers apart that they compute together."""
    asked = job(tiny)
    asked["units"] = {DOWN: asked["units"][DOWN] | changes}
    with pytest.raises(RecipeError, match=problem):
        measure(asked, WorkerChannel(io.TextIOWrapper(io.BytesIO())))


def test_a_divergence_that_is_no_number_is_told(tiny: Path, tmp_path: Path) -> None:
    """It would win or lose every comparison."""
    import shutil  # noqa: PLC0415

    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="its logits are no numbers; mend it or copy it again"):
        measure(job(broken), WorkerChannel(io.TextIOWrapper(io.BytesIO())))
