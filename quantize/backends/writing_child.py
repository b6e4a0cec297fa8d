"""The child that writes a variant from solved GPTQ tensors, `python -m quantize.backends.writing_child`.

For a solver that can't do it itself, because its own environment has no room for our packages.
"""

import sys
import time
from pathlib import Path
from typing import Any

from config.manifest import Scheme
from quantize.modules import ModuleTree
from quantize.running.worker import WorkerChannel, run_child
from quantize.variants.checkpoint import write_checkpoint


def write(job: dict[str, Any], _: WorkerChannel) -> dict[str, Any]:
    """Child's work: `{base, raw, scheme, damp, into, tree}` -> the variant's files, and how long they took."""
    started = time.monotonic()
    scheme = Scheme.model_validate(job["scheme"])
    tree = ModuleTree.from_json(job["tree"])
    write_checkpoint(Path(job["base"]), Path(job["raw"]), scheme, job["damp"], Path(job["into"]), tree)
    return {"seconds": round(time.monotonic() - started, 1)}


if __name__ == "__main__":
    sys.exit(run_child(write))
