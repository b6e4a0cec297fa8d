"""`scheme: auto`: what is measured is spent within the budget, and kept for the next run."""

import io
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from config.manifest import Override, Scheme
from config.quantization import grouped
from quantize.base import BaseModel, read_base
from quantize.errors import RecipeError
from quantize.mixed_precision.allocation import Allocation
from quantize.mixed_precision.auto_scheme import (
    allocation_line,
    gptq_share,
    kept_bytes,
    options_of,
    pieces,
    resolve_auto,
    sensitive_line,
)
from quantize.mixed_precision.module_groups import ModuleGroup, module_groups_of
from quantize.planning.recipe import Budget
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from quantize.schemes.engines import require_engine
from quantize.schemes.fit import misfit
from quantize.schemes.forecast import predicted_bytes
from quantize.schemes.module_config import WeightArgs, weight_args_of
from quantize.schemes.settings import SETTINGS
from tests.quantize.shapes import QWQ_32B

SMALL, FINE, LARGE = WeightArgs(4, 128), WeightArgs(4, 32), WeightArgs(8, 128)


def sample(length: int) -> dict[str, Any]:
    """A token sample; its length is all that counts."""
    return {"ids": list(range(length))}


@pytest.mark.parametrize(
    "lengths,taken",
    [
        ([400, 400, 400, 400, 400], [128, 128, 128, 128]),
        ([100, 20, 400, 400, 400, 400, 400], [100, 20, 128, 128, 128, 8]),
        ([400, 111, 400, 400, 400, 400], [128, 111, 128, 128, 17]),
        ([900, 900], [256, 256]),
        ([900], [512]),
        ([30, 40], [30, 40]),
        ([127, 128, 128, 128, 9], [127, 128, 128, 128]),
    ],
)
def test_several_chats_are_read(lengths: Sequence[int], taken: Sequence[int]) -> None:
    """512 tokens of the beginnings of chats, longer ones where there are few; never a single token."""
    found = pieces([sample(length) for length in lengths], 512, 128)
    assert [len(ids) for ids in found] == taken
    assert all(ids == list(range(len(ids))) for ids in found)


def test_no_sample_gives_no_piece() -> None:
    """There is nothing to cut."""
    assert pieces([], 512, 128) == []


@pytest.mark.parametrize("weight_args", [(4, 128), (4, 32), (8, 64)])
def test_options_and_what_is_kept_are_the_forecast(weight_args: tuple[int, int]) -> None:
    """The same numbers everywhere weigh what the forecast says."""
    module_groups = module_groups_of(QWQ_32B.shapes, "cuda")
    chosen = WeightArgs(*weight_args)
    sizes = [
        option.bytes
        for module_group in module_groups
        for option in options_of(module_group, QWQ_32B.shapes, [0.0] * 6)
        if option.weight_args == chosen
    ]
    scheme = Scheme(name="x", compression="gptq", weights=grouped(chosen.bits, chosen.group_size))
    assert sum(sizes) + kept_bytes(QWQ_32B, module_groups) == predicted_bytes(QWQ_32B, scheme)


def test_a_solver_that_tries_harder_is_expected_to_leave_less() -> None:
    """The usual script, which searches no scales, leaves more than rounding with searched ones gives."""
    assert 0 < gptq_share(SETTINGS["best"]) < 1 < gptq_share(SETTINGS["classic"])


def test_what_was_measured_and_chosen_is_told() -> None:
    """One line each."""
    module_groups = [ModuleGroup(name, (name,), (SMALL, FINE)) for name in "abcdefg"]
    costs = {module_group.name: [number / 100, 0.001] for number, module_group in enumerate(module_groups)}
    assert sensitive_line(module_groups, costs) == (
        "auto: most sensitive to rounding: g (KL 0.06 at 4 bits), f (KL 0.05 at 4 bits), e (KL 0.04 at 4 bits), "
        "d (KL 0.03 at 4 bits), c (KL 0.02 at 4 bits)"
    )
    assert allocation_line(Allocation({"a": SMALL, "b": LARGE, "c": SMALL}, 12_345_678, 0.04567)) == (
        "auto: 2 of 4 bits, group 128; 1 of 8 bits, group 128; 12.3 MB, mean KL of about 0.0457 expected"
    )


def run_context(folder: Path, home: Path) -> RunContext:
    """A workshop with a home of its own; what it says is in its stream."""
    environ = child_environ({**os.environ, "QUANTGATE_HOME": str(home)})
    return RunContext(folder, environ, ProgressReporter(io.StringIO()))


def said(context: RunContext) -> str:
    """What a run has told its reader."""
    stream = context.progress.stream
    assert isinstance(stream, io.StringIO)
    return stream.getvalue()


def test_a_size_out_of_reach_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    """The model's files aren't even there."""
    with pytest.raises(RecipeError, match=r"max_bytes 19000.0 MB: the smallest variant that loads has 193\d\d"):
        resolve_auto(
            QWQ_32B, [sample(9)], Budget(max_bytes=19_000_000_000), "cuda", run_context(tmp_path, tmp_path / "home")
        )


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> BaseModel:
    """A tiny Llama."""
    return read_base(tiny_base / "tiny")


@pytest.fixture(scope="module")
def home(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the measurement of the tiny Llama's units for CUDA is kept."""
    home = tmp_path_factory.mktemp("home")
    context = run_context(tmp_path_factory.mktemp("work"), home)
    resolve_auto(base, SAMPLES, Budget(max_kl=10.0), "cuda", context)
    assert "sensitivity: done" in said(context)
    return home


SAMPLES = [{"ids": [7 * place % 250 for place in range(start, start + 90)]} for start in range(5)]


@pytest.mark.real_model
@pytest.mark.timeout(180)
def test_budgets_are_met_without_measuring_again(base: BaseModel, home: Path, tmp_path: Path) -> None:
    """More bytes never give a worse variant; every scheme loads, is named auto, and fits what it may weigh."""
    smallest, largest = (
        predicted_bytes(base, Scheme(name="x", compression="gptq", weights=grouped(bits, size)))
        for bits, size in ((4, 128), (8, 32))
    )
    kls = []
    for step in range(5):
        max_bytes = smallest + step * (largest - smallest) // 4
        context = run_context(tmp_path, home)
        scheme = resolve_auto(base, SAMPLES, Budget(max_bytes=max_bytes), "cuda", context)
        assert scheme.name == "auto"
        assert predicted_bytes(base, scheme) <= max_bytes
        assert misfit(scheme, base.shapes, base.sizes) is None
        require_engine(scheme, "cuda")
        assert "sensitivity" not in said(context)
        kls.append(float(said(context).rsplit("KL of about ", 1)[1].split()[0]))
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] < kls[0] / 50
    # What half of the bytes buy can be asked for by its divergence; the line tells it with three digits.
    again = resolve_auto(base, SAMPLES, Budget(max_kl=kls[2] * 1.01), "cuda", run_context(tmp_path, home))
    assert predicted_bytes(base, again) <= smallest + (largest - smallest) // 2


@pytest.mark.real_model
@pytest.mark.timeout(180)
def test_a_damaged_measurement_is_made_again(base: BaseModel, home: Path, tmp_path: Path) -> None:
    """It gives what the sound one gave, and is whole afterwards."""
    shutil.copytree(home / "stages", tmp_path / "stages")
    (kept,) = (tmp_path / "stages").glob("sensitivity-*/stage.json")
    sound = kept.read_bytes()
    kept.write_bytes(sound[:-9])
    context = run_context(tmp_path, tmp_path)
    resolve_auto(base, SAMPLES, Budget(max_kl=1.0), "cuda", context)
    assert "sensitivity: done" in said(context)
    assert kept.read_bytes() == sound


@pytest.mark.real_model
@pytest.mark.timeout(180)
def test_a_closed_home_stops_nothing(base: BaseModel, tmp_path: Path) -> None:
    """It is told, and the modules that the overrides name have their numbers."""
    (tmp_path / "stages").write_text("not a directory")
    context = run_context(tmp_path, tmp_path)
    overrides = (Override(modules="*.down_proj", bits=4, group_size=32), Override(modules="*.layers.0.self_attn.*"))
    found = resolve_auto(base, SAMPLES, Budget(max_kl=10.0, overrides=overrides), "cpu", context)
    assert "the next run will measure again" in said(context)
    assert weight_args_of("model.layers.1.mlp.down_proj", found) == FINE
    assert weight_args_of("model.layers.0.self_attn.q_proj", found) is None
    assert weight_args_of("model.layers.1.mlp.up_proj", found) == SMALL
