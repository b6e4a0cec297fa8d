"""The child that writes a variant from solved modules, `python -m quantize.backends.writing_child`."""

import sys
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.backends.packing import packed_tensors, rounded_tensors
from quantize.modules import ModuleTree
from quantize.running.worker import WorkerChannel, run_child
from quantize.schemes.makers import is_data_free
from quantize.variants.checkpoint import write_checkpoint


def write(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, solved, bits, scheme, damp, into, tree, cache_scales}` -> the variant's files in `into`."""
    written: set[str] = set()

    def on_module(name: str) -> None:
        written.add(name)
        channel.progress(len(written), len(job["bits"]))

    scheme = Scheme.model_validate(job["scheme"])
    folder = Path(job["solved"])
    if is_data_free(scheme):
        packed = rounded_tensors(folder, job["bits"], on_module)
    else:
        packed = packed_tensors(folder, job["bits"], on_module)
    tree = ModuleTree.from_json(job["tree"])
    into = Path(job["into"])
    write_checkpoint(Path(job["base"]), packed, scheme, job["damp"], into, tree, job["cache_scales"])
    return {}


if __name__ == "__main__":
    sys.exit(run_child(write))
