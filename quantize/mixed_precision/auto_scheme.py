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
from quantize.base import BaseModel
from quantize.mixed_precision.allocation import Allocation, Option, allocate
from quantize.mixed_precision.module_groups import ModuleGroup, module_groups_of, written
from quantize.planning.recipe import Budget
from quantize.running.context import RunContext
from quantize.running.worker import run_worker
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
_MODULE = "quantize.mixed_precision.sensitivity"
_LIBRARIES = ("torch", "transformers")
# Raise this when the same job would be measured otherwise.
_REVISION = 2


def resolve_auto(
    base: BaseModel,
    samples: Sequence[Mapping[str, Any]],
    budget: Budget,
    engine: Engine,
    context: RunContext,
    *,
    tensor_parallel: int = 1,
    settings: SolverSettings = SETTINGS["best"],
) -> Scheme:
    """Choose bits and group size per unit within a budget; RecipeError names the nearest budget that can be met.

    The divergence that is expected is an estimate: units are rounded one at a time, and the sum is multiplied by what
    GPTQ with these settings usually leaves of it. The evaluation of the finished variant is what counts.
    """
    module_groups = module_groups_of(
        base.shapes, engine, budget.overrides, tensor_parallel=tensor_parallel, heads=heads_of(base)
    )
    kept = kept_bytes(base, module_groups)
    # A size that can't be reached is known before anything is measured.
    allocate(
        {
            module_group.name: options_of(module_group, base.shapes, [0.0] * len(module_group.choices))
            for module_group in module_groups
        },
        budget,
        kept,
    )
    share = gptq_share(settings)
    costs = _costs(base, module_groups, pieces(samples, SENSITIVITY_TOKENS, _PIECE_TOKENS), context)
    options = {
        module_group.name: options_of(module_group, base.shapes, [share * cost for cost in costs[module_group.name]])
        for module_group in module_groups
    }
    found = allocate(options, budget, kept)
    for line in (sensitive_line(module_groups, costs), allocation_line(found)):
        context.progress.log(line)
    return written(module_groups, found.weight_args, list(base.shapes))


def gptq_share(settings: SolverSettings) -> float:
    """Tell what GPTQ with these settings is expected to leave of the divergence that rounding to nearest gives."""
    return _SHARE if settings.weighted_scales else _SHARE_PLAIN_SCALES


def options_of(module_group: ModuleGroup, shapes: Mapping[str, tuple[int, int]], kls: Sequence[float]) -> list[Option]:
    """Price each choice of a unit in bytes, and in the divergence that it is expected to add."""
    return [
        Option(
            weight_args,
            sum(
                sum(packed_bytes(module, shapes[module], weight_args, "gptq").values())
                for module in module_group.modules
            ),
            kl,
        )
        for weight_args, kl in zip(module_group.choices, kls, strict=True)
    ]


def kept_bytes(base: BaseModel, module_groups: Sequence[ModuleGroup]) -> int:
    """Bytes of all tensors that no choice changes."""
    modules = {module for module_group in module_groups for module in module_group.modules}
    searched = {tensor for tensor, stored in base.modules.stored_in.items() if modules.intersection(stored)}
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


def sensitive_line(module_groups: Sequence[ModuleGroup], costs: Mapping[str, Sequence[float]]) -> str:
    """Name the units that suffer most from their smallest numbers."""
    worst = sorted(module_groups, key=lambda module_group: -costs[module_group.name][0])[:_NAMED]
    return "auto: most sensitive to rounding: " + ", ".join(
        f"{module_group.name} (KL {costs[module_group.name][0]:.2g} at {module_group.choices[0].bits} bits)"
        for module_group in worst
    )


def allocation_line(found: Allocation) -> str:
    """Say what was chosen, in one line."""
    counts: dict[str, int] = {}
    for weight_args in found.weight_args.values():
        word = f"{weight_args.bits} bits, group {weight_args.group_size}"
        counts[word] = counts.get(word, 0) + 1
    text = "; ".join(f"{count} of {word}" for word, count in sorted(counts.items()))
    return f"auto: {text}; {found.bytes / 1e6:.1f} MB, mean KL of about {found.kl:.3g} expected"


def _costs(
    base: BaseModel, module_groups: Sequence[ModuleGroup], samples: list[list[int]], context: RunContext
) -> Mapping[str, Sequence[float]]:
    asked = {
        module_group.name: {
            "modules": module_group.modules,
            "choices": [astuple(choice) for choice in module_group.choices],
        }
        for module_group in module_groups
    }
    payload = [_REVISION, [metadata.version(name) for name in _LIBRARIES], base.digest, samples, asked]
    digest = hashlib.sha256(json.dumps(payload).encode()).hexdigest()
    file = home_directory(context.environ) / "sensitivity" / f"{digest}.json"
    known = _kept(file, module_groups)
    if known is not None:
        return known
    job = {"base": str(base.directory.resolve()), "samples": samples, "units": asked}
    with context.progress.stage("sensitivity", "units") as advance:
        costs = run_worker(_MODULE, job, folder=context.folder, environ=context.environ, on_progress=advance)["kl"]
    try:
        _keep(file, costs)
    except OSError as error:
        context.progress.log(f"{file.parent}: {error.strerror}; the next run will measure again")
    return dict(costs)


def _kept(file: Path, module_groups: Sequence[ModuleGroup]) -> Mapping[str, Sequence[float]] | None:
    """Read what was measured before; None where there is nothing whole."""
    try:
        costs = json.loads(file.read_bytes())
        whole = all(len(costs[module_group.name]) == len(module_group.choices) for module_group in module_groups)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return dict(costs) if whole else None


def _keep(file: Path, value: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(json.dumps(value))
    beside.rename(file)
