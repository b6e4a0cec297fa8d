"""Whether servers serve what is claimed: by their directories, and by the golden prompt."""

import json
import random
from pathlib import Path

import pytest

from config.golden import Golden
from quantize.errors import ReplicaError
from quantize.evaluation.replica_claims import require_claimed, require_not_swapped
from quantize.evaluation.replica_scores import ServedModel

URL = "http://r:8000"


def served(root: object) -> ServedModel:
    """A server of a directory."""
    return ServedModel("m", str(root), 4096, "vllm 0.32.0", None)


def model(folder: Path, name: str, weights: int) -> Path:
    """A model directory of so many bytes."""
    directory = folder / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "model.safetensors").write_bytes(bytes(weights))
    return directory


def test_a_server_of_another_directory_is_refused(tmp_path: Path) -> None:
    """Itself, a link to it and a copy are what is claimed; the parent and any other are not."""
    variant, base, other = (model(tmp_path, name, size) for name, size in (("v", 5), ("b", 9), ("o", 7)))
    (tmp_path / "link").symlink_to(variant)
    for root in (variant, tmp_path / "link", model(tmp_path, "copy", 5)):
        require_claimed(URL, served(root), variant, base)
    with pytest.raises(ReplicaError, match=f"{URL}: serves {base}, not {variant}; are .* swapped"):
        require_claimed(URL, served(base), variant, base)
    with pytest.raises(ReplicaError, match=f"{URL}: serves {other}, not {variant}"):
        require_claimed(URL, served(other), variant, base)


@pytest.mark.parametrize("root", ["", "org/model", "/models/on/another/machine"])
def test_what_cannot_be_known_is_accepted(tmp_path: Path, root: str) -> None:
    """A name of a hub, and a directory that is not here."""
    require_claimed(URL, served(root), tmp_path / "v", tmp_path / "b")


@pytest.mark.parametrize("apart", [0.03, 0.3])
@pytest.mark.parametrize("seed", range(20))
def test_swapped_servers_are_noticed_through_noise(apart: float, seed: int) -> None:
    """At a KL of 0.0005 (0.03 nats apart) and of 0.05, with an engine's noise of 0.06 nats on each server."""
    draw = random.Random(seed)
    parent = [draw.gauss(-2, 1) for _ in range(512)]
    variant = [value + draw.gauss(0, apart) for value in parent]
    golden = Golden(ids=tuple(range(513)), variant=tuple(variant), parent=tuple(parent))
    noisy = [[value + draw.gauss(0, 0.06) for value in values] for values in (variant, parent)]
    require_not_swapped(golden, noisy[0], noisy[1])
    require_not_swapped(golden, noisy[0][:200], noisy[1][:200])
    with pytest.raises(ReplicaError, match="are --replica and --parent-replica swapped"):
        require_not_swapped(golden, noisy[1], noisy[0])


def test_a_variant_like_its_parent_is_never_refused() -> None:
    """Where the records don't differ there is nothing to notice."""
    golden = Golden(ids=(1, 2, 3), variant=(-1.0, -2.0), parent=(-1.0, -2.0))
    require_not_swapped(golden, [-1.1, -2.0], [-1.0, -2.2])
