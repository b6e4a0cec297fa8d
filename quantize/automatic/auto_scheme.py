"""`scheme: auto`: measure what rounding costs each unit of a model, then spend the budget where it helps most."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from importlib import metadata
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
from quantize.schemes.settings import SETTINGS, SolverSettings

# So many tokens are enough to tell units apart, if they come from several chats; every unit reads all of them.
SENSITIVITY_TOKENS = 512
_PIECE_TOKENS = 128
# What GPTQ leaves of the divergence that rounding to nearest with searched scales gives. On SmolLM2-135M in groups of
# 64, on the same 2,304 held-out tokens, rounding gave 0.354; GPTQ with weighted scales 0.107 after 96 samples and 0.148
# after 16, of which the worse one counts here; with the usual script's settings 0.452.
_SHARE, _SHARE_PLAIN_SCALES = 0.42, 1.28
_NAMED = 5
_MODULE = "quantize.automatic.sensitivity"
_LIBRARIES = ("torch", "transformers")
# Raise this when the same job would be measured otherwise.
_REVISION = 2


def resolve_auto(
    base: BaseModel,
    samples: Sequence[Mapping[str, Any]],
    budget: Budget,
    engine: Engine,
    shop: Workshop,
    *,
    tensor_parallel: int = 1,
    settings: SolverSettings = SETTINGS["best"],
) -> Scheme:
    """Choose bits and group size per unit within a budget; RecipeError names the nearest budget that can be met.

    The divergence that is expected is an estimate: units are rounded one at a time, and the sum is multiplied by what
    GPTQ with these settings usually leaves of it. The evaluation of the finished variant is what counts.
    """
    units = units_of(base.shapes, engine, budget.overrides, tensor_parallel=tensor_parallel, heads=heads_of(base))
    kept = kept_bytes(base, units)
    # A size that can't be reached is known before anything is measured.
    allocate({unit.name: options_of(unit, base.shapes, [0.0] * len(unit.choices)) for unit in units}, budget, kept)
    share = gptq_share(settings)
    costs = _costs(base, units, pieces(samples, SENSITIVITY_TOKENS, _PIECE_TOKENS), shop)
    options = {unit.name: options_of(unit, base.shapes, [share * cost for cost in costs[unit.name]]) for unit in units}
    found = allocate(options, budget, kept)
    for line in (sensitive_line(units, costs), allocation_line(found)):
        shop.stages.say(line)
    return written(units, found.numbers, list(base.shapes))


def gptq_share(settings: SolverSettings) -> float:
    """Tell what GPTQ with these settings is expected to leave of the divergence that rounding to nearest gives."""
    return _SHARE if settings.weighted_scales else _SHARE_PLAIN_SCALES


def options_of(unit: Unit, shapes: Mapping[str, tuple[int, int]], kls: Sequence[float]) -> list[Option]:
    """Price each choice of a unit in bytes, and in the divergence that it is expected to add."""
    return [
        Option(
            numbers,
            sum(sum(packed_bytes(module, shapes[module], numbers, "gptq").values()) for module in unit.modules),
            kl,
        )
        for numbers, kl in zip(unit.choices, kls, strict=True)
    ]


def kept_bytes(base: BaseModel, units: Sequence[Unit]) -> int:
    """Bytes of all tensors that no choice changes."""
    searched = {f"{module}.weight" for unit in units for module in unit.modules}
    return sum(tensor.bytes for name, tensor in base.tensors.items() if name not in searched)


def pieces(samples: Sequence[Mapping[str, Any]], most_tokens: int, piece_tokens: int) -> list[list[int]]:
    """Take the first `piece_tokens` ids of samples in order, `most_tokens` together; longer ones if samples are few."""
    if len(samples) * piece_tokens < most_tokens:
        piece_tokens = -(-most_tokens // max(len(samples), 1))
    taken: list[list[int]] = []
    left = most_tokens
    for sample in samples:
        if left < 2:  # a single token predicts nothing
            break
        taken.append(list(sample["ids"][: min(piece_tokens, left)]))
        left -= len(taken[-1])
    return taken


def sensitive_line(units: Sequence[Unit], costs: Mapping[str, Sequence[float]]) -> str:
    """Name the units that suffer most from their smallest numbers."""
    worst = sorted(units, key=lambda unit: -costs[unit.name][0])[:_NAMED]
    return "auto: most sensitive to rounding: " + ", ".join(
        f"{unit.name} (KL {costs[unit.name][0]:.2g} at {unit.choices[0].bits} bits)" for unit in worst
    )


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
    told = [_REVISION, [metadata.version(name) for name in _LIBRARIES], base.digest, samples, asked]
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    file = home_directory(shop.environ) / "sensitivity" / f"{digest}.json"
    known = _kept(file, units)
    if known is not None:
        return known
    job = {"base": str(base.directory.resolve()), "samples": samples, "units": asked}
    with shop.stages.stage("sensitivity", "units") as advance:
        costs = run_worker(_MODULE, job, folder=shop.folder, environ=shop.environ, on_progress=advance)["kl"]
    try:
        _keep(file, costs)
    except OSError as error:
        shop.stages.say(f"{file.parent}: {error.strerror}; the next run will measure again")
    return dict(costs)


def _kept(file: Path, units: Sequence[Unit]) -> Mapping[str, Sequence[float]] | None:
    """Read what was measured before; None where there is nothing whole."""
    try:
        costs = json.loads(file.read_bytes())
        whole = all(len(costs[unit.name]) == len(unit.choices) for unit in units)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(costs) if whole else None


def _keep(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.rename(file)
