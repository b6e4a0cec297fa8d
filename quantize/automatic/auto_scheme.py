"""`scheme: auto`: measure what rounding costs each unit of a model, then spend the budget where it helps most."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from config.load import home_directory
from config.manifest import Engine, Scheme
from quantize.automatic.allocation import Allocation, Option, allocate
from quantize.automatic.units import Unit, units_of, written
from quantize.base import BaseModel
from quantize.planning.recipe import Budget
from quantize.running.worker import run_worker
from quantize.running.workshop import Workshop
from quantize.schemes.fit import heads_of
from quantize.schemes.forecast import packed_bytes

# So many tokens are enough to tell units apart; every unit reads all of them.
SENSITIVITY_TOKENS = 512
# What GPTQ leaves of the divergence that rounding to nearest would give: 0.2 on SmolLM2-135M at 4 bits, with a margin.
GPTQ_SHARE = 0.3
_MODULE = "quantize.automatic.sensitivity"
_REVISION = 1


def resolve_auto(
    base: BaseModel,
    samples: Sequence[Mapping[str, Any]],
    budget: Budget,
    engine: Engine,
    shop: Workshop,
    *,
    tensor_parallel: int = 1,
) -> Scheme:
    """Choose bits and group size per unit within a budget; RecipeError names the nearest budget that can be met.

    The divergence that is expected is an estimate: units are rounded one at a time, and the sum is multiplied by what
    GPTQ usually leaves of it. The evaluation of the finished variant is what counts.
    """
    units = units_of(base.shapes, engine, budget.overrides, tensor_parallel=tensor_parallel, heads=heads_of(base))
    costs = _costs(base, units, shortened(samples, SENSITIVITY_TOKENS), shop)
    options = {unit.name: options_of(unit, base.shapes, costs[unit.name]) for unit in units}
    found = allocate(options, budget, kept_bytes(base, units))
    shop.stages.say(allocation_line(found))
    return written(units, found.numbers, list(base.shapes))


def options_of(unit: Unit, shapes: Mapping[str, tuple[int, int]], costs: Sequence[float]) -> list[Option]:
    """Price each choice of a unit in bytes, and in the divergence that it is expected to leave."""
    return [
        Option(
            numbers,
            sum(sum(packed_bytes(module, shapes[module], numbers, "gptq").values()) for module in unit.modules),
            cost * GPTQ_SHARE,
        )
        for numbers, cost in zip(unit.choices, costs, strict=True)
    ]


def kept_bytes(base: BaseModel, units: Sequence[Unit]) -> int:
    """Bytes of all tensors that no choice changes."""
    searched = {f"{module}.weight" for unit in units for module in unit.modules}
    return sum(tensor.bytes for name, tensor in base.tensors.items() if name not in searched)


def shortened(samples: Sequence[Mapping[str, Any]], most_tokens: int) -> list[list[int]]:
    """Take token ids of samples in order, cut where they come to `most_tokens`."""
    taken: list[list[int]] = []
    left = most_tokens
    for sample in samples:
        if left < 2:  # a single token predicts nothing
            break
        taken.append(list(sample["ids"][:left]))
        left -= len(taken[-1])
    return taken


def allocation_line(found: Allocation) -> str:
    """Say what was chosen, in one line."""
    counts: dict[str, int] = {}
    for numbers in found.numbers.values():
        word = f"{numbers.bits} bits, group {numbers.group_size}"
        counts[word] = counts.get(word, 0) + 1
    told = "; ".join(f"{count} of {word}" for word, count in sorted(counts.items()))
    return f"auto: {told}; {found.bytes / 1e6:.1f} MB, mean KL of about {found.kl:.3g} expected"


def _costs(
    base: BaseModel, units: Sequence[Unit], samples: list[list[int]], shop: Workshop
) -> Mapping[str, Sequence[float]]:
    asked = {unit.name: {"modules": unit.modules, "choices": [astuple(one) for one in unit.choices]} for unit in units}
    digest = hashlib.sha256(json.dumps([_REVISION, base.digest, samples, asked]).encode()).hexdigest()
    file = home_directory(shop.environ) / "sensitivity" / f"{digest}.json"
    if file.is_file():
        return dict(json.loads(file.read_bytes()))
    job = {"base": str(base.directory.resolve()), "samples": samples, "units": asked}
    with shop.stages.stage("sensitivity", "units") as advance:
        told = run_worker(_MODULE, job, folder=shop.folder, environ=shop.environ, on_progress=advance)
    _keep(file, told["kl"])
    return dict(told["kl"])


def _keep(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.rename(file)
