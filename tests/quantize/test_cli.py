"""The command line refuses what can't work: exit code 2, one line, before any heavy import."""

import json
from pathlib import Path

import pytest

from tests.quantize.chats import chat, write_chats, write_lines
from tests.quantize.command_line import run
from tests.quantize.models import write_hollow_model
from tests.quantize.variants.test_store import write_variant

GENERATE = ("--self-generate", "4", "--replica", "http://127.0.0.1:9")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, good and bad text, and something in the way."""
    folder = tmp_path_factory.mktemp("cli")
    write_hollow_model(folder / "base")
    (folder / "nothing").mkdir()
    write_chats(folder / "good.jsonl", 60)
    write_chats(folder / "few.jsonl", 5)
    write_lines(folder / "broken.jsonl", ['{"messages": [{"role": "user", "content": "a"}]}', "{oops"])
    (folder / "table.csv").write_text("prompt,completion\na,b\n")
    write_lines(folder / "images.jsonl", ['{"images": ["a.png"], "messages": []}'] * 30)
    (folder / "array.json").write_text(
        json.dumps([*(chat(number) for number in range(120)), {"messages": 5}], indent=1)
    )
    write_variant(folder / "taken")
    (folder / "bad.yaml").write_text("sceme: w8a8\n")
    (folder / "good.yaml").write_text("base: base\nscheme: w4a16-g64\ncalibration: {data: [good.jsonl]}\n")
    return folder


@pytest.mark.parametrize(
    "arguments,problem",
    [
        (["missing", "--scheme", "w8a8"], "missing: no such model directory"),
        (["nothing", "--scheme", "w8a8"], "nothing: not a transformers model: it has no config.json"),
        (["base", "--scheme", "w4a16-g46"], "unknown scheme 'w4a16-g46'; did you mean w4a16-g64?"),
        (["base", "--scheme", "w4a16-g128"], "hidden size 576 is not divisible by 128; use w4a16-g64"),
        (["base", "--scheme", "w8a16-g128", "--engine", "cpu"], "loads GPTQ of 4 bits, not of 8; use scheme w8a8"),
        (["base", "--scheme", "w4a16-asym"], "hidden size 576 is not divisible by 128; use w4a16-asym-g64"),
        (["base", "--scheme", "w8a8", "--override", "*.down_proj=4"], "has no exceptions but `keep`"),
        (["base", "--scheme", "nvfp4a16", "--engine", "cuda"], "nvfp4a16 is loaded, not made: quantize with another"),
        (["base", "--scheme", "w8a8", "--data", "absent.jsonl"], "absent.jsonl: no such calibration file"),
        (["base", "--scheme", "w8a8", "--data", "few.jsonl"], "too few calibration rows: 5 different chats"),
        (["base", "--scheme", "w8a8", "--data", "broken.jsonl"], "broken.jsonl:2: not JSON"),
        (["base", "--scheme", "w8a8", "--data", "table.csv"], "table.csv: is a table of csv, not JSON; write one JSON"),
        (["base", "--scheme", "w8a8", "--data", "images.jsonl"], 'images.jsonl:1: has "images": only text can'),
        (["base", "--scheme", "w8a8", "--samples", "3"], "3 samples are too few"),
        (["base", "--scheme", "w8a8", "--max-tokens", "3"], "3 tokens a sample are too few"),
        (["base", "--scheme", "w8a8", "--damp", "2"], "damp 2 is out of range"),
        (["base", "--scheme", "w8a8", "--damp", "x"], "argument --damp: invalid float value: 'x'"),
        (["base"], "no scheme: pass --scheme, or write `scheme:` in the recipe"),
        (["--scheme", "w8a8"], "no base: pass MODEL, or write `base:` in the recipe"),
        (["base", "--scheme", "w4a16-g64", "--override", "*.down=4:32"], "'*.down' matches no module of base"),
        (
            ["base", "--scheme", "w4a16-g64", "--override", "*.down_proj=4:48"],
            "GPTQ (*.down_proj) in groups of 32, 64, 128 or -1",
        ),
        (["base", "--scheme", "w4a16-g64", "--tensor-parallel", "9"], "1536 inputs are 24 groups of 64, which 9 GPUs"),
        (["base", "--max-bytes", "100KB"], "max_bytes 0.1 MB: the smallest variant that loads, w4a16-g64-mixed, has"),
        (["base", "--scheme", "w8a8", "--tasks", "absent.jsonl"], "absent.jsonl: can't be read"),
        (["base", "--scheme", "w8a8", "--limit", "kl_maen=1"], "kl_maen"),
        # Nothing is generated before the checks: no server listens at this address.
        (["base", "--scheme", "w4a16-g128", *GENERATE], "hidden size 576 is not divisible by 128"),
        (["base", "--scheme", "w8a8", *GENERATE, "--tasks", "absent.jsonl"], "absent.jsonl: can't be read"),
        (["base", "--recipe", "no-such"], "no-such: no such recipe file, and no shipped recipe; (shipped: "),
        (["base", "--recipe", "bad.yaml"], "bad.yaml:1:1: sceme: unknown key; did you mean 'scheme'?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place: Path, arguments: list[str], problem: str) -> None:
    """What can't work is told in one actionable line, and nothing is written."""
    known = {path.name for path in place.iterdir()} | {"missing", "absent.jsonl"}
    told = [str(place / argument) if argument in known else argument for argument in arguments]
    data = [] if "--data" in told else ["--data", place / "good.jsonl"]
    done = run("quantize_main", *told, *data, "--out", place / "out")
    assert done.returncode == 2
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (place / "out").exists()


def test_something_else_under_the_name_is_told(place: Path) -> None:
    """Another variant in the way is named, and stays."""
    pytest.importorskip("gptqmodel", reason="a recipe names the backend's version: install the quantize extra")
    done = run(
        "quantize_main", place / "base", "--scheme", "w8a8", "--data", place / "good.jsonl", "--out", place / "taken"
    )
    assert done.returncode == 2
    assert "taken: holds smol-int4-01234567, and this recipe makes base-int8-" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (place / "taken" / "manifest.json").is_file()


def test_help_has_an_example() -> None:
    """A newcomer finds a complete command and the exit codes."""
    done = run("quantize_main", "--help")
    assert done.returncode == 0
    assert "quantgate quantize models/QwQ-32B --scheme w4a16-g128" in done.stdout
    assert "exit codes: 0 done" in done.stdout


def test_every_problem_of_a_recipe_is_a_line(place: Path, tmp_path: Path) -> None:
    """A file is mended in one go."""
    (tmp_path / "r.yaml").write_text("scheme: {bits: 3, group_size: 128}\nsolver: {damp: 2}\n")
    done = run("quantize_main", place / "base", "--recipe", tmp_path / "r.yaml", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert [line.split(": ")[2] for line in done.stderr.splitlines()] == ["scheme", "solver.damp.0"]


def test_recipes_are_listed() -> None:
    """Names and purposes of what ships."""
    done = run("quantize_main", "--recipes")
    assert done.returncode == 0
    assert done.stdout.splitlines()[0].startswith("qwq-32b-int4     QwQ-32B")
    listed = json.loads(run("quantize_main", "--recipes", "--json").stdout)
    assert [each["name"] for each in listed] == [line.split()[0] for line in done.stdout.splitlines()]


def test_a_plan_is_told_before_any_work(place: Path) -> None:
    """Size, engines, shares and limits, from a recipe alone; nothing is written."""
    before = sorted(place.iterdir())
    done = run("quantize_main", "--recipe", place / "good.yaml", "--plan")
    assert (done.returncode, done.stderr) == (0, "")
    told = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert told["scheme"] == "w4a16-g64: 4 bits, group 64, gptq"
    assert told["size"].startswith("0.7 MB (")
    assert told["cpu"] == "loads: CPUWNA16"
    assert "kl_mean 0.05" in told["gates"]
    assert sorted(place.iterdir()) == before


def test_a_plan_tells_what_was_found_in_the_data(place: Path) -> None:
    """The format of the rows, the kind of file, and what is skipped."""
    done = run(
        "quantize_main", place / "base", "--scheme", "w4a16-g64", "--data", place / "array.json", "--plan", "--json"
    )
    assert json.loads(done.stdout)["data"] == [
        f"{place / 'array.json'}: 120 rows, JSON array, format: chat",
        f"{place / 'array.json'}: invalid rows skipped: 1 of 121: {place / 'array.json'}: item 121: "
        '"messages" is empty or no list',
    ]


def test_a_plan_for_scripts(place: Path) -> None:
    """The same as JSON, with every tensor's size; flags count."""
    flags = ("--scheme", "w8a16-channel", "--engine", "cuda", "--limit", "kl_mean=0.25")
    done = run("quantize_main", "--recipe", place / "good.yaml", "--plan", "--json", *flags)
    told = json.loads(done.stdout)
    assert told["bytes"] == sum(told["tensor_bytes"].values())
    assert told["engines"]["cuda"]["loads"]
    assert not told["engines"]["cpu"]["loads"]
    assert told["limits"]["kl_mean"] == 0.25


def test_evaluating_what_is_no_variant_is_told(place: Path) -> None:
    """A directory that isn't quantized can't be measured."""
    done = run("evaluate_main", place / "base", "--against", place / "base", "--data", place / "good.jsonl")
    assert done.returncode == 1
    assert "has no config.json with a quantization_config" in done.stderr
