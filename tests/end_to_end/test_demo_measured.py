"""A variant of the demo, measured through its running replica and that of its parent, and by transformers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from config.quality import Quality
from tests.end_to_end.running_demo import ROOT, Running, admin_address, environment

pytestmark = [pytest.mark.real_vllm, pytest.mark.timeout(900)]

TOP_K = 20
SCOPE = ("--eval-chats", "8", "--max-tokens", "256", "--eval-prompts", "2", "--eval-new-tokens", "24")


def test_int8_through_its_replica(serving: Running, home: Path, smollm2: Path) -> None:
    """Replicas and transformers measure the same chats: their intervals overlap.

    The other engine rounds activations differently, and of 20 tokens a position the KL is an estimate (RESULTS.md).
    """
    urls = {each["variant"]: str(each["url"]) for each in listed(serving)}
    variant = directory(home, "smol-int8")
    through = ("--replica", urls["smol-int8"], "--parent-replica", urls["smol-bf16"])
    served, computed = evaluated(home, variant, smollm2, *through), evaluated(home, variant, smollm2)
    assert (served.method, served.top_k) == ("vllm 0.32.0", TOP_K)
    assert served.dataset_sha256 == computed.dataset_sha256
    assert (served.tokens, served.chats) == (computed.tokens, computed.chats)
    assert overlap(interval(computed), interval(served))
    # Replicas also round to bf16, which is about 0.001: a tenth of what int8 leaves after smoothing.
    assert 0.7 < served.kl_mean / computed.kl_mean < 1.5
    assert served.kl_floor is not None
    assert served.kl_floor < served.kl_mean
    assert served.generation is not None
    assert served.generation.prompts == 2


def interval(quality: Quality) -> tuple[float, float]:
    """The interval of the mean divergence."""
    low, high = (quality.bound("kl_mean", upper=upper) for upper in (False, True))
    assert low is not None
    assert high is not None
    return low, high


def overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether two intervals have a common point."""
    return max(one[0], other[0]) <= min(one[1], other[1])


def evaluated(home: Path, variant: Path, base: Path, *flags: str) -> Quality:
    """What `quantgate evaluate --json` prints."""
    command = [sys.executable, "-m", "quantgate", "evaluate", str(variant), "--against", str(base), "--json"]
    done = subprocess.run(
        [*command, *SCOPE, *flags], cwd=ROOT, env=environment(home), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Quality.model_validate_json(done.stdout)


def listed(serving: Running) -> list[dict[str, Any]]:
    """All replicas as the admin port lists them."""
    return list(httpx.get(f"{admin_address(serving)}/admin/replicas").json())


def directory(home: Path, variant: str) -> Path:
    """A variant's directory, from the demo's configuration."""
    return Path(yaml.safe_load((home / "quantgate.yaml").read_text())["variants"][variant]["path"])
