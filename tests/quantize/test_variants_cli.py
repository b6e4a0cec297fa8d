"""Readers of sealed variants, as processes: data on stdout, one line on stderr where it can't be."""

import json
from pathlib import Path

import pytest

from config.capacity import Capacity, write_capacity
from quantize.variants.store import seal, sealed_files, staging
from tests.config.measurements import measurement
from tests.quantize.artefacts import write_base, write_quantized
from tests.quantize.command_line import run
from tests.quantize.manifests import quality, write_manifest
from tests.quantize.variants.test_store import UNSEALED, write_variant


def test_variants_are_listed_shown_and_verified(tmp_path: Path) -> None:
    """The three readers agree on a sealed variant, as text and as JSON."""
    write_variant(tmp_path / "v")
    assert "smol-int4-01234567" in run("variants_main", "list", tmp_path / "v").stdout
    (told,) = json.loads(run("variants_main", "list", "--json", tmp_path / "v").stdout)
    assert told["id"] == "smol-int4-01234567"
    assert "7 modules at 0.01" in run("variants_main", "show", tmp_path / "v").stdout
    assert json.loads(run("variants_main", "show", "--json", tmp_path / "v").stdout)["scheme"]["bits"] == 4
    verified = run("variants_main", "verify", tmp_path / "v")
    assert (verified.returncode, verified.stdout) == (0, f"{tmp_path / 'v'}: all checksums match\n")


def test_a_folder_of_variants_is_listed(tmp_path: Path) -> None:
    """A folder stands for the variants in it; parents, unfinished and broken ones do not hide the others."""
    for name in ("b", "a", ".unfinished"):
        write_manifest(tmp_path / "all" / name, id=f"smol-{name.strip('.')}")
    (tmp_path / "all" / "parent").mkdir()
    listed = run("variants_main", "list", tmp_path / "all")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["variant", "smol-a", "smol-b"]
    told = json.loads(run("variants_main", "list", "--json", tmp_path / "all").stdout)
    assert [row["directory"] for row in told] == [str(tmp_path / "all" / name) for name in ("a", "b")]
    (tmp_path / "all" / "a" / "manifest.json").write_text("{")
    broken = run("variants_main", "list", tmp_path / "all")
    assert broken.returncode == 1
    assert "smol-b" in broken.stdout
    assert len(broken.stderr.splitlines()) == 1
    assert "all/a/manifest.json: " in broken.stderr


def test_variants_of_a_configuration(tmp_path: Path) -> None:
    """With --config, names of its variants stand for their directories, and no name for all that are sealed."""
    write_manifest(tmp_path / "models" / "a", id="smol-a")
    write_manifest(tmp_path / "models" / "b", id="smol-b")
    (tmp_path / "models" / "parent").mkdir()
    config = tmp_path / "quantgate.yaml"
    config.write_text(
        "variants: {one: {path: models/a}, two: {path: models/b}, base: {path: models/parent}, far: {precision: int4}}"
    )
    named = ("--config", config)
    assert "smol-a" in run("variants_main", "show", "one", *named).stdout
    assert "smol-b" in run("variants_main", "list", "two", *named).stdout
    assert len(run("variants_main", "list", *named).stdout.splitlines()) == 3
    compared = run("variants_main", "diff", "one", "two", *named).stdout.split()
    assert compared[:4] == ["left", "smol-a", "right", "smol-b"]
    unknown = run("variants_main", "show", "ones", *named)
    assert unknown.returncode == 2
    assert "there is no variant 'ones'; did you mean 'one'? known: one, two, base, far" in unknown.stderr
    assert "the variant 'far' has no path" in run("variants_main", "show", "far", *named).stderr
    missing = run("variants_main", "list")
    assert missing.returncode == 2
    assert "DIR is missing: a variant, a folder of variants, or --config FILE" in missing.stderr


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    """Verifying reads every byte and exits with 1 where one has changed."""
    write_variant(tmp_path / "v")
    (tmp_path / "v" / "model.safetensors").write_bytes(b"Weights")
    verified = run("variants_main", "verify", tmp_path / "v")
    assert (verified.returncode, verified.stdout) == (1, f"{tmp_path / 'v'}: checksum mismatch: model.safetensors\n")
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


def test_the_manifest_of_the_seal_is_what_is_listed(tmp_path: Path) -> None:
    """A list tells size and verdict from the manifest alone."""
    with staging(tmp_path / "v") as staged:
        (staged / "model.safetensors").write_bytes(bytes(3_000_000))
        seal(staged, UNSEALED)
    heading, line = run("variants_main", "list", tmp_path / "v").stdout.splitlines()
    assert heading.split()[:3] == ["variant", "scheme", "size"]
    assert "3 MB" in line
    assert "pass" in line


def test_two_variants_are_compared(tmp_path: Path) -> None:
    """As text and as JSON; neither directory needs its weights."""
    write_manifest(tmp_path / "a")
    write_manifest(tmp_path / "b", quality=quality(kl_mean=0.02))
    told = run("variants_main", "diff", tmp_path / "a", tmp_path / "b")
    assert (told.returncode, told.stderr) == (0, "")
    assert "kl_mean: 0.04 -> 0.02 (-0.02, better)" in told.stdout
    (row,) = json.loads(run("variants_main", "diff", "--json", tmp_path / "a", tmp_path / "b").stdout)["differences"]
    assert row["key"] == "kl_mean"


def test_pruning_lists_before_it_removes(tmp_path: Path) -> None:
    """Without --yes nothing goes."""
    write_manifest(tmp_path / "bad", quality=quality(verdict="fail"))
    listed = run("variants_main", "prune", tmp_path, "--failed")
    assert listed.returncode == 0
    assert f"{tmp_path / 'bad'}  its verdict is fail" in listed.stdout
    assert "pass --yes to remove" in listed.stderr
    assert (tmp_path / "bad").exists()
    told = json.loads(run("variants_main", "prune", tmp_path, "--failed", "--json").stdout)
    assert [(each["path"], each["reason"]) for each in told] == [(str(tmp_path / "bad"), "its verdict is fail")]
    done = run("variants_main", "prune", tmp_path, "--failed", "--yes")
    assert (done.returncode, done.stderr) == (0, f"{tmp_path / 'bad'}: removed\n")
    assert list(tmp_path.iterdir()) == []
    assert run("variants_main", "prune", tmp_path).stdout == "nothing to remove\n"


def test_linting_tells_findings(tmp_path: Path) -> None:
    """Exit code 1 and a line each; none is told, too."""
    pytest.importorskip("numpy", reason="scales are read with numpy: install the quantize extra")
    base, variant = write_base(tmp_path / "base"), write_quantized(tmp_path / "v")
    clean = run("variants_main", "lint", variant, "--against", base)
    assert (clean.returncode, clean.stdout) == (0, f"{variant}: no findings\n")
    (variant / "quant_log.csv").write_text("layer")
    spoilt = run("variants_main", "lint", variant)
    assert (spoilt.returncode, spoilt.stdout) == (1, "stray: quant_log.csv: is no part of a variant\n")
    (row,) = json.loads(run("variants_main", "lint", "--json", variant).stdout)
    assert row == {"check": "stray", "where": "quant_log.csv", "problem": "is no part of a variant"}


def test_what_was_measured_of_its_speed_is_no_part_of_a_variant(tmp_path: Path) -> None:
    """With capacity.json beside it lint finds nothing, the seal holds, and variants don't differ by it."""
    pytest.importorskip("numpy", reason="scales are read with numpy: install the quantize extra")
    base, variant = write_base(tmp_path / "base"), write_quantized(tmp_path / "v")
    sealed = write_variant(tmp_path / "w")
    for directory in (base, variant, tmp_path / "w"):
        write_capacity(directory / "capacity.json", Capacity(measurements=(measurement(),)))
    assert run("variants_main", "lint", variant, "--against", base).stdout == f"{variant}: no findings\n"
    assert run("variants_main", "verify", tmp_path / "w").returncode == 0
    assert sealed_files(tmp_path / "w") == sealed.files
    write_variant(tmp_path / "x")
    same = run("variants_main", "diff", "--json", tmp_path / "w", tmp_path / "x").stdout
    assert json.loads(same)["differences"] == []


def test_a_broken_measurement_is_told(tmp_path: Path) -> None:
    """A report names the file, in one line, and is not written."""
    write_manifest(tmp_path / "v")
    (tmp_path / "v" / "capacity.json").write_text("{")
    done = run("variants_main", "report", tmp_path / "v", "--out", tmp_path / "r.html")
    assert done.returncode == 1
    assert "capacity.json: top level: Invalid JSON" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "r.html").exists()


def test_a_report_is_one_file(tmp_path: Path) -> None:
    """Its path is told."""
    write_manifest(tmp_path / "v")
    done = run("variants_main", "report", tmp_path / "v", "--out", tmp_path / "r.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'r.html'}\n", "")
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


def test_adopting_what_vllm_cant_load_is_refused(tmp_path: Path) -> None:
    """One line, exit code 1, and nothing is written."""
    pytest.importorskip("numpy", reason="scales are read with numpy: install the quantize extra")
    base, variant = write_base(tmp_path / "base"), write_quantized(tmp_path / "v", desc_act=True)
    done = run("variants_main", "adopt", variant, "--against", base)
    assert done.returncode == 1
    assert "vLLM no longer loads GPTQ with desc_act (actorder: group) and groups" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (variant / "manifest.json").exists()
