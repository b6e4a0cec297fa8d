"""Whether two servers serve what is claimed of them: the variant, and its parent. Reads configuration files only."""

from collections.abc import Sequence
from math import fsum
from pathlib import Path

from config.golden import Golden
from quantize.errors import ReplicaError
from quantize.evaluation.replica_scores import ServedModel

# Served difference over recorded difference: 1 as claimed, -1 swapped; rounded activations give 0.5 at the least.
_SWAPPED_BELOW = -0.5


def require_claimed(url: str, served: ServedModel, claimed: Path, other: Path) -> None:
    """Raise ReplicaError if a server serves another directory of this machine than the claimed one.

    What a directory on another machine holds can't be known from here.
    """
    root = Path(served.root)
    if not root.is_absolute() or not (root / "config.json").is_file() or _same_model(root, claimed):
        return
    if _same_model(root, other):
        raise ReplicaError(f"{url}: serves {other}, not {claimed}; are --replica and --parent-replica swapped?")
    raise ReplicaError(f"{url}: serves {root}, not {claimed}; pass the URL of a server of {claimed}")


def require_not_swapped(golden: Golden, variant: Sequence[float], parent: Sequence[float]) -> None:
    """Raise ReplicaError if the parent's server answers the golden prompt like the variant, and the other way round.

    `variant` and `parent` are the served log-probabilities, as many as the golden prompt has or fewer. The served
    difference is projected on the recorded one.
    """
    recorded = [own - other for own, other in zip(golden.variant, golden.parent, strict=True)][: len(variant)]
    served = [own - other for own, other in zip(variant, parent, strict=True)]
    squares = fsum(step * step for step in recorded)
    if not squares:
        return
    slope = fsum(step * value for step, value in zip(recorded, served, strict=True)) / squares
    if slope < _SWAPPED_BELOW:
        raise ReplicaError(
            f"golden prompt: each server answers as the other model is recorded (slope {slope:.2f}, 1 is as recorded); "
            "are --replica and --parent-replica swapped?"
        )


def _same_model(directory: Path, other: Path) -> bool:
    """Tell whether two directories are one, or have equal configs and weights of equal sizes."""
    return directory.resolve() == other.resolve() or _outline(directory) == _outline(other)


def _outline(directory: Path) -> tuple[bytes, tuple[tuple[str, int], ...]]:
    config = directory / "config.json"
    weights = sorted((file.name, file.stat().st_size) for file in directory.glob("*.safetensors"))
    return config.read_bytes() if config.is_file() else b"", tuple(weights)
