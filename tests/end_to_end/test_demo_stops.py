"""A stopped demo leaves no process and no unfinished file, whether it serves or is still at work."""

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.bytecode import share_bytecode
from tests.end_to_end.conftest import PORTS, QUICK
from tests.end_to_end.running_demo import Running, alive, noted_sessions, processes_of, start, until

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(2700)]

SHORT_LAYERS = 6


def test_stop_leaves_nothing(serving: Running, home: Path) -> None:
    """Ctrl-C ends a serving demo with code 0, and all processes of its replicas."""
    sessions = noted_sessions(home)
    assert len(sessions) == 3
    assert len(alive(sessions)) >= 9
    assert serving.stop(signal.SIGINT) == 0
    assert alive(sessions) == []
    assert noted_sessions(home) == {}


@pytest.fixture(scope="module")
def short_base(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the demo's base model: enough to be interrupted in, and read in a fifth of the time."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - loads torch

    short = tmp_path_factory.mktemp("short") / smollm2.name
    shutil.copytree(smollm2, short)
    config = json.loads((short / "config.json").read_bytes())
    beyond = tuple(f"model.layers.{layer}." for layer in range(SHORT_LAYERS, config["num_hidden_layers"]))
    (short / "config.json").write_text(json.dumps({**config, "num_hidden_layers": SHORT_LAYERS}))
    tensors = load_file(smollm2 / "model.safetensors")
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(beyond)}
    save_file(rest, short / "model.safetensors", metadata={"format": "pt"})
    return short


@pytest.mark.parametrize("stage", ["base model ...", "layers", "loading, process"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_nothing(
    first_run: Running, home: Path, short_base: Path, tmp_path: Path, stage: str, sent: signal.Signals
) -> None:
    """A signal while the base is unpacked, while it is quantized, while replicas start: exit code 130, nothing is left.

    Results of stages and completed layers stay for the next run, in a folder of their own.
    """
    place = tmp_path / "home"
    (place / "models").mkdir(parents=True)
    share_bytecode(place)
    if stage != "base model ...":
        base = short_base if stage == "layers" else home / "models" / short_base.name
        (place / "models" / base.name).symlink_to(base)
    if stage == "loading, process":
        (place / "variants").symlink_to(home / "variants")
    made = set(place.rglob("*"))
    running = start(tmp_path / "run", place, "demo", *QUICK, *PORTS)
    until(lambda: stage in running.stderr, 300, running)
    assert running.stop(sent) == 130
    assert processes_of(place) == []
    left = {path.relative_to(place).parts[0] for path in set(place.rglob("*")) - made}
    kept = {"logs", "running", "bytecode", "vllm", "variants", "quantgate.yaml", "supervisor.lock"}
    kept |= {"supervisor.id", "seals", "control", "starts.json", "stages"}
    assert {name for name in left if not name.startswith("state.db")} <= kept
    assert list((place / "models").glob(".*")) == []
    assert stage == "loading, process" or list((place / "variants").glob("[!.]*")) == []
    assert [path.name for path in (place / "variants").glob(".*")] == []
