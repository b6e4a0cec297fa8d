"""GPTQModel 7.6 as a child process: `python -m quantize.backends.gptqmodel JOB.json`; the only file that imports it."""

import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.backends.protocol import Solved
from quantize.errors import SolveError
from quantize.recipe import Recipe
from quantize.settings import SolverSettings
from quantize.worker import Report, run_child, run_worker

_MODULE = "quantize.backends.gptqmodel"
# GPTQModel writes 999999999 for a module whose loss it never learned.
_ABSURD_LOSS = 1e6
_NAMES_SHOWN = 5


def solve(
    recipe: Recipe,
    samples: list[dict[str, Any]],
    *,
    into: Path,
    work: Path,
    environ: Mapping[str, str],
    on_progress: Callable[[int, int], None],
) -> Solved:
    """Quantize a recipe's base on token samples, in a child process."""
    job = {
        "base": str(recipe.base.directory.resolve()),
        "scheme": recipe.scheme.model_dump(mode="json"),
        "settings": asdict(recipe.settings),
        "samples": [sample["ids"] for sample in samples],
        "into": str(into),
        "raw": str(work / "raw"),
    }
    told = run_worker(_MODULE, job, folder=work, environ=environ, on_progress=on_progress)
    return Solved(told["seconds"], told["modules"], told["damp"])


def settings(scheme: Scheme, chosen: SolverSettings) -> dict[str, Any]:
    """Give every setting whose default differs between AutoGPTQ and GPTQModel, or matters."""
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": True,
        "desc_act": False,
        # Order inside groups costs nothing at run time; it needs groups.
        "act_group_aware": chosen.group_order and scheme.group_size > 0,
        "true_sequential": chosen.true_sequential,
        "mse": chosen.scale_norm,
        "damp_percent": chosen.damp[0],
        "damp_auto_increment": 0.01,
        "offload_to_disk": False,
    }


def judge(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count modules by damping; SolveError names those whose loss is no sane number: rounded, not solved."""
    rows = list(rows)
    bad = [f"layer {row['layer']} {row['module']} (loss {row['loss']})" for row in rows if not _is_sane(row["loss"])]
    if bad:
        more = f" and {len(bad) - _NAMES_SHOWN} more" if len(bad) > _NAMES_SHOWN else ""
        raise SolveError(
            f"{len(bad)} of {len(rows)} modules were rounded to nearest instead of solved: "
            f"{', '.join(bad[:_NAMES_SHOWN])}{more}; look for non-finite weights or activations, or add samples",
        )
    return Counter(f"{float(row['damp']):g}" for row in rows)


def _is_sane(loss: Any) -> bool:
    try:
        return math.isfinite(float(loss)) and float(loss) < _ABSURD_LOSS
    except ValueError:
        return False


class _Layers:
    """GPTQModel's layer callback: it comes twice a layer, the second time when the layer is packed."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total = report, total

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        if submodule_finalized:
            self._report.progress(layer_idx + 1, self._total)


def quantize(job: dict[str, Any], report: Report) -> dict[str, Any]:
    """Child's work: solve, judge the log, write the variant's files."""
    import torch  # noqa: PLC0415
    from gptqmodel import GPTQModel, QuantizeConfig  # noqa: PLC0415

    from quantize.checkpoint import write_checkpoint  # noqa: PLC0415

    scheme = Scheme.model_validate(job["scheme"])
    chosen = SolverSettings(**job["settings"])
    # fp32 on CPU: without bf16 instructions it is faster, and everywhere it is more exact.
    device, dtype = ("cuda:0", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    started = time.monotonic()
    model = GPTQModel.load(job["base"], QuantizeConfig(**settings(scheme, chosen)), device=device, dtype=dtype)
    model.layer_callback = _Layers(report, model.model.config.num_hidden_layers)
    rows = _solve(model, job["samples"])
    damp = judge(rows)
    model.save(job["raw"])
    write_checkpoint(Path(job["base"]), Path(job["raw"]), scheme, chosen.damp[0], Path(job["into"]))
    shutil.rmtree(job["raw"])
    return {"seconds": round(time.monotonic() - started, 1), "modules": len(rows), "damp": dict(damp)}


def _solve(model: Any, samples: list[list[int]]) -> list[dict[str, Any]]:
    tokenized = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    log = model.quantize(tokenized, batch_size=1, calibration_data_min_length=1)
    return [row for rows in log.values() for row in rows]


if __name__ == "__main__":
    sys.exit(run_child(quantize))
