"""The folder of solved layers: who may use it, when it stays, and when it is thrown away."""

from pathlib import Path

import pytest

from quantize.errors import BusyError, TargetError
from quantize.running.resume import completed_layers, solving, solving_folder


class Stopped(BaseException):
    """A run ends before its time."""


def stopped_run(out: Path, identity: str, layers: int) -> None:
    """Solve some layers, then stop."""
    with pytest.raises(Stopped), solving(out, identity, resume=False) as folder:
        for layer in range(layers):
            (folder / f"layer-{layer}.json").write_text("[]")
        raise Stopped


def test_a_finished_run_leaves_nothing(tmp_path: Path) -> None:
    """The folder is for the time of a run."""
    with solving(tmp_path / "v", "a", resume=False) as folder:
        assert folder == solving_folder(tmp_path / "v")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_stopped_before_a_whole_layer_leaves_nothing(tmp_path: Path) -> None:
    """There is nothing to go on from."""
    stopped_run(tmp_path / "v", "a", layers=0)
    assert list(tmp_path.iterdir()) == []


def test_whole_layers_wait_for_a_resume(tmp_path: Path) -> None:
    """An equal run finds them, and they go when it is done."""
    stopped_run(tmp_path / "v", "a", layers=2)
    assert completed_layers(tmp_path / "v") == 2
    with solving(tmp_path / "v", "a", resume=True) as folder:
        assert sorted(path.name for path in folder.glob("layer-*")) == ["layer-0.json", "layer-1.json"]
    assert list(tmp_path.iterdir()) == []


def test_without_resume_a_run_starts_anew(tmp_path: Path) -> None:
    """What an earlier run left is not mixed in silently."""
    stopped_run(tmp_path / "v", "a", layers=2)
    with solving(tmp_path / "v", "a", resume=False) as folder:
        assert list(folder.glob("layer-*")) == []


def test_another_recipe_can_not_go_on(tmp_path: Path) -> None:
    """Layers of two recipes never meet in one variant; the first run's layers stay."""
    stopped_run(tmp_path / "v", "a", layers=2)
    with (
        pytest.raises(TargetError, match="had another recipe or text"),
        solving(tmp_path / "v", "b", resume=True),
    ):
        pass
    assert completed_layers(tmp_path / "v") == 2


def test_resume_without_anything_to_resume_is_a_plain_run(tmp_path: Path) -> None:
    """An operator may always pass --resume."""
    with solving(tmp_path / "v", "a", resume=True) as folder:
        assert list(folder.glob("layer-*")) == []


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A second run of the same variant is told to wait, and takes nothing away."""
    with solving(tmp_path / "v", "a", resume=False) as folder:
        with (
            pytest.raises(BusyError, match="another process makes this variant"),
            solving(tmp_path / "v", "a", resume=True),
        ):
            pass
        assert folder.is_dir()
