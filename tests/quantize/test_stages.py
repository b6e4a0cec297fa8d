"""A run that stops loses only the stage that it was in: the same command continues there, with the same bytes."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from config.manifest import Manifest
from quantize.stages.solve import completed_layers
from tests.fakes.running import wait_until
from tests.quantize.chats import chat, write_chats
from tests.quantize.command_line import ROOT, command, environ, run
from tests.quantize.models import write_tiny_llama

pytest.importorskip("torch", reason="needs torch: install the quantize extra")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(400)]

LAYERS, KILLED_AFTER = 12, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base of twelve tiny layers, its data, and a variant of an undisturbed run, whose stages are gone."""
    place = tmp_path_factory.mktemp("resume")
    write_chats(place / "chats.jsonl", 60)
    text = [message["content"] for n in range(60) for message in chat(n)["messages"]]
    write_tiny_llama(place / "tiny", text, layers=LAYERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTGATE_HOME", str(place / "home"))
        done = run("quantize_main", *arguments(place, "whole"))
        assert done.returncode == 0, done.stderr
        shutil.rmtree(place / "home" / "stages")
        yield place


def arguments(place: Path, out: str, *more: object) -> tuple[object, ...]:
    """The command line of a run."""
    options = ("--scheme", "w4a16-g64", "--data", place / "chats.jsonl", "--eval-prompts", 0, "--eval-tokens", 500)
    return (place / "tiny", *options, "--out", place / out, *more)


def stages(folder: Path) -> dict[str, Path]:
    """The complete results of stages by name."""
    found = (folder / "home" / "stages").glob("[!.]*")
    return {path.name.rpartition("-")[0]: path for path in found}


def killed(folder: Path, until: str) -> None:
    """Run until `until` is logged, then kill the process; its child dies with it."""
    argv = command("quantize_main", *arguments(folder, "v"))
    with subprocess.Popen(argv, cwd=ROOT, env=environ(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if until in line:
                break
        if until == "solve ...":
            wait_until(lambda: layers(folder) >= KILLED_AFTER or process.poll() is not None, 300)
        assert process.poll() is None, "the run ended before it could be killed"
        process.kill()


def layers(folder: Path) -> int:
    """Layers that an unfinished solve has."""
    return sum(completed_layers(path) for path in (folder / "home" / "stages").glob(".solve-*.partial"))


def test_a_wrong_task_file_is_refused_before_any_work(folder: Path) -> None:
    """It is read in the last stage, and checked first; nothing is written, not even a stage."""
    (folder / "tasks.jsonl").write_text('{"question": "1+1?"}\n')
    for file, problem in (("tasks.jsonl", "tasks.jsonl:1: "), ("missing.jsonl", "missing.jsonl: ")):
        done = run("quantize_main", *arguments(folder, "v", "--tasks", folder / file))
        assert done.returncode == 2
        assert problem in done.stderr
        assert len(done.stderr.splitlines()) == 1
    wrong = run("quantize_main", *arguments(folder, "v", "--limit", "kl_maen=1"))
    assert (wrong.returncode, "kl_maen" in wrong.stderr) == (2, True)
    assert not (folder / "home" / "stages").exists()


def test_a_run_killed_while_solving_continues_after_its_completed_layers(folder: Path) -> None:
    """`kill -9` at layer 4 of 12; every file equals the undisturbed run's."""
    killed(folder, "solve ...")
    left = layers(folder)
    assert KILLED_AFTER <= left < LAYERS
    listed = run("variants_main", "stages")
    assert "solve" in listed.stdout
    assert "unfinished: the same command continues it" in listed.stdout
    done = run("quantize_main", *arguments(folder, "v", "--log", folder / "log.txt"))
    assert done.returncode == 0, done.stderr
    assert f"solve: continues after {left} completed layers" in done.stderr
    assert "tokens: reusing" in done.stderr
    assert Manifest.read(folder / "v").files == Manifest.read(folder / "whole").files
    shutil.rmtree(folder / "v")


def test_the_log_has_every_module_and_no_carriage_returns(folder: Path) -> None:
    """A file can hold what a terminal shows: one line a module, with the time."""
    log = (folder / "log.txt").read_bytes().decode()
    assert "\r" not in log
    assert sum("damping" in line for line in log.splitlines()) == 7 * LAYERS


def test_a_run_killed_in_its_evaluation_keeps_the_checkpoint(folder: Path) -> None:
    """The next run evaluates, and solves and writes nothing."""
    shutil.rmtree(stages(folder)["evaluation"])
    killed(folder, "evaluation ...")
    assert not (folder / "v").exists()
    done = run("quantize_main", *arguments(folder, "v"))
    assert done.returncode == 0, done.stderr
    assert "checkpoint: reusing" in done.stderr
    assert "solve ..." not in done.stderr
    assert Manifest.read(folder / "v").files == Manifest.read(folder / "whole").files
    shutil.rmtree(folder / "v")


def test_other_limits_and_another_name_cost_nothing(folder: Path) -> None:
    """Limits are applied when the variant is sealed: every stage is reused."""
    done = run("quantize_main", *arguments(folder, "strict", "--limit", "kl_mean=1e-9", "--json"))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quality"]["verdict"] == "fail"
    assert [line.partition(":")[0] for line in done.stderr.splitlines() if ": reusing " in line] == [
        "tokens",
        "solve",
        "checkpoint",
        "evaluation",
    ]
    assert [line for line in done.stderr.splitlines() if line.endswith(" ...")] == ["base ..."]
    assert (folder / "strict" / "model.safetensors").stat().st_nlink == 2  # a link to the checkpoint's


def test_a_damaged_checkpoint_is_written_again(folder: Path) -> None:
    """Its checksums do not match, so it counts as missing; the solved layers are still there."""
    weights = stages(folder)["checkpoint"] / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    done = run("quantize_main", *arguments(folder, "v"))
    assert done.returncode == 0, done.stderr
    assert "solve: reusing" in done.stderr
    assert "checkpoint ..." in done.stderr
    assert Manifest.read(folder / "v").files == Manifest.read(folder / "whole").files


def test_stages_are_pruned_by_size(folder: Path) -> None:
    """`variants prune --keep-bytes 0 --yes` removes all of them, and no variant."""
    listed = run("variants_main", "prune", "--keep-bytes", "0")
    assert "beyond --keep-bytes: solve" in listed.stdout
    assert stages(folder).keys() >= {"tokens", "solve", "checkpoint", "evaluation", "parent-states"}
    done = run("variants_main", "prune", "--keep-bytes", "0", "--yes")
    assert done.returncode == 0, done.stderr
    assert stages(folder) == {}
    assert Manifest.read(folder / "v").altered_files(folder / "v") == []
