"""A run that is killed goes on after its last whole layer, and gives the very bytes an undisturbed run gives."""

import subprocess
from pathlib import Path

import pytest

from config.manifest import Manifest
from quantize.running.resume import completed_layers, solving_folder
from tests.fakes.running import wait_until
from tests.quantize.chats import chat, write_chats
from tests.quantize.command_line import ROOT, command, environ, run
from tests.quantize.models import write_tiny_llama

pytest.importorskip("torch", reason="needs torch: install the quantize extra")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(400)]

LAYERS, KILLED_AFTER = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of twelve tiny layers, its text, and a variant that nobody disturbed."""
    place = tmp_path_factory.mktemp("resume")
    write_chats(place / "chats.jsonl", 60)
    text = [message["content"] for n in range(60) for message in chat(n)["messages"]]
    write_tiny_llama(place / "tiny", text, layers=LAYERS)
    done = run("main", *arguments(place, "whole"))
    assert done.returncode == 0, done.stderr
    return place


def arguments(place: Path, out: str) -> tuple[object, ...]:
    """The command line of a run."""
    options = ("--scheme", "w4a16-g64", "--data", place / "chats.jsonl", "--eval-prompts", 0, "--eval-tokens", 500)
    return (place / "tiny", *options, "--out", place / out)


@pytest.fixture(scope="module")
def killed(folder: Path) -> Path:
    """The target of a run that was killed, child and all, once some layers were whole."""
    out = folder / "resumed"
    told = command("main", *arguments(folder, out.name))
    with subprocess.Popen(
        told, cwd=ROOT, env=environ(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: completed_layers(out) >= KILLED_AFTER or process.poll() is not None, 300)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()
    return out


def test_layers_of_another_recipe_are_not_used(folder: Path, killed: Path) -> None:
    """The same target with another seed: --resume refuses in one line, and keeps what there is."""
    left = completed_layers(killed)
    done = run("main", *arguments(folder, killed.name), "--resume", "--seed", 1)
    assert done.returncode == 2
    assert "another recipe or text" in done.stderr
    assert completed_layers(killed) == left


def test_a_killed_run_goes_on_bit_for_bit(folder: Path, killed: Path) -> None:
    """After `kill -9` at layer 4 of 12, --resume solves the rest; every file equals the undisturbed run's."""
    assert not killed.exists()
    left = completed_layers(killed)
    assert KILLED_AFTER <= left < LAYERS
    done = run("main", *arguments(folder, killed.name), "--resume", "--log", folder / "log.txt")
    assert done.returncode == 0, done.stderr
    assert Manifest.read(killed).files == Manifest.read(folder / "whole").files
    assert not solving_folder(killed).exists()
    assert f"goes on after {left} whole layers" in done.stderr


def test_the_log_has_every_module_and_no_carriage_returns(folder: Path, killed: Path) -> None:
    """A file can hold what a terminal shows: one line a module, with the time."""
    log = (folder / "log.txt").read_bytes().decode()
    assert "\r" not in log
    assert sum("damping" in line for line in log.splitlines()) == 7 * LAYERS
