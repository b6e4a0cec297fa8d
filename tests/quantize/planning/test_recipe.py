"""A recipe's digest: the same contents give the same name, any other setting gives another."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Override
from quantize.base import BaseModel, slug
from quantize.calibration.datasets import Dataset
from quantize.errors import RecipeError
from quantize.planning.recipe import Backend, Budget, Recipe, chosen_backend, installed_backend
from quantize.schemes.cache_scales import FP8_CACHE
from quantize.schemes.makers import RTN_FP8, is_data_free
from quantize.schemes.scheme import PRESETS, preset
from quantize.schemes.settings import SETTINGS, SolverSettings

BASE = BaseModel(Path("/models/QwQ-32B"), "QwQ-32B", "bf16", "d" * 64, 1, {}, {})
RECIPE = Recipe(
    base=BASE,
    scheme=preset("w4a16-g128"),
    datasets=(Dataset(Path("a.jsonl"), "a" * 64), Dataset(Path("b.jsonl"), "b" * 64)),
    samples=16,
    max_tokens=2048,
    seed=0,
    settings=SETTINGS["best"],
    backend=Backend("gptqmodel", "7.6.0"),
)
recipes = st.builds(
    replace,
    st.just(RECIPE),
    scheme=st.sampled_from([preset for preset in PRESETS.values() if not is_data_free(preset)]),
    samples=st.integers(16, 64),
    max_tokens=st.integers(64, 4096),
    seed=st.integers(),
    settings=st.builds(SolverSettings, damp=st.tuples(st.floats(0.001, 0.5)), gptaq=st.sampled_from([0.0, 0.25])),
)


@given(recipes, recipes)
def test_digests_are_equal_where_recipes_are(one: Recipe, two: Recipe) -> None:
    """No two different recipes share a digest."""
    assert (one.digest() == two.digest()) == (one == two)


def test_without_calibration_only_base_scheme_and_program_decide() -> None:
    """FP8 weights are the same whatever the variant is evaluated on."""
    recipe = replace(RECIPE, scheme=preset("fp8-dynamic"), backend=chosen_backend(RTN_FP8))
    assert replace(recipe, samples=64, seed=7, datasets=()).digest() == recipe.digest()
    assert replace(recipe, base=replace(BASE, digest="e" * 64)).digest() != recipe.digest()
    assert replace(recipe, scheme=preset("fp8-block")).digest() != recipe.digest()
    assert recipe.variant_id.startswith("qwq-32b-fp8-")


def test_scales_of_a_kv_cache_need_calibration() -> None:
    """The weights are the same, and other text gives other scales."""
    plain = replace(RECIPE, scheme=preset("fp8-dynamic"), backend=chosen_backend(RTN_FP8))
    recipe = replace(plain, scheme=plain.scheme.model_copy(update={"kv_cache": FP8_CACHE}))
    assert recipe.digest() != plain.digest()
    assert replace(recipe, datasets=()).digest() != recipe.digest()


@given(recipes, st.sampled_from(["/tmp/x", "elsewhere"]))
def test_paths_and_the_order_of_files_are_not_part_of_it(recipe: Recipe, place: str) -> None:
    """The same contents in other places, listed in another order, are the same recipe."""
    moved = replace(
        recipe,
        base=replace(recipe.base, directory=Path(place)),
        datasets=tuple(replace(source, path=Path(place)) for source in reversed(recipe.datasets)),
    )
    assert moved.digest() == recipe.digest()


@pytest.mark.parametrize(
    "changed",
    [
        replace(RECIPE, base=replace(BASE, digest="e" * 64)),
        replace(RECIPE, datasets=RECIPE.datasets[:1]),
        replace(RECIPE, datasets=(replace(RECIPE.datasets[0], weight=2.0), RECIPE.datasets[1])),
        replace(RECIPE, datasets=(replace(RECIPE.datasets[0], formats=(("Alpaca", 9),)), RECIPE.datasets[1])),
        replace(RECIPE, datasets=(replace(RECIPE.datasets[0], formats=(("chat with tools", 9),)), RECIPE.datasets[1])),
        replace(RECIPE, split_by_prompt=True),
        replace(RECIPE, budget=Budget(max_bytes=1)),
        replace(RECIPE, backend=Backend("gptqmodel", "7.7.0")),
        replace(RECIPE, backend=Backend("other", "7.6.0")),
    ],
)
def test_everything_that_decides_the_bytes_is_part_of_it(changed: Recipe) -> None:
    """Another base, text or backend version is another variant."""
    assert changed.digest() != RECIPE.digest()


def test_text_that_is_read_as_ever_keeps_the_name() -> None:
    """Chats, completions and texts whose prompts occur once, in any kind of file."""
    native = (("chat", 9), ("prompt and completion", 2), ("text", 1))
    datasets = tuple(replace(source, formats=native, kind="parquet") for source in RECIPE.datasets)
    assert replace(RECIPE, datasets=datasets).digest() == RECIPE.digest()
    assert RECIPE.digest().startswith("ca8fdd2f")


@pytest.mark.parametrize("other", [Budget(max_bytes=2), Budget(max_kl=1.0), Budget(1, None, (Override(modules="a"),))])
def test_a_budget_names_the_variant_whatever_its_search_finds(other: Budget) -> None:
    """The id is known before the search, so that a finished variant is found again; another budget is another one."""
    recipe = replace(RECIPE, budget=Budget(max_bytes=1))
    found = recipe.scheme.model_copy(update={"overrides": (Override(modules="*.down_proj", bits=8),)})
    assert replace(recipe, scheme=found).variant_id == recipe.variant_id
    assert replace(recipe, budget=other).digest() != recipe.digest()


def test_a_variant_is_named_after_base_precision_and_recipe() -> None:
    """The id is readable and ends in eight digits of the digest."""
    assert RECIPE.variant_id == f"qwq-32b-int4-{RECIPE.digest()[:8]}"


@pytest.mark.parametrize(
    "name,expected",
    [
        ("SmolLM2-135M-Instruct", "smollm2-135m-instruct"),
        ("Qwen2.5 72B (tuned)", "qwen2.5-72b-tuned"),
        ("__a__", "a"),
        ("模型", "model"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    """Names become lower-case words with single hyphens."""
    assert slug(name) == expected


def test_auto_gptq_has_a_version_of_its_own() -> None:
    """It is never installed beside the rest, so its version is the archived one."""
    assert chosen_backend("auto-gptq") == Backend("auto-gptq", "0.7.1")


def test_a_missing_backend_is_told_with_the_command_that_installs_it() -> None:
    """Without the program the recipe can't be written."""
    with pytest.raises(RecipeError, match="not-a-distribution is not installed; pip install"):
        installed_backend("not-a-distribution")
