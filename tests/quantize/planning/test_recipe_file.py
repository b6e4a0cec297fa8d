"""Recipe files: shipped ones load and say what they promise; a wrong one is told whole, with lines."""

from pathlib import Path

import pytest

from config.explain import known_keys
from config.manifest import Scheme
from quantize.errors import RecipeError, RecipeFileError
from quantize.planning.flags import quantize_parser
from quantize.planning.recipe_file import find_recipe, load_recipe, purpose_of, shipped_recipes
from quantize.planning.recipe_schema import RecipeFile, SolverTable
from quantize.planning.request import Request, TextFile
from quantize.planning.resolve import resolve
from quantize.schemes.settings import SETTINGS, SolverSettings

EVERYTHING = """\
base: models/QwQ
scheme: {preset: w4a16-g64, group_size: 32}
overrides:
  - {modules: "*.down_proj", bits: 8}
  - {modules: "*.o_proj", group_size: 128}
  - {modules: lm_head, keep: true}
calibration:
  data: [a.jsonl, {path: /elsewhere/b.jsonl, weight: 2}]
  self_generate: 32
  replica: http://127.0.0.1:8000
  max_bad: 2%
  samples: 64
  max_tokens: 1024
seed: 7
solver: {preset: classic, damp: [0.01, 0.1], gptaq: 0.25, residual: 0.75, shrinkage: 2, group_order: true}
backend: auto-gptq
devices: {gpus: [2, 5], memory: 80GB}
engine: cuda
tensor_parallel: 4
allow_fallback: 2
expert_fallback: fail
evaluation:
  {tokens: 9000, prompts: 8, seeds: 5, new_tokens: 64, tasks: q.jsonl, task_tokens: 99, limits: {kl_mean: 0.03}}
out: variants/{id}
"""


def write(folder: Path, text: str) -> str:
    """A recipe file."""
    (folder / "r.yaml").write_text(text)
    return str(folder / "r.yaml")


def requested(recipe: RecipeFile, *flags: str) -> Request:
    """What a recipe asks for with these flags."""
    return resolve(quantize_parser().parse_args(flags), recipe, present="cuda")


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    """Each is found by its name, says what it is for, and makes a request as soon as base and target are named."""
    request = requested(load_recipe(path.stem), "model", "--out", "out")
    assert request.base == Path("model")
    assert len(purpose_of(path)) > 20


def test_there_are_the_promised_recipes() -> None:
    """These names are in documents and scripts."""
    names = {path.stem for path in shipped_recipes()}
    assert names >= {"qwq-32b-int4", "qwq-32b-int8", "smollm2-int4", "reasoning-best"}


@pytest.mark.parametrize("bits", [4, 8])
def test_the_articles_script_is_stated_whole(bits: int) -> None:
    """Every parameter of the script that this project started from is in the file, not in a default."""
    recipe = load_recipe(f"qwq-32b-int{bits}")
    assert recipe.scheme is not None
    assert recipe.scheme.model_dump(exclude_none=True) == {
        "bits": bits,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "activation_bits": 16,
        "format": "gptq",
    }
    assert (recipe.solver.damp, recipe.solver.true_sequential, recipe.solver.static_groups) == ((0.01,), True, False)
    assert (recipe.calibration.samples, recipe.calibration.max_tokens) == (128, 8192)
    assert (recipe.devices.gpus, recipe.devices.memory) == ((2, 5), 80_000_000_000)
    assert requested(recipe, "model", "--out", "out").settings == SETTINGS["classic"]


def test_everything_can_be_said(tmp_path: Path) -> None:
    """Each option arrives in the request; relative paths count from the file's folder."""
    request = requested(load_recipe(write(tmp_path, EVERYTHING)))
    assert request.base == tmp_path / "models/QwQ"
    assert request.out == tmp_path / "variants/{id}"
    assert request.data == (TextFile(tmp_path / "a.jsonl"), TextFile(Path("/elsewhere/b.jsonl"), 2.0))
    assert (request.self_generate, request.samples, request.max_tokens, request.seed) == (32, 64, 1024, 7)
    assert request.replica == "http://127.0.0.1:8000"
    assert request.max_bad == 0.02
    assert request.settings == SolverSettings(
        (0.01, 0.1), weighted_scales=False, gptaq=0.25, residual=0.75, shrinkage=2.0
    )
    assert (request.backend, request.devices.gpus, request.devices.memory_bytes) == ("auto-gptq", (2, 5), 80 * 10**9)
    assert (request.engine, request.tensor_parallel, request.allow_fallback) == ("cuda", 4, 2)
    assert request.expert_fallback == "fail"
    wanted = request.evaluation
    assert (wanted.tokens, wanted.prompts, wanted.seeds, wanted.new_tokens) == (9000, 8, 5, 64)
    assert (wanted.tasks, wanted.task_tokens) == (tmp_path / "q.jsonl", 99)
    assert dict(wanted.limits) == {"kl_mean": 0.03}


def test_overrides_in_the_manifests_words(tmp_path: Path) -> None:
    """What an exception doesn't say is the scheme's; `keep` has no bits."""
    scheme = requested(load_recipe(write(tmp_path, EVERYTHING))).scheme
    assert isinstance(scheme, Scheme)
    assert (scheme.name, scheme.bits, scheme.group_size) == ("w4a16-g32-mixed", 4, 32)
    assert [(override.modules, override.bits, override.group_size) for override in scheme.overrides] == [
        ("*.down_proj", 8, None),
        ("*.o_proj", 4, 128),
        ("lm_head", None, None),
    ]


@pytest.mark.parametrize(
    "text,problem",
    [
        ("schema: w8a8", "r.yaml:1:1: schema: unknown key; did you mean 'scheme'?"),
        ("scheme: w4a16-g46", "r.yaml:1:1: scheme: there is no scheme 'w4a16-g46'; did you mean 'w4a16-g64'?"),
        (
            "scheme: [4]",
            "r.yaml:1:1: scheme: is no scheme; write a preset's name, auto, auto-asym, or a table of numbers",
        ),
        ("scheme: {bits: 4}", "r.yaml:1:1: scheme.group_size: is missing"),
        (
            "scheme: {bits: 3, group_size: 128}",
            "4 or 8 bits, not of 3; quantize to 4 or 8 bits; the nearest that loads is w4a16-g128",
        ),
        (
            "scheme: {bits: 4, group_size: 128, sym: false}",
            "scheme: vLLM loads symmetric GPTQ only; quantize with symmetric weights (sym: true); the nearest",
        ),
        ("scheme: {bits: 4, groups: 128}", "r.yaml:1:19: scheme.groups: unknown key; did you mean 'group_size'?"),
        (
            "scheme: {preset: w4a16-g128, kv_cache: fp8}",
            "r.yaml:1:1: scheme: vLLM loads scales of an FP8 KV cache beside compressed-tensors, not beside gptq; use",
        ),
        ("scheme: {preset: w8a8, kv_cache: int8}", "scheme.kv_cache: must be 'auto' or 'fp8', got 'int8'"),
        ("scheme: w8a8\nmax_bytes: 70MB", "r.yaml:2:1: max_bytes: is a budget, and this scheme is fixed"),
        ("scheme: auto\nmax_bytes: 70MB\nmax_kl: 0.1", "r.yaml:3:1: max_kl: beside max_bytes"),
        ("scheme: {preset: auto, bits: 4}", "auto chooses the numbers itself"),
        ("max_bytes: 70 lightyears", "'70 lightyears' is not a valid size"),
        ("overrides: [{modules: a}]", "overrides.0: says nothing about its modules; write bits, group_size or `keep"),
        ("overrides: [{modules: a, bits: 3}]", "r.yaml:1:26: overrides.0.bits: vLLM loads 4 and 8 bits, not 3"),
        ("overrides: [{modules: a, bits: 8, keep: true}]", "overrides.0.keep: beside numbers"),
        ("overrides: [{module: a, bits: 8}]", "overrides.0.module: unknown key; did you mean 'modules'?"),
        ("calibration: {data: [{file: a}]}", "calibration.data.0.file: unknown key"),
        ("calibration: {samples: -1}", "calibration.samples: must be at least 1, got -1; choose a larger number"),
        ("calibration: {max_bad: 1}", "calibration.max_bad: must be less than 1, got 1"),
        ("calibration: {max_bad: few}", "calibration.max_bad: 'few' is no share, like 1% or 0.01"),
        ("solver: {preset: bets}", "solver.preset: must be 'best' or 'classic', got 'bets'; did you mean 'best'?"),
        ("solver: {damp: 2}", "solver.damp.0: 2 is no share"),
        ("solver: {static_groups: true}", "solver.static_groups: must be false, got 'true'"),
        ("devices: {gpus: [2, 2]}", "r.yaml:1:21: devices.gpus.1: GPU 2 is named twice"),
        (
            "evaluation: {limits: {kl_men: 1}}",
            "evaluation.limits.kl_men: is no figure with a limit; did you mean 'kl_m",
        ),
        ("base: ${env:NO_SUCH_NAME}", "the environment variable NO_SUCH_NAME is not set"),
        ("seed: 1\nseed: 2", "r.yaml:2:1: seed: is a duplicate key"),
        ("scheme: [", "is not YAML"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    """The message names file, line and column, the path in it, what is wrong and what to do."""
    with pytest.raises(RecipeFileError) as caught:
        load_recipe(write(tmp_path, text))
    assert problem in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    """One run of the command shows them all, in the order of the file."""
    with pytest.raises(RecipeFileError) as caught:
        load_recipe(write(tmp_path, "sed: 1\nscheme: w8a8\nsolver: {preset: x}\ndevices: {gpu: [1]}\n"))
    assert [problem.split(":")[1] for problem in caught.value.problems] == ["1", "3", "4"]


@pytest.mark.parametrize(
    "name,problem",
    [
        ("./qwq-32b-int4", "./qwq-32b-int4: no such recipe file"),
        ("nowhere/r.yaml", "nowhere/r.yaml: no such recipe file"),
        ("qwq-32b-int3", "no shipped recipe; did you mean qwq-32b-int[48]\\?"),
        ("zzz", r"no shipped recipe; \(shipped: qwq-32b-int4, "),
    ],
)
def test_a_recipe_that_is_not_there_is_told(name: str, problem: str) -> None:
    """With a folder in it a name is a path; without, the shipped names are proposed."""
    with pytest.raises(RecipeError, match=problem):
        find_recipe(name)


def test_a_file_goes_before_a_shipped_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in the working directory is what was meant."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe("reasoning-best.yaml").parent.name == "recipes"
    (tmp_path / "reasoning-best.yaml").write_text("seed: 3")
    assert load_recipe("reasoning-best.yaml").seed == 3


def test_every_setting_of_the_solver_can_be_stated() -> None:
    """A recipe knows the settings by the names that the solver knows."""
    assert set(SolverSettings.__dataclass_fields__) <= set(SolverTable.model_fields)
    for name in SETTINGS:
        assert SolverTable(preset=name).preset == name
    assert "gptaq" in known_keys(("solver",), RecipeFile)
