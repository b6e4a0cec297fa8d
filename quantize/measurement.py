"""Hold a variant against its base on held-out samples: run the measuring child, judge what it found."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config.manifest import Quality
from quantize.calibration import contents_digest
from quantize.judgement import judge
from quantize.worker import run_worker
from quantize.workshop import Workshop

# Held-out tokens that both models read; on two CPU cores 135M parameters take about 5 s per thousand.
EVALUATION_TOKENS = 4000


def evaluate(variant: Path, base: Path, held_out: Sequence[dict[str, Any]], bits: int, shop: Workshop) -> Quality:
    """Measure a variant against its base on token samples and judge it by its bits."""
    job = {"base": str(base.resolve()), "variant": str(variant.resolve()), "samples": [row["ids"] for row in held_out]}
    with shop.stages.stage("evaluate", "tokens") as advance:
        told = run_worker("quantize.evaluation", job, folder=shop.folder, environ=shop.environ, on_progress=advance)
    return judge(told, bits, contents_digest(row["sha256"] for row in held_out))
