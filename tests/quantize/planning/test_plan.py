"""From request to recipe: what fits, what doesn't, and what a budget starts from."""

from dataclasses import replace
from pathlib import Path

import pytest

from config.manifest import Engine, Override
from quantize.errors import RecipeError
from quantize.planning.plan import calibration_split, check_numbers, settled_scheme
from quantize.planning.recipe import Budget
from quantize.planning.request import Request, TextFile
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.module_config import WeightArgs, weight_args_of
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SolverSettings
from tests.quantize.chats import write_chats
from tests.quantize.shapes import QWEN_72B, QWQ_32B

REQUEST = Request(Path("/models/QwQ-32B"), preset("w4a16-g128"), "cuda", Path("out"))
SMALLEST = predicted_bytes(QWQ_32B, preset("w4a16-g128"))


def test_a_plain_request_keeps_its_scheme() -> None:
    """What fits is taken as it is."""
    assert settled_scheme(REQUEST, QWQ_32B) == preset("w4a16-g128")


@pytest.mark.parametrize(
    "changed,problem",
    [
        (replace(REQUEST, scheme=preset("w4a16-g128").with_weights(num_bits=3)), "not of 3"),
        (replace(REQUEST, scheme=preset("w8a16-g128"), engine="cpu"), "doesn't load on engine cpu"),
        (replace(REQUEST, samples=3), "3 samples are too few"),
        (replace(REQUEST, max_tokens=8), "8 tokens a sample are too few"),
        (replace(REQUEST, settings=SolverSettings(damp=(0.01, 1.0))), "damp 1 is out of range"),
    ],
)
def test_what_no_base_could_do_is_refused_first(changed: Request, problem: str) -> None:
    """Such a request needs no look at the base, which may take minutes to digest."""
    with pytest.raises(RecipeError, match=problem):
        check_numbers(changed)


def test_shares_are_checked_with_module_and_numbers() -> None:
    """Asking for GPUs that can't share the model names what stands in the way and what works."""
    with pytest.raises(RecipeError) as caught:
        settled_scheme(replace(REQUEST, tensor_parallel=4), QWEN_72B)
    assert "tensor_parallel 4 doesn't fit: model.layers.0.mlp.down_proj: 29568 inputs are 231 groups" in str(
        caught.value
    )
    assert str(caught.value).endswith("possible: 1")
    assert settled_scheme(replace(REQUEST, tensor_parallel=4), QWQ_32B) == preset("w4a16-g128")


def test_a_fused_layer_is_not_torn() -> None:
    """An exception for v alone is refused."""
    torn = preset("w4a16-g128").model_copy(update={"overrides": (Override(modules="*.v_proj", bits=8),)})
    with pytest.raises(RecipeError, match="as one matrix"):
        settled_scheme(replace(REQUEST, scheme=torn), QWQ_32B)


def test_a_budget_starts_from_the_smallest_that_loads() -> None:
    """4 bits and the widest groups everywhere; modules that the user decided stay so."""
    start = settled_scheme(replace(REQUEST, scheme=Budget(max_bytes=SMALLEST)), QWQ_32B)
    assert start == preset("w4a16-g128")
    kept = Budget(max_kl=0.1, overrides=(Override(modules="*.layers.0.*"),))
    start = settled_scheme(replace(REQUEST, scheme=kept), QWQ_32B)
    assert weight_args_of("model.layers.0.mlp.up_proj", start) is None
    assert weight_args_of("model.layers.1.mlp.up_proj", start) == WeightArgs(4, 128)


def test_groups_are_as_wide_as_each_module_allows() -> None:
    """29568 is divided by 32 only twice over: the other modules still get 128."""
    base = replace(QWQ_32B, shapes={"model.layers.0.mlp.up_proj": (64, 256), "model.layers.0.mlp.down_proj": (64, 96)})
    start = settled_scheme(replace(REQUEST, scheme=Budget(max_kl=0.1)), base)
    assert weight_args_of("model.layers.0.mlp.up_proj", start) == WeightArgs(4, 128)
    assert weight_args_of("model.layers.0.mlp.down_proj", start) == WeightArgs(4, 32)


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_with_zero_points_it_is_another_file_format(engine: Engine) -> None:
    """4 bits in the widest groups, as compressed-tensors; modules with narrower groups are exceptions."""
    request = replace(REQUEST, engine=engine)
    budget = Budget(max_kl=0.1, zero_points=True)
    assert settled_scheme(replace(request, scheme=budget), QWQ_32B) == preset("w4a16-asym")
    base = replace(QWQ_32B, shapes={"model.layers.0.mlp.up_proj": (64, 256), "model.layers.0.mlp.down_proj": (64, 96)})
    start = settled_scheme(replace(request, scheme=budget), base)
    assert (start.compression, start.sym) == ("pack-quantized", False)
    assert weight_args_of("model.layers.0.mlp.up_proj", start) == WeightArgs(4, 128)
    assert weight_args_of("model.layers.0.mlp.down_proj", start) == WeightArgs(4, 32)


def test_what_the_user_decided_is_not_widened() -> None:
    """An exception for a kind of modules leaves nothing to widen in it."""
    base = replace(QWQ_32B, shapes={"model.layers.0.mlp.up_proj": (64, 96), "model.layers.0.mlp.down_proj": (64, 256)})
    decided = Override(modules="*.down_proj")
    start = settled_scheme(replace(REQUEST, scheme=Budget(max_kl=0.1, overrides=(decided,))), base)
    assert start.overrides == (decided,)


def test_a_budget_below_everything_is_refused() -> None:
    """The message has the least that is possible."""
    with pytest.raises(RecipeError, match=r"the smallest variant that loads, w4a16-g128, has 19[0-9]{3}"):
        settled_scheme(replace(REQUEST, scheme=Budget(max_bytes=SMALLEST - 1)), QWQ_32B)


@pytest.mark.parametrize("budgeted", [True, False])
def test_a_model_without_blocks_is_refused(budgeted: bool) -> None:
    """There is nothing that GPTQ could quantize."""
    request = replace(REQUEST, scheme=Budget(max_kl=1.0)) if budgeted else REQUEST
    with pytest.raises(RecipeError, match="has no linear layers in blocks"):
        settled_scheme(request, replace(QWQ_32B, shapes={}))


def test_a_model_of_odd_sizes_has_no_scheme() -> None:
    """A budget can't find what doesn't exist."""
    base = replace(QWQ_32B, shapes={"model.layers.0.mlp.up_proj": (64, 40)})
    with pytest.raises(RecipeError, match=r"no scheme fits: the input of .*up_proj"):
        settled_scheme(replace(REQUEST, scheme=Budget(max_kl=1.0)), base)


def test_files_are_drawn_from_by_weight(tmp_path: Path) -> None:
    """Weights of a request reach the draw."""
    write_chats(tmp_path / "a.jsonl", 60)
    datasets, split = calibration_split(replace(REQUEST, data=(TextFile(tmp_path / "a.jsonl", 3.0),), samples=20))
    assert [(source.path.name, source.weight) for source in datasets] == [("a.jsonl", 3.0)]
    assert len(split.calibration) == 20
