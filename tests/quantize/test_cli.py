"""The command line refuses what can't work: exit code 2, one line, before any heavy import."""

import json
from pathlib import Path

import pytest

from quantize.store import seal, staging
from tests.quantize.chats import write_chats, write_lines
from tests.quantize.models import write_hollow_model
from tests.quantize.running import run
from tests.quantize.test_store import UNSEALED, write_variant


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, good and bad text, and something in the way."""
    folder = tmp_path_factory.mktemp("cli")
    write_hollow_model(folder / "base")
    (folder / "nothing").mkdir()
    write_chats(folder / "good.jsonl", 60)
    write_chats(folder / "few.jsonl", 5)
    write_lines(folder / "broken.jsonl", ['{"messages": [{"role": "user", "content": "a"}]}', "{oops"])
    write_variant(folder / "taken")
    return folder


@pytest.mark.parametrize(
    "arguments,problem",
    [
        (["missing", "--scheme", "w8a8"], "missing: no such model directory"),
        (["nothing", "--scheme", "w8a8"], "nothing: not a transformers model: it has no config.json"),
        (["base", "--scheme", "w4a16-g46"], "unknown scheme 'w4a16-g46'; did you mean w4a16-g64?"),
        (["base", "--scheme", "w4a16-g128"], "hidden size 576 is not divisible by 128; use w4a16-g64"),
        (["base", "--scheme", "w8a16-g128", "--engine", "cpu"], "vLLM has no CPU kernel for 8-bit GPTQ; use w8a8"),
        (["base", "--scheme", "w8a8", "--data", "absent.jsonl"], "absent.jsonl: no such calibration file"),
        (["base", "--scheme", "w8a8", "--data", "few.jsonl"], "too few calibration rows: 5 different chats"),
        (["base", "--scheme", "w8a8", "--data", "broken.jsonl"], "broken.jsonl:2: not JSON"),
        (["base", "--scheme", "w8a8", "--samples", "3"], "3 samples are too few"),
        (["base", "--scheme", "w8a8", "--max-tokens", "3"], "3 tokens a sample are too few"),
        (["base", "--scheme", "w8a8", "--damp", "2"], "damp 2 is out of range"),
        (["base", "--scheme", "w8a8", "--damp", "x"], "argument --damp: invalid float value: 'x'"),
        (["base"], "the following arguments are required: --scheme"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(place: Path, arguments: list[str], problem: str) -> None:
    """What can't work is told in one actionable line, and nothing is written."""
    known = {path.name for path in place.iterdir()} | {"missing", "absent.jsonl"}
    told = [str(place / argument) if argument in known else argument for argument in arguments]
    data = [] if "--data" in told else ["--data", place / "good.jsonl"]
    done = run("main", *told, *data, "--out", place / "out")
    assert done.returncode == 2
    assert problem in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (place / "out").exists()


def test_something_else_under_the_name_is_told(place: Path) -> None:
    """Another variant in the way is named, and stays."""
    pytest.importorskip("gptqmodel", reason="a recipe names the backend's version: install the quantize extra")
    done = run("main", place / "base", "--scheme", "w8a8", "--data", place / "good.jsonl", "--out", place / "taken")
    assert done.returncode == 2
    assert "taken: holds smol-int4-01234567, and this recipe makes base-int8-" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (place / "taken" / "manifest.json").is_file()


def test_help_has_an_example() -> None:
    """A newcomer finds a complete command and the exit codes."""
    done = run("main", "--help")
    assert done.returncode == 0
    assert "quantgate quantize models/QwQ-32B --scheme w4a16-g128" in done.stdout
    assert "exit codes: 0 done" in done.stdout


def test_variants_are_listed_shown_and_verified(tmp_path: Path) -> None:
    """The three readers agree on a sealed variant, as text and as JSON."""
    write_variant(tmp_path / "v")
    assert "smol-int4-01234567" in run("variants_main", "list", tmp_path / "v").stdout
    (told,) = json.loads(run("variants_main", "list", "--json", tmp_path / "v").stdout)
    assert told["id"] == "smol-int4-01234567"
    assert "7 modules at 0.01" in run("variants_main", "show", tmp_path / "v").stdout
    assert json.loads(run("variants_main", "show", "--json", tmp_path / "v").stdout)["scheme"]["bits"] == 4
    verified = run("variants_main", "verify", tmp_path / "v")
    assert (verified.returncode, verified.stdout) == (0, f"{tmp_path / 'v'}: as it was sealed\n")


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    """Verifying reads every byte and exits with 1 where one has changed."""
    write_variant(tmp_path / "v")
    (tmp_path / "v" / "model.safetensors").write_bytes(b"Weights")
    verified = run("variants_main", "verify", tmp_path / "v")
    assert (verified.returncode, verified.stdout) == (1, f"{tmp_path / 'v'}: altered: model.safetensors\n")
    assert json.loads(run("variants_main", "verify", "--json", tmp_path / "v").stdout) == {
        str(tmp_path / "v"): ["model.safetensors"]
    }


@pytest.mark.parametrize("verb", ["list", "show", "verify"])
def test_a_directory_without_manifest_is_told(tmp_path: Path, verb: str) -> None:
    """Reading what was never sealed fails with one line."""
    done = run("variants_main", verb, tmp_path)
    assert done.returncode == 1
    assert "manifest.json: no such file" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_evaluating_what_is_no_variant_is_told(place: Path) -> None:
    """A directory that isn't quantized can't be measured."""
    done = run("evaluate_main", place / "base", "--against", place / "base", "--data", place / "good.jsonl")
    assert done.returncode == 1
    assert "has no config.json with a quantization_config" in done.stderr


def test_the_manifest_of_the_seal_is_what_is_listed(tmp_path: Path) -> None:
    """A list tells size and verdict from the manifest alone."""
    with staging(tmp_path / "v") as staged:
        (staged / "model.safetensors").write_bytes(bytes(3_000_000))
        seal(staged, UNSEALED)
    heading, line = run("variants_main", "list", tmp_path / "v").stdout.splitlines()
    assert heading.split()[:3] == ["variant", "scheme", "size"]
    assert "3 MB" in line
    assert "pass" in line
