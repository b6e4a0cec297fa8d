"""GPTQModel 7.6 as a child process: its job, and its result."""

from collections.abc import Callable, Mapping
from typing import Any

from config.manifest import Scheme
from quantize.backends.losses import SolvedModule
from quantize.backends.protocol import QuantizeResult, SolveJob
from quantize.modules import ModuleTree
from quantize.planning.block_form import BLOCK_FORMS
from quantize.planning.cost_estimate import CostEstimate
from quantize.planning.recipe import Recipe
from quantize.planning.run_costs import placed_cost
from quantize.running.memory import present_machine
from quantize.running.worker import run_worker
from quantize.schemes.module_config import rules_of, weight_args_of
from quantize.schemes.settings import SolverSettings

_MODULE = "quantize.backends.gptqmodel_child"


def solve(
    recipe: Recipe,
    samples: list[dict[str, Any]],
    solve_job: SolveJob,
    *,
    on_progress: Callable[[int, int], None],
    on_event: Callable[[dict[str, Any]], None],
) -> QuantizeResult:
    """Quantize a recipe's base on token samples, in a child process; MachineError if it has no room for them."""
    cost = placed_cost(recipe, sum(len(sample["ids"]) for sample in samples), present_machine())
    result = run_worker(
        _MODULE,
        job_of(recipe, samples, solve_job, cost),
        folder=solve_job.work,
        environ=visible_devices(solve_job.environ, recipe.devices.gpus),
        on_progress=on_progress,
        on_event=on_event,
    )
    return QuantizeResult.of(result["seconds"], [SolvedModule(**row) for row in result["modules"]])


def residual_job(recipe: Recipe) -> dict[str, Any] | None:
    """Say how much of the residual stream's error is made up for, and which norm reads the stream before the MLP."""
    form = BLOCK_FORMS.get(recipe.base.config.get("model_type", ""))
    if not recipe.settings.gptaq or not recipe.settings.residual or form is None:
        return None
    return {"share": recipe.settings.residual, "mlp_norm": form.mlp_norm}


def settings(scheme: Scheme, chosen: SolverSettings, tree: ModuleTree) -> dict[str, Any]:
    """Give every setting whose default differs between AutoGPTQ and GPTQModel, or matters."""
    args = {layer.solver_name: weight_args_of(layer.stored_name, scheme) for layer in tree.layers}
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": False,
        # Order inside groups costs nothing at run time; it needs groups.
        "act_group_aware": chosen.group_order and scheme.group_size > 0,
        "true_sequential": chosen.true_sequential,
        "mse": 0.0 if chosen.weighted_scales else chosen.scale_norm,
        "damp_percent": chosen.damp[0],
        "damp_auto_increment": 0.0,  # the ladder is ours
        "dynamic": _with_order(rules_of(scheme, args | dict.fromkeys(tree.kept)), scheme, chosen) or None,
    }


def _with_order(
    rules: Mapping[str, dict[str, Any]], scheme: Scheme, chosen: SolverSettings
) -> dict[str, dict[str, Any]]:
    """Say for modules with groups where the scheme has none, and the other way round, that they differ in order, too.

    The library refuses order inside groups for a module with one scale for all inputs.
    """
    grouped = scheme.group_size > 0
    differing = {rule for rule, given in rules.items() if (given.get("group_size", scheme.group_size) > 0) != grouped}
    order = {"act_group_aware": not grouped}
    return {rule: given | order if chosen.group_order and rule in differing else given for rule, given in rules.items()}


def visible_devices(environ: Mapping[str, str], gpus: tuple[int, ...]) -> dict[str, str]:
    """Show the child the chosen GPUs only."""
    chosen = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} if gpus else {}
    return {**environ, **chosen}


def job_of(
    recipe: Recipe, samples: list[dict[str, Any]], solve_job: SolveJob, cost: CostEstimate | None = None
) -> dict[str, Any]:
    """Write down all that the child needs to know; `cost` says where weights and kept inputs are placed."""
    return {
        "base": str(recipe.base.directory.resolve()),
        "by_layers": cost is not None and cost.by_layers,
        "kept_inputs": cost and cost.kept_inputs,
        "tree": recipe.base.modules.as_json(),
        "settings": settings(recipe.scheme, recipe.settings, recipe.base.modules),
        "damping": list(recipe.settings.damp),
        "shrinkage": recipe.settings.shrinkage,
        "gptaq": recipe.settings.gptaq,
        "residual": residual_job(recipe),
        "weighted_scales": recipe.settings.weighted_scales,
        "memory_bytes": recipe.devices.memory_bytes,
        "samples": [sample["ids"] for sample in samples],
        "where": [sample["where"] for sample in samples],
        "into": str(solve_job.into),
        "offload": str(solve_job.work / "offloaded"),
        "expert_fallback": solve_job.expert_fallback,
    }
