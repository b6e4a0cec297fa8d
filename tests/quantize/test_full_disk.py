"""A disk that fills up in the middle of a run: one line says so, and no half-made variant appears."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.manifest import Manifest
from quantize.base import read_base
from quantize.running.worker import is_disk_full
from quantize.schemes.forecast import disk_bytes
from quantize.schemes.scheme import preset
from tests.quantize.command_line import run

pytest.importorskip("torch", reason="needs torch: install the quantize extra")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]

SCHEME = "w4a16-g64"


@pytest.fixture
def small_disk(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A filesystem that is just large enough for the stages of a run."""
    place = tmp_path / "disk"
    place.mkdir()
    size = disk_bytes(read_base(tiny_base / "tiny"), preset(SCHEME)) + 900_000
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(options, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs (run as root)")
    monkeypatch.setenv("QUANTGATE_HOME", str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_fills_up_costs_one_stage(tiny_base: Path, small_disk: Path, tmp_path: Path) -> None:
    """Another program takes the space once the layers are solved; with room again, the same command continues."""
    arguments = ("--scheme", SCHEME, "--data", tiny_base / "chats.jsonl", "--eval-prompts", 0, "--eval-tokens", 500)
    taken = small_disk / "taken"
    stages = small_disk / "stages"
    solved = f"{stages}/.solve-*.partial/layer-1.json {stages}/solve-*"  # complete or about to be
    fill = f'until [ -n "$(ls -d {solved} 2>/dev/null)" ]; do :; done; cat /dev/zero > {taken}'
    with subprocess.Popen(["sh", "-c", fill], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
        done = run("quantize_main", tiny_base / "tiny", *arguments, "--out", tmp_path / "v")
    assert done.returncode == 1
    assert f"no space left on the disk of {small_disk}" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "v").exists()
    taken.unlink()
    again = run("quantize_main", tiny_base / "tiny", *arguments, "--out", tmp_path / "v")
    assert again.returncode == 0, again.stderr
    assert "solve: reusing" in again.stderr or "solve: continues after 2 completed layers" in again.stderr
    assert Manifest.read(tmp_path / "v").altered_files(tmp_path / "v") == []


@pytest.mark.parametrize(
    "error,full",
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(13, "Permission denied"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_has_more_than_one_face(error: Exception, full: bool) -> None:
    """Python tells it by number, safetensors in words."""
    assert is_disk_full(error) is full
