"""`scheme: auto` from the command line, with real GPTQ: budgets are met by what is measured, or missed by so much."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.manifest import Manifest
from quantize.base import read_base
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.module_config import weight_args_of
from quantize.schemes.scheme import preset
from tests.quantize.chats import chat, write_chats
from tests.quantize.command_line import ROOT, command, environ, run
from tests.quantize.models import write_tiny_llama

pytest.importorskip("torch", reason="needs torch: install the quantize extra")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(900)]

_MEASURED = re.compile(r"^auto: (?P<counts>\d+ of .*): [\d.]+ MB, KL (?P<kl>[\d.e-]+)", re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base whose units differ in what they lose, its data, and a home of its own."""
    folder = tmp_path_factory.mktemp("search")
    write_chats(folder / "chats.jsonl", 60)
    text = [message["content"] for n in range(60) for message in chat(n)["messages"]]
    base = write_tiny_llama(folder / "tiny", text, layers=3)
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    tensors = load_file(base / "model.safetensors")
    tensors |= {name: 4 * tensor for name, tensor in tensors.items() if "_proj" in name or "embed" in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTGATE_HOME", str(folder / "home"))
        yield folder


def arguments(place: Path, out: str, *budget: object) -> tuple[object, ...]:
    """The command line of a search."""
    # 16 samples leave chats to spare, on which mixtures are measured.
    options = ("--engine", "cuda", "--samples", 16, "--eval-prompts", 0, "--eval-tokens", 300)
    return (place / "tiny", *options, "--data", place / "chats.jsonl", *budget, "--out", place / out)


@pytest.fixture(scope="module")
def missed(place: Path) -> subprocess.CompletedProcess[str]:
    """A run whose divergence is out of reach."""
    return run("quantize_main", *arguments(place, "missed", "--max-kl", "1e-9"))


def told(output: str) -> list[tuple[str, float]]:
    """What was measured, in order: numbers with their counts, and KL."""
    return [(match["counts"], float(match["kl"])) for match in _MEASURED.finditer(output)]


def test_a_divergence_out_of_reach_is_missed_by_so_much(place: Path, missed: subprocess.CompletedProcess[str]) -> None:
    """The error has the divergence of the best variant, as it was measured, and nothing is written."""
    assert missed.returncode == 2
    start, mixed_start, eights, whole_eights = told(missed.stderr)
    assert start[0] == mixed_start[0]
    assert eights[0] == whole_eights[0] == "12 of 8 bits, group -1"
    best = min(eights[1], whole_eights[1])
    assert 0 < best < start[1] / 20
    found = re.search(r"max_kl 1e-09: missed by (\S+): the best .* diverges by (\S+) on calibration", missed.stderr)
    assert found is not None
    assert [float(number) for number in found.groups()] == pytest.approx([best, best], rel=0.05)
    assert not (place / "missed").exists()


def test_a_divergence_that_the_start_meets_needs_one_solution(
    place: Path, missed: subprocess.CompletedProcess[str]
) -> None:
    """The smallest variant that loads, solved as a whole, is near enough: nothing is searched."""
    start, mixed_start, *_ = told(missed.stderr)
    wanted = (start[1] + mixed_start[1]) / 2  # what the start without GPTAQ misses
    done = run("quantize_main", *arguments(place, "start", "--max-kl", wanted))
    assert done.returncode == 0, done.stderr
    assert told(done.stderr) == [start, start]
    assert "solution 1" not in done.stderr


def test_a_divergence_is_met_by_measuring_again(place: Path, missed: subprocess.CompletedProcess[str]) -> None:
    """Mixtures are held to a limit of their own; what is chosen was solved as a whole and meets the real one."""
    start, mixed_start, eights, _ = told(missed.stderr)
    wanted = (start[1] + eights[1]) / 2
    done = run("quantize_main", *arguments(place, "met", "--max-kl", wanted))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("solve: reusing") == 3
    assert 1 <= done.stderr.count("solve ...") <= 3
    measured = told(done.stderr)
    assert measured[:3] == [start, mixed_start, eights]
    assert len(measured) >= 6  # at least one mixture, it as a whole, and what was chosen
    assert measured[-1] in measured[3:-1]
    assert eights[1] < measured[-1][1] <= 1.005 * wanted  # told with three digits
    mixtures = [kl for counts, kl in measured[3:-1] if counts == measured[-1][0] and kl > measured[-1][1]]
    assert max(mixtures) > wanted  # no mixture of these units would have met it
    manifest = Manifest.read(place / "met")
    assert manifest.scheme.name == "auto"
    shapes = read_base(place / "tiny").shapes
    assert {args.bits for name in shapes if (args := weight_args_of(name, manifest.scheme))} == {4, 8}


def test_a_size_is_filled_with_what_diverges_least(place: Path, missed: subprocess.CompletedProcess[str]) -> None:
    """At the size of a uniform variant, the search is as good as that one or better, and no byte larger."""
    base = read_base(place / "tiny")
    most = predicted_bytes(base, preset("w4a16-g64"))
    done = run("quantize_main", *arguments(place, "sized", "--max-bytes", most))
    assert done.returncode == 0, done.stderr
    measured = told(done.stderr)
    assert measured[0][0] == "12 of 4 bits, group 64"
    assert measured[-1][1] <= measured[0][1]
    assert predicted_bytes(base, Manifest.read(place / "sized").scheme) <= most


def test_zero_points_and_8_bits_share_a_variant(place: Path) -> None:
    """4 bits with zero points, 8 bits without, one file format, read back as they were solved."""
    base = read_base(place / "tiny")
    most = predicted_bytes(base, preset("w4a16-asym-g64")) + 50_000
    done = run("quantize_main", *arguments(place, "asymmetric", "--scheme", "auto-asym", "--max-bytes", most))
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(place / "asymmetric")
    assert (manifest.scheme.name, manifest.scheme.compression) == ("auto-asym", "pack-quantized")
    assert predicted_bytes(base, manifest.scheme) <= most
    bits = {args.bits for name in base.shapes if (args := weight_args_of(name, manifest.scheme))}
    assert bits == {4, 8}
    start, best = told(done.stderr)[0], told(done.stderr)[-1]
    assert best[1] < start[1]
    assert manifest.quality.kl_mean < 3 * best[1]


def test_a_search_that_was_killed_goes_on(
    place: Path, missed: subprocess.CompletedProcess[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` in the second solution: what is solved is not solved again, and the variant has the same bytes."""
    monkeypatch.setenv("QUANTGATE_HOME", str(tmp_path / "home"))
    start, _, eights, _ = told(missed.stderr)
    wanted = (start[1] + eights[1]) / 2
    argv = command("quantize_main", *arguments(place, "again", "--max-kl", wanted))
    with subprocess.Popen(argv, cwd=ROOT, env=environ(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "solution 2 of 2" in line:
                break
        process.kill()
    done = run("quantize_main", *arguments(place, "again", "--max-kl", wanted))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("solve: reusing") == 2
    assert Manifest.read(place / "again").files == Manifest.read(place / "met").files
