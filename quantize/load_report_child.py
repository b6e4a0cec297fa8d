"""The child that builds a base on the meta device: `python -m quantize.load_report_child`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantize.errors import RecipeError, WeightFileError
from quantize.load_report import LoadReport, ShapeMismatch
from quantize.model_class import model_class
from quantize.model_files.weight_files import stored_tensors
from quantize.running.worker import WorkerChannel, run_child

_TORCH_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_load_report(directory: Path) -> LoadReport:
    """Load a base's headers into its model class on the meta device.

    RecipeError where transformers doesn't know the model type or refuses the config; nothing of `auto_map` is run.
    """
    import torch  # noqa: PLC0415

    config = _read_config(directory)
    kind = model_class(config)
    if kind is None:
        raise RecipeError(f"{directory}: transformers has no language model of type {config.model_type}")
    try:
        stored = stored_tensors(directory)
    except WeightFileError as error:
        raise RecipeError(f"{error}; copy the model again") from None
    tensors = {
        name: torch.empty(tensor.shape, dtype=_torch_dtype(tensor.dtype), device="meta")
        for name, tensor in stored.items()
    }
    _, info = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        device_map="meta",
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    return LoadReport(
        architecture=kind.__name__,
        blocks=getattr(config.get_text_config(), "num_hidden_layers", 0),
        missing=tuple(sorted(info["missing_keys"])),
        unexpected=tuple(sorted(info["unexpected_keys"])),
        mismatched=tuple(
            ShapeMismatch(name, tuple(stored), tuple(expected))
            for name, stored, expected in sorted(info["mismatched_keys"])
        ),
    )


def _read_config(directory: Path) -> Any:
    import transformers  # noqa: PLC0415
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415
    from transformers import AutoConfig  # noqa: PLC0415
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: PLC0415

    fields, _ = transformers.PreTrainedConfig.get_config_dict(directory)
    kind = fields.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = "it needs code of its own (auto_map), which is not run; " if "auto_map" in fields else ""
        raise RecipeError(
            f"{directory}: model type {kind} is unknown to transformers {transformers.__version__}: {code}"
            "use a model that transformers supports, or a newer transformers"
        )
    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecipeError(f"{directory / 'config.json'}: transformers refuses it: {_last_line(error)}") from None


def _torch_dtype(name: str) -> Any:
    import torch  # noqa: PLC0415

    return getattr(torch, _TORCH_DTYPES.get(name, "float32"))


def _last_line(error: Exception) -> str:
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1:][0] if str(error).strip() else ""


def report_child(job: dict[str, Any], _: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base}` -> the fields of a LoadReport."""
    return asdict(read_load_report(Path(job["base"])))


if __name__ == "__main__":
    sys.exit(run_child(report_child))
