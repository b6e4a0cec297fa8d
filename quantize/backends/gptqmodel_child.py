"""The child that solves, `python -m quantize.backends.gptqmodel_child`."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.backends.gptaq import Correction, corrected
from quantize.backends.layer_checkpoint import LayerCheckpoint
from quantize.backends.module_tree_child import load_definition, names_of
from quantize.backends.recording_solver import SolverRecord, recording
from quantize.backends.residual_stream import ResidualStreams, keeping
from quantize.errors import RecipeError
from quantize.modules import ModuleTree
from quantize.running.worker import WorkerChannel, run_child


class Layers:
    """GPTQModel's layer callback: it comes twice a layer, when it is solved and when it is packed."""

    def __init__(self, record: SolverRecord, total: int) -> None:
        self._record, self._total = record, total

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        """Keep a solved layer; count a packed one."""
        if submodule_finalized:
            self._record.channel.progress(layer_idx + 1, self._total)
        else:
            # Here, and not where the expert is solved: the library ends the process when a solver raises.
            self._record.require_experts()
            self._record.complete(layer_idx)


def quantize(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: solve layer by layer; the solved modules are in the folder `into`."""
    started = time.monotonic()
    device, dtype = choose_device(job["memory_bytes"])
    checkpoint = LayerCheckpoint(Path(job["into"]), dtype)
    record = SolverRecord(
        checkpoint,
        channel,
        job["where"],
        job["damping"],
        checkpoint.completed_layers(),
        job["expert_fallback"],
        sum(map(len, job["samples"])),
        job["samples"],
        shrinkage=job["shrinkage"],
    )
    tree = ModuleTree.from_json(job["tree"])
    model = load(job, device, dtype)
    require_same_layers(model, tree)
    model.layer_callback = Layers(record, model.model.config.get_text_config().num_hidden_layers)
    tokenized = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    streams = ResidualStreams("cpu" if job["kept_inputs"] == "host" else None)
    if job["residual"]:
        streams.watch(model.model, (layer.solver_name for layer in tree.layers), job["residual"]["mlp_norm"])
    residual = job["residual"]["share"] if job["residual"] else 0.0
    correction = Correction(job["gptaq"], residual)
    with recorded(record, correction, streams, weighted_scales=job["weighted_scales"]):
        # In the order they were drawn: a batch's number is its sample's.
        model.quantize(tokenized, batch_size=1, calibration_data_min_length=1, calibration_sort=None)
    return {"seconds": round(time.monotonic() - started, 1), "modules": [asdict(solved) for solved in record.solved]}


def choose_device(memory_bytes: int | None) -> tuple[str, Any]:
    """Choose the first visible GPU in bf16, within `memory_bytes` of it; without one the CPU.

    fp32 on the CPU: without bf16 instructions it is faster, and everywhere it is more exact.
    """
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return "cpu", torch.float32
    if memory_bytes is not None:
        for gpu in range(torch.cuda.device_count()):
            total_bytes = torch.cuda.get_device_properties(gpu).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_bytes / total_bytes), gpu)
    return "cuda:0", torch.bfloat16


def load(job: dict[str, Any], device: str, dtype: Any) -> Any:
    """Load the base for solving; `by_layers` leaves its weights on disk, and puts them there as they are packed."""
    from gptqmodel import QuantizeConfig  # noqa: PLC0415
    from gptqmodel.quantization.config import GPTAQConfig  # noqa: PLC0415

    # A base that holds all experts of a block in one tensor is read layer by layer, too: defuser replaces the blocks of
    # some families before transformers loads them, which then finds no weights for single experts and says nothing.
    by_layers = job["by_layers"] or any(layer["expert"] is not None for layer in job["tree"]["layers"])
    extra: dict[str, Any] = {}
    if job["gptaq"]:
        extra["gptaq"] = GPTAQConfig(alpha=job["gptaq"], device="cpu" if job["kept_inputs"] == "host" else "auto")
    if by_layers:
        extra["offload_to_disk_path"] = job["offload"]
    config = QuantizeConfig(**job["settings"], **extra, offload_to_disk=by_layers)
    return load_definition(Path(job["base"]), config, device=device, dtype=dtype)


def require_same_layers(model: Any, tree: ModuleTree) -> None:
    """Raise RecipeError if the loaded model would quantize other layers than the plan names."""
    planned = {layer.solver_name for layer in tree.layers}
    differing = sorted(planned.symmetric_difference(set(names_of(model)) - set(tree.kept)))
    if differing:
        raise RecipeError(
            f"{model.model_local_path}: {len(differing)} layers are quantized by the solver and not in the files, or "
            f"the other way round, first {differing[0]}; is a shard missing, or config.json another model's?",
        )


@contextmanager
def recorded(
    record: SolverRecord, correction: Correction, streams: ResidualStreams, *, weighted_scales: bool
) -> Iterator[None]:
    """Put our recording classes where the library takes its solvers from: the one seam it has for them."""
    from gptqmodel.looper import gptq_processor as solvers  # noqa: PLC0415
    from gptqmodel.looper import native_processor as passes  # noqa: PLC0415

    plain, gatherer, native = solvers.GPTQ, solvers.GPTAQ, passes.NativeProcessor
    with_correction = corrected(plain, gatherer, correction, streams, record.regularization)
    solvers.GPTQ = recording(plain, record, weighted_scales=weighted_scales)
    solvers.GPTAQ = recording(with_correction, record, weighted_scales=weighted_scales)
    passes.NativeProcessor = keeping(native, streams)
    try:
        yield
    finally:
        solvers.GPTQ, solvers.GPTAQ, passes.NativeProcessor = plain, gatherer, native


if __name__ == "__main__":
    sys.exit(run_child(quantize))
