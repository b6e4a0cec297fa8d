"""Variant directories appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from config.manifest import FILE_NAME, Base, Calibration, Manifest, Quantizer
from config.quality import Quality
from quantize.errors import TargetError
from quantize.schemes.scheme import preset
from quantize.variants.store import require_space, reusable, seal, sealed_files, staging, sweep, work_folder

ROOT = Path(__file__).parents[3]

UNSEALED: dict[str, object] = {
    "id": "smol-int4-01234567",
    "base": Base(name="smol", digest="0" * 64, dtype="bf16"),
    "scheme": preset("w4a16-g64"),
    "calibration": Calibration(sha256="0", samples=16, tokens=100, reasoning_tokens=50, max_tokens=2048, seed=0),
    "quantizer": Quantizer(
        backend="gptqmodel", version="7.6.0", seconds=1.0, damp={"0.01": 7}, modules=7, fallback_modules=()
    ),
    "quality": Quality(
        dataset_sha256="0",
        tokens=9,
        kl_mean=0.01,
        kl_p99=0.1,
        top1_agreement=0.95,
        perplexity_ratio=1.01,
        verdict="pass",
    ),
}


def write_variant(out: Path) -> Manifest:
    """Stage and seal a small variant."""
    with staging(out) as staged:
        (staged / "model.safetensors").write_bytes(b"weights")
        return seal(staged, UNSEALED)


def test_a_variant_appears_with_its_manifest(tmp_path: Path) -> None:
    """After the body the directory stands under its final name, sealed, and nothing else is beside it."""
    manifest = write_variant(tmp_path / "v")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
    assert Manifest.read(tmp_path / "v") == manifest
    assert manifest.altered_files(tmp_path / "v") == []
    assert (datetime.now(UTC) - manifest.created).total_seconds() < 60


def test_work_files_are_not_part_of_a_variant(tmp_path: Path) -> None:
    """Jobs and logs go before the rename."""
    with staging(tmp_path / "v") as staged:
        (work_folder(staged) / "job.json").write_text("{}")
        (staged / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "v").iterdir()] == ["config.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_when_the_body_fails(tmp_path: Path, error: type[BaseException]) -> None:
    """Errors and Ctrl-C leave neither the variant nor its staging directory."""
    with pytest.raises(error), staging(tmp_path / "v") as staged:
        (staged / "half").write_text("")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_the_name_is_free_until_the_body_ends(tmp_path: Path) -> None:
    """A reader never sees a directory without its manifest."""
    with staging(tmp_path / "v") as staged:
        assert staged.parent == tmp_path
        assert not (tmp_path / "v").exists()


def test_a_directory_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """Of two writers the later one is told, and the earlier one's files stay."""
    with pytest.raises(TargetError, match="appeared while the variant was made"), staging(tmp_path / "v"):
        (tmp_path / "v").mkdir()
        (tmp_path / "v" / "theirs").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]
    assert (tmp_path / "v" / "theirs").exists()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    """After kill -9 in mid-staging the final name is free, and the next writer removes the remains."""
    code = (
        "import sys; from pathlib import Path; from quantize.variants.store import staging\n"
        "with staging(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'half').write_text('x'); print('staged', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "v")], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"staged\n"
        assert sweep(tmp_path / "v") == []  # its owner lives
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not (tmp_path / "v").exists()
    (remains,) = tmp_path.iterdir()
    assert str(child.pid) in remains.name
    write_variant(tmp_path / "v")
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


def test_other_targets_remains_are_left_alone(tmp_path: Path) -> None:
    """Sweeping is by name: a neighbour's staging directory is none of our business."""
    neighbour = tmp_path / ".w.999999999.partial"
    neighbour.mkdir()
    assert sweep(tmp_path / "v") == []
    assert sweep(tmp_path / "missing" / "v") == []
    assert sweep(tmp_path / "w") == [neighbour]


def test_remains_of_a_namesake_don_t_stand_in_the_way(tmp_path: Path) -> None:
    """A process that got a dead one's pid stages all the same."""
    (tmp_path / f".v.{os.getpid()}.partial").mkdir()
    write_variant(tmp_path / "v")


def test_a_sealed_variant_of_the_recipe_is_reused(tmp_path: Path) -> None:
    """The id decides; a free or empty place holds nothing to reuse."""
    assert reusable(tmp_path / "v", "smol-int4-01234567") is None
    (tmp_path / "v").mkdir()
    assert reusable(tmp_path / "v", "smol-int4-01234567") is None
    manifest = write_variant(tmp_path / "v")
    assert reusable(tmp_path / "v", "smol-int4-01234567") == manifest


@pytest.mark.parametrize(
    "spoil,problem",
    [
        (lambda out: None, "holds smol-int4-01234567, and this recipe makes other"),
        (lambda out: (out / FILE_NAME).unlink(), "exists and is no sealed variant"),
        (lambda out: (out / FILE_NAME).write_text("{}"), "exists and is no sealed variant"),
    ],
)
def test_anything_else_in_the_way_is_told(tmp_path: Path, spoil: object, problem: str) -> None:
    """Another recipe's variant, or no variant at all, is never replaced."""
    write_variant(tmp_path / "v")
    assert callable(spoil)
    spoil(tmp_path / "v")
    with pytest.raises(TargetError, match=problem):
        reusable(tmp_path / "v", "other")


def test_an_altered_variant_is_not_reused(tmp_path: Path) -> None:
    """A file of another size than sealed is told by name."""
    write_variant(tmp_path / "v")
    (tmp_path / "v" / "model.safetensors").write_bytes(b"shorter"[:3])
    with pytest.raises(TargetError, match=r"model\.safetensors was altered since it was sealed"):
        reusable(tmp_path / "v", "smol-int4-01234567")


def test_a_file_in_the_way_is_told(tmp_path: Path) -> None:
    """A plain file is no place for a variant."""
    (tmp_path / "v").write_text("")
    with pytest.raises(TargetError, match="is a file"):
        reusable(tmp_path / "v", "x")


def test_seals_cover_every_file_but_the_manifest(tmp_path: Path) -> None:
    """Sums and sizes are those of the bytes; what is measured on each machine anew stays open."""
    (tmp_path / "capacity.json").write_text("{}")
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / FILE_NAME).write_text(json.dumps({}))
    (sealed,) = sealed_files(tmp_path).values()
    assert sealed.bytes == 3
    assert sealed.sha256.startswith("ba7816bf")


def test_a_full_disk_is_told_with_figures(tmp_path: Path) -> None:
    """A base that can't fit is refused before any work; one that fits is not."""
    place = tmp_path / "new" / "v"
    require_space({place: (1, "choose another --out")})
    with pytest.raises(TargetError, match=r"no disk space for .*: 1000000000000.00 GB needed, .* GB free; free some"):
        require_space({place: (10**21, "choose another --out"), tmp_path: (1, "")})


def test_a_place_that_cant_be_written_is_told(tmp_path: Path) -> None:
    """A file where a folder should be is no traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="can't be written: "), staging(tmp_path / "file" / "v"):
        pass
