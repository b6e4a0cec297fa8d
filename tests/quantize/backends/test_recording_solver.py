"""The record of a run: activations that are no numbers are named by sample and module, and losses are told."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.backends.layer_checkpoint import LayerCheckpoint  # noqa: E402
from quantize.backends.losses import SolvedModule  # noqa: E402
from quantize.backends.recording_solver import SolverRecord  # noqa: E402
from quantize.errors import CalibrationError  # noqa: E402
from quantize.running.worker import WorkerChannel  # noqa: E402

pytestmark = pytest.mark.real_model

DOWN = "model.layers.3.mlp.down_proj"


def record(folder: Path, told: io.StringIO, completed: frozenset[int] = frozenset()) -> SolverRecord:
    """A record of a run on two samples."""
    lines: Any = told
    return SolverRecord(
        LayerCheckpoint(folder, torch.float32),
        WorkerChannel(lines),
        ("f:1", "f:7"),
        (0.01,),
        completed,
        ids=(range(10), range(20, 30)),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_sample_that_overflows_is_named_with_its_module(tmp_path: Path, value: float) -> None:
    """One activation that is no number is enough, and the other sample is not blamed."""
    kept = record(tmp_path, io.StringIO())
    kept.look(DOWN, torch.ones(1, 5, 8), 0)
    spoiled = torch.ones(1, 5, 8)
    spoiled[0, 3, 2] = value
    kept.look(DOWN, spoiled, 1)
    with pytest.raises(CalibrationError) as caught:
        kept.require_finite(DOWN)
    assert caught.value.problems == [
        f"f:7: non-finite activations (NaN or Inf), first in the input of {DOWN}, at token 3 (id 23); remove this "
        "line, or repair the base"
    ]


def test_many_samples_that_overflow_are_counted(tmp_path: Path) -> None:
    """Ten are named."""
    kept = record(tmp_path, io.StringIO())
    kept.where = [f"f:{number}" for number in range(12)]
    for number in range(12):
        kept.look(DOWN, torch.full((1, 2, 8), float("nan")), number)
    with pytest.raises(CalibrationError) as caught:
        kept.require_finite(DOWN)
    assert caught.value.problems[-1] == "and 2 more samples"
    assert len(caught.value.problems) == 11


def test_sound_activations_pass_once(tmp_path: Path) -> None:
    """What was looked at is forgotten, so a long run's memory doesn't grow."""
    kept = record(tmp_path, io.StringIO())
    kept.look(DOWN, torch.ones(1, 5, 8), 0)
    kept.require_finite(DOWN)
    assert kept.peaks == {}


def test_a_solved_module_is_told_beside_its_kind(tmp_path: Path) -> None:
    """The reader sees a loss that is out of line while the run goes on."""
    told = io.StringIO()
    kept = record(tmp_path, told)
    for layer, loss in enumerate((1.0, 1.0, 12.0)):
        kept.record(SolvedModule(f"model.layers.{layer}.mlp.down_proj", layer, 4, 64, loss, 0.01))
    last = json.loads(told.getvalue().splitlines()[-1])["event"]
    assert (last["module"], last["loss"], last["loss_ratio"]) == ("model.layers.2.mlp.down_proj", 12.0, 12.0)


def test_a_layer_is_declared_whole_once(tmp_path: Path) -> None:
    """A layer that an earlier run solved is not declared again."""
    kept = record(tmp_path, io.StringIO(), completed=frozenset({0}))
    kept.complete(0)
    kept.complete(1)
    assert [path.name for path in tmp_path.iterdir()] == ["layer-1.json"]
