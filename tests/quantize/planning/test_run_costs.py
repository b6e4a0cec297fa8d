"""What a run takes, stage by stage: large models by their published shapes, and what is refused for want of memory."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantize.calibration.datasets import CalibrationSplit
from quantize.calibration.records import Message, Record
from quantize.errors import MachineError
from quantize.evaluation.evaluate import EvaluationPlan
from quantize.planning.cost_estimate import Room, blocks_of, estimate_cost, kept_input_bytes
from quantize.planning.model_sizes import sizes_of
from quantize.planning.recipe import Budget, Devices
from quantize.planning.request import Request
from quantize.planning.run_costs import (
    RunCosts,
    require_evaluation_room,
    require_room,
    run_costs,
    usable_gpus,
    what_fits,
)
from quantize.planning.stage_costs import StageCost
from quantize.running.memory import Machine
from quantize.schemes.scheme import preset
from quantize.schemes.settings import SETTINGS
from tests.quantize.shapes import QWQ_32B

GIGA = 10**9
SCHEME = preset("w4a16-g128")
REQUEST = Request(Path("/models/QwQ-32B"), SCHEME, "cuda", Path("out"), max_tokens=4096)
RECORD = Record((Message("user", "word " * 40), Message("assistant", "word " * 400)), "f:1", "1")
SPLIT = CalibrationSplit((RECORD,) * 128, (RECORD,) * 16)
SERVER = Machine(16, 128 * GIGA, 128 * GIGA, (80 * GIGA,))


def costs(request: Request = REQUEST, machine: Machine = SERVER) -> RunCosts:
    """Of QwQ-32B."""
    return run_costs(request, QWQ_32B, SCHEME, SPLIT, machine)


def stage(found: RunCosts, name: str) -> StageCost:
    """One of the stages."""
    return next(stage for stage in found.stages if stage.stage == name)


def test_the_parts_of_a_model_are_counted() -> None:
    """The published shapes of QwQ-32B: 32.8 billion weights, 64 layers, 256 KB of keys and values a token in bf16."""
    sizes = sizes_of(QWQ_32B)
    assert sizes.parameters == pytest.approx(32.76e9, rel=0.001)
    assert (sizes.layers, sizes.hidden, sizes.vocabulary, sizes.matrix) == (64, 5120, 0, 5120 * 27648)
    assert sizes.kv * 2 == 262_144


@pytest.mark.parametrize(
    "tokens,placement,gigabytes",
    [(160_000, "gpu", 6.55), (160_000, "host", 11.47), (524_288, "gpu", 21.47), (524_288, "host", 37.58)],
)
def test_the_inputs_that_gptaq_keeps(tokens: int, placement: str, gigabytes: float) -> None:
    """Modules that read the same tensor share it on the GPU; in main memory each has its own copy."""
    block = next(iter(blocks_of(QWQ_32B.shapes).values()))
    assert kept_input_bytes(block, tokens, "cuda", placement) / 1e9 == pytest.approx(gigabytes, abs=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "gpu,host,placement,by_layers",
    [
        (80, 128, "gpu", False),
        (80, 40, "gpu", True),
        (24, 128, "host", False),
        (24, 40, "host", True),
        (24, 20, None, True),
    ],
)
def test_what_doesnt_fit_is_placed_elsewhere(gpu: int, host: int, placement: str | None, by_layers: bool) -> None:
    """The GPU first, then main memory, then GPTAQ is off; weights wait on disk where main memory has no room."""
    cost = estimate_cost(QWQ_32B, 160_000, SETTINGS["best"], "cuda", room=Room(host * GIGA, gpu * GIGA))
    assert (cost.kept_inputs, cost.by_layers) == (placement, by_layers)
    assert (cost.kept_input_bytes > 0) == (placement is not None)


@pytest.mark.parametrize("budget", [Budget(max_kl=0.05), Budget(max_bytes=19 * GIGA)])
def test_a_search_counts_all_its_solutions(budget: Budget) -> None:
    """Up to six solutions of equal cost, and a model that is whole in memory while its units are exchanged."""
    once, found = costs(), costs(replace(REQUEST, scheme=budget))
    solve, more = stage(once, "solve"), "solve, 5 more"
    assert stage(found, more).seconds == pytest.approx((budget.most_solves - 1) * solve.seconds)
    assert stage(found, more).gpu_bytes == solve.gpu_bytes
    assert 65e9 < stage(found, "sensitivity").gpu_bytes < 70e9
    assert 60 < stage(found, "sensitivity").seconds < solve.seconds
    assert {one.stage for one in found.stages} - {one.stage for one in once.stages} == {more, "sensitivity"}


def test_a_transform_is_a_stage_of_its_own() -> None:
    """QwQ-32B is read by layers, as in an evaluation, and written in fp32: 131 GB."""
    assert all(stage.stage != "transform" for stage in costs().stages)
    found = costs(replace(REQUEST, transforms=("smooth",)))
    names = [stage.stage for stage in found.stages]
    assert names.index("tokenize") + 1 == names.index("transform") == names.index("solve") - 1
    assert stage(found, "transform").seconds > 4 * 32.76 / 1.5
    assert stage(found, "transform").gpu_bytes < 10 * GIGA


def test_reading_takes_a_layer_and_writing_the_model() -> None:
    """No stage but generation holds a whole model on the GPU, and none holds it in main memory in fp32."""
    found = costs()
    assert stage(found, "evaluate: variant reads").gpu_bytes < 10e9
    assert stage(found, "evaluate: variant reads").host_bytes < 10e9
    assert stage(found, "evaluate: both write").gpu_bytes > 65e9
    assert stage(found, "write checkpoint").host_bytes < 10e9
    assert max(one.host_bytes for one in found.stages) < 80e9
    assert not found.shortages
    assert "evaluate: both write" not in [
        one.stage for one in costs(replace(REQUEST, evaluation=EvaluationPlan(prompts=0))).stages
    ]


def test_answers_of_its_own_are_planned_unless_a_replica_writes_them() -> None:
    """A 32B on a GPU with 80 GB writes several answers at once."""
    request = replace(REQUEST, self_generate=128)
    alone, spread = costs(request), costs(request, replace(SERVER, gpu_bytes=(80 * GIGA,) * 4))
    assert stage(spread, "self-generate").seconds < stage(alone, "self-generate").seconds < 4 * 3600
    assert "self-generate" not in [one.stage for one in costs(replace(request, replica="http://base:8000")).stages]


@pytest.mark.parametrize(
    "machine,told",
    [
        (
            replace(SERVER, gpu_bytes=(48 * GIGA,)),
            r"too little GPU memory for stage 'evaluate: both write': about 7\d\.\d GB needed, 43.2 GB usable on 1 "
            r"GPU; it fits 4 x 24 GB, 2 x 40 GB, 2 x 48 GB, 1 x 80 GB, .*; or leave out generation: --eval-prompts 0",
        ),
        (
            replace(SERVER, gpu_bytes=(), memory_bytes=30 * GIGA),
            r"too little memory for stage 'evaluate: both write': about 14\d\.\d GB needed, 30\.0 GB available",
        ),
    ],
)
def test_what_doesnt_fit_is_refused(machine: Machine, told: str) -> None:
    """With the stage, both numbers, and what to do."""
    found = run_costs(REQUEST, QWQ_32B, SCHEME, SPLIT, machine, engine=machine.engine)
    with pytest.raises(MachineError, match=told):
        require_room(found)
    require_room(costs())


def test_an_evaluation_alone_is_checked_too() -> None:
    """Reading fits a small GPU; generation doesn't."""
    small = replace(SERVER, gpu_bytes=(24 * GIGA,))
    require_evaluation_room(QWQ_32B, EvaluationPlan(prompts=0), 20 * GIGA, small)
    with pytest.raises(MachineError, match="'evaluate: both write'"):
        require_evaluation_room(QWQ_32B, EvaluationPlan(), 20 * GIGA, small)


def test_a_plan_for_another_machine_lacks_nothing() -> None:
    """A laptop plans for a server."""
    assert costs(machine=Machine(2, 8 * GIGA, 16 * GIGA)).shortages == ()


def test_named_gpus_and_their_limit_count() -> None:
    """Those of `--gpus`, up to `--gpu-memory` each."""
    machine = replace(SERVER, gpu_bytes=(80, 40, 24))
    assert usable_gpus(Devices(), machine) == (80, 40, 24)
    assert usable_gpus(Devices((1, 2), 30), machine) == (30, 24)


def test_what_would_fit_is_told() -> None:
    """Usual GPUs; nothing for what no machine has."""
    assert what_fits(60 * GIGA, spread=False) == "it fits 1 x 80 GB, 1 x 141 GB, 1 x 192 GB"
    assert what_fits(10**13, spread=True) == "it fits no single machine of 8 GPUs"
