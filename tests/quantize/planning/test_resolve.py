"""Flags and file: the flag wins, the file fills the rest, defaults come last; flags that make no sense are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from config.manifest import Engine, Override
from quantize.errors import RecipeError
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.planning.flags import evaluate_parser, quantize_parser
from quantize.planning.recipe import Budget, Devices
from quantize.planning.recipe_schema import EvaluationTable, RecipeFile
from quantize.planning.request import Request, TextFile
from quantize.planning.resolve import chosen_evaluation, resolve
from quantize.schemes.cache_scales import FP8_CACHE
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS

FILE = RecipeFile.model_validate(
    {
        "base": "/said/base",
        "scheme": "w4a16-g128",
        "overrides": [{"modules": "*.down_proj", "bits": 8}],
        "calibration": {"data": ["/said/a.jsonl"], "samples": 64, "max_tokens": 512, "self_generate": 5},
        "seed": 3,
        "transforms": ["rotate-r2"],
        "solver": {"preset": "classic", "damp": 0.2},
        "backend": "auto-gptq",
        "devices": {"gpus": [2, 5], "memory": "80GB"},
        "engine": "cuda",
        "tensor_parallel": 4,
        "allow_fallback": 1,
        "expert_fallback": "fail",
        "evaluation": {"tokens": 99, "limits": {"kl_mean": 0.5, "top1_agreement": 0.5}},
        "out": "/said/out",
    },
)
NOTHING = RecipeFile()


def asked(recipe: RecipeFile, *flags: str) -> Request:
    """The request of a file and flags, on a machine without a GPU."""
    return resolve(quantize_parser().parse_args(flags), recipe, present="cpu")


@pytest.mark.parametrize(
    "flags,field,value",
    [
        (["elsewhere"], "base", Path("elsewhere")),
        (["--out", "there"], "out", Path("there")),
        (["--engine", "auto"], "engine", "cpu"),
        (
            ["--data", "b.jsonl=2.5", "--data", "c.jsonl"],
            "data",
            (TextFile(Path("b.jsonl"), 2.5), TextFile(Path("c.jsonl"))),
        ),
        (["--samples", "32"], "samples", 32),
        (["--max-bad", "5%"], "max_bad", 0.05),
        (["--max-bad", "0"], "max_bad", 0.0),
        (["--max-tokens", "64"], "max_tokens", 64),
        (["--self-generate", "0"], "self_generate", 0),
        (["--replica", "http://h:1/"], "replica", "http://h:1"),
        (["--seed", "0"], "seed", 0),
        (["--backend", "gptqmodel"], "backend", "gptqmodel"),
        (["--gpus", "1"], "devices", Devices((1,), 80_000_000_000)),
        (["--gpu-memory", "40GB"], "devices", Devices((2, 5), 40_000_000_000)),
        (["--tensor-parallel", "2"], "tensor_parallel", 2),
        (["--allow-fallback", "0"], "allow_fallback", 0),
        (["--expert-fallback", "rtn"], "expert_fallback", "rtn"),
        (
            ["--damp", "0.01", "--damp", "0.3"],
            "settings",
            replace(SETTINGS["classic"], damp=(0.01, 0.3)),
        ),
        (["--solver", "best"], "settings", SETTINGS["best"]),
        (
            ["--group-order", "--gptaq", "0.25"],
            "settings",
            replace(SETTINGS["classic"], damp=(0.2,), group_order=True, gptaq=0.25),
        ),
        (["--residual", "0.75"], "settings", replace(SETTINGS["classic"], damp=(0.2,), residual=0.75)),
        (["--shrinkage", "2"], "settings", replace(SETTINGS["classic"], damp=(0.2,), shrinkage=2.0)),
        (["--transform", "smooth", "--transform", "rotate-r1"], "transforms", ("rotate-r1", "smooth")),
        (["--transform", "none"], "transforms", ()),
        (["--no-resume"], "resume", False),
        (["--log", "run.log"], "log", Path("run.log")),
        (
            ["--scheme", "w8a16-g128", "--override", "*.o_proj=4:32"],
            "scheme",
            preset("w8a16-g128").model_copy(
                update={
                    "name": "w8a16-g128-mixed",
                    "overrides": (
                        Override(modules="*.o_proj", bits=4, group_size=32),
                        Override(modules="*.down_proj", bits=8),
                    ),
                }
            ),
        ),
        (
            ["--scheme", "fp8-dynamic", "--kv-cache", "fp8"],
            "scheme",
            preset("fp8-dynamic").model_copy(
                update={
                    "name": "fp8-dynamic-kv-fp8-mixed",
                    "kv_cache": FP8_CACHE,
                    "overrides": (Override(modules="*.down_proj", bits=8),),
                }
            ),
        ),
        (
            ["--scheme", "auto", "--max-kl", "0.1"],
            "scheme",
            Budget(None, 0.1, (Override(modules="*.down_proj", bits=8),)),
        ),
        (
            ["--limit", "kl_mean=0.1", "--tasks", "t.jsonl"],
            "evaluation",
            EvaluationPlan(tokens=99, tasks=Path("t.jsonl"), limits={"kl_mean": 0.1, "top1_agreement": 0.5}),
        ),
    ],
)
def test_a_flag_wins_over_the_file(flags: list[str], field: str, value: object) -> None:
    """The flag decides its own field, the file all others."""
    plain, request = asked(FILE), asked(FILE, *flags)
    assert getattr(request, field) == value
    assert getattr(plain, field) != value
    assert {name for name in Request.__dataclass_fields__ if getattr(plain, name) != getattr(request, name)} == {field}


def test_without_a_file_there_are_defaults() -> None:
    """Base, scheme and target are all that must be said."""
    request = asked(NOTHING, "base", "--scheme", "w8a8", "--out", "out")
    assert request == Request(Path("base"), preset("w8a8"), "cpu", Path("out"))
    assert request.settings == SETTINGS["best"]


@pytest.mark.parametrize(
    "flags,present,size",
    [
        ([], "cpu", (64, 2048)),
        ([], "cuda", (128, 4096)),
        (["--gpus", "0"], "cpu", (128, 4096)),
        (["--engine", "cuda"], "cpu", (64, 2048)),
        (["--engine", "cpu"], "cuda", (128, 4096)),
        (["--samples", "20"], "cuda", (20, 4096)),
        (["--max-tokens", "64"], "cuda", (128, 64)),
    ],
)
def test_the_default_amount_of_text_goes_by_the_device_that_solves(
    flags: list[str], present: Engine, size: tuple[int, int]
) -> None:
    """Not by the engine that the variant is for; what is given stays."""
    options = quantize_parser().parse_args(["base", "--scheme", "w8a8", "--out", "out", *flags])
    request = resolve(options, NOTHING, present=present)
    assert (request.samples, request.max_tokens) == size
    stated = resolve(options, FILE, present=present)
    assert (stated.samples, stated.max_tokens) == (
        20 if "--samples" in flags else 64,
        64 if "--max-tokens" in flags else 512,
    )


@pytest.mark.parametrize("text", ["1", "100%", "-1%", "x", "nan", "%"])
def test_a_share_that_makes_no_sense_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """1 might mean all rows or 1 %."""
    with pytest.raises(SystemExit):
        quantize_parser().parse_args(["base", f"--max-bad={text}"])
    assert "argument --max-bad: " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["base", "--scheme", "w8a8"], ["--scheme", "w8a8", "base"]])
def test_a_plan_needs_no_target(flags: list[str]) -> None:
    """Nothing is written, so nothing has to be named; the model may stand anywhere."""
    assert asked(NOTHING, *flags, "--plan").base == Path("base")


@pytest.mark.parametrize(
    "flags,budget",
    [
        (["--max-bytes", "70MB"], Budget(max_bytes=70_000_000)),
        (["--scheme", "auto", "--max-kl", "0.05"], Budget(max_kl=0.05)),
        (["--max-bytes", "100", "--override", "a=keep"], Budget(100, None, (Override(modules="a"),))),
    ],
)
def test_a_budget_is_a_scheme(flags: list[str], budget: Budget) -> None:
    """A budget alone means auto."""
    assert asked(NOTHING, "base", "--out", "out", *flags).scheme == budget


def test_a_cache_of_the_file_yields_to_one_of_the_flags() -> None:
    """`--kv-cache auto` is the model's dtype again."""
    recipe = RecipeFile.model_validate({"base": "b", "scheme": {"preset": "w8a8", "kv_cache": "fp8"}, "out": "o"})
    assert asked(recipe).scheme == preset("w8a8").model_copy(update={"name": "w8a8-kv-fp8", "kv_cache": FP8_CACHE})
    assert asked(recipe, "--kv-cache", "auto").scheme == preset("w8a8")


def test_a_budget_of_the_file_yields_to_one_of_the_flags() -> None:
    """Of two budgets the flag's counts."""
    recipe = RecipeFile.model_validate({"scheme": "auto", "max_bytes": 10})
    assert asked(recipe, "base", "--out", "out").scheme == Budget(max_bytes=10)
    assert asked(recipe, "base", "--out", "out", "--max-kl", "0.1").scheme == Budget(max_kl=0.1)


@pytest.mark.parametrize(
    "flags,problem",
    [
        ([], "no base: pass MODEL, or write `base:` in the recipe"),
        (["base"], "no scheme: pass --scheme, or write `scheme:` in the recipe"),
        (["base", "--scheme", "w8a8"], "no target: pass --out"),
        (["base", "--scheme", "auto"], "scheme auto needs one budget: --max-bytes 19GB or --max-kl 0.05"),
        (["base", "--scheme", "auto", "--max-kl", "1", "--max-bytes", "1"], "scheme auto needs one budget"),
        (["base", "--scheme", "w8a8", "--max-kl", "1"], "budgets of `--scheme auto`"),
        (["base", "--scheme", "w8a9"], "did you mean w8a8"),
        (
            ["base", "--scheme", "auto", "--max-kl", "1", "--kv-cache", "fp8"],
            "--kv-cache fp8: a scheme with a budget has no FP8",
        ),
    ],
)
def test_what_is_missing_is_told(flags: list[str], problem: str) -> None:
    """One line says what, and where it can be said."""
    with pytest.raises(RecipeError, match=problem):
        asked(NOTHING, *flags)


@pytest.mark.parametrize(
    "flag,value,problem",
    [
        ("--override", "a=3", "'a=3' is not PATTERN=4, PATTERN=8, PATTERN=BITS:GROUP or PATTERN=keep"),
        ("--override", "a", "is not PATTERN="),
        ("--gpus", "2,x", "'2,x' is no list of different GPU numbers, like 2,5"),
        ("--gpus", "2,2", "is no list of different GPU numbers"),
        ("--gpu-memory", "80 apples", "'80 apples' is not a valid size"),
        ("--limit", "kl=1", "'kl' is no figure with a limit (one of: kl_mean, "),
        ("--limit", "kl_mean=x", "'kl_mean=x' is not NAME=VALUE"),
        ("--replica", "h:1", "'h:1' is not a valid replica URL"),
        ("--eval-seeds", "0", "'0' is no whole number from 1 on"),
        ("--self-generate", "-1", "'-1' is no whole number from 0 on"),
    ],
)
def test_a_flag_that_makes_no_sense_is_a_usage_error(
    capsys: pytest.CaptureFixture[str], flag: str, value: str, problem: str
) -> None:
    """One line, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        quantize_parser().parse_args(["base", f"{flag}={value}"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert problem in told
    assert len(told.splitlines()) == 1


def test_a_file_name_may_end_like_a_weight(tmp_path: Path) -> None:
    """A file that is there is meant, whatever its name."""
    (tmp_path / "data=2").write_text("")
    odd, plain = str(tmp_path / "data=2"), str(tmp_path / "data=x")
    request = asked(NOTHING, "base", "--scheme", "w8a8", "--out", "o", "--data", odd, "--data", plain)
    assert request.data == (TextFile(Path(odd)), TextFile(Path(plain)))


def test_evaluate_takes_the_same_flags() -> None:
    """A variant that is judged again can be judged by other limits."""
    flags = [
        "v",
        "--against",
        "b",
        "--eval-chats",
        "8",
        "--eval-tokens",
        "9",
        "--eval-prompts",
        "0",
        "--eval-seeds",
        "5",
    ]
    flags += ["--eval-new-tokens", "7", "--tasks", "t.jsonl", "--task-tokens", "3", "--limit", "flips=0.5"]
    wanted = chosen_evaluation(evaluate_parser().parse_args(flags), EvaluationTable())
    assert wanted == EvaluationPlan(8, 9, 0, 5, 7, Path("t.jsonl"), 3, {"flips": 0.5})


@pytest.mark.parametrize(
    "file,flags,transforms",
    [
        ({}, [], None),
        ({"solver": {"preset": "best"}}, [], None),
        ({"transforms": []}, [], ()),
        ({"transforms": ["smooth"], "solver": {"preset": "classic"}}, [], ("smooth",)),
        ({"solver": {"preset": "classic"}}, [], ()),
        ({"solver": {"preset": "classic"}}, ["--solver", "best"], None),
        ({}, ["--solver", "classic"], ()),
        ({}, ["--solver", "classic", "--transform", "smooth"], ("smooth",)),
        ({}, ["--transform", "none"], ()),
    ],
)
def test_transforms(file: dict[str, object], flags: list[str], transforms: tuple[str, ...] | None) -> None:
    """What is named counts; else the solver best leaves the choice to the scheme (None), and classic has none."""
    recipe = RecipeFile.model_validate({"base": "b", "scheme": "w8a8", "out": "o", **file})
    assert asked(recipe, *flags).transforms == transforms


def test_no_transform_stands_alone() -> None:
    """`none` beside a name is a contradiction."""
    flags = ("base", "--scheme", "w8a8", "--out", "o", "--transform", "none", "--transform", "smooth")
    with pytest.raises(RecipeError, match="--transform none beside others"):
        asked(NOTHING, *flags)
