"""A model with tied embeddings that stores another output matrix: transformers and vLLM both use the stored one.

Fine-tuning tools leave such files. If the two programs ever differ, calibration and evaluation are of another model
than the one that is served, and such directories have to be refused.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quantize.command_line import ROOT, environ
from tests.quantize.models import write_tiny_llama

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def write_tied_with_other_head(directory: Path) -> Path:
    """A tiny tied Llama with random embeddings, and a random output matrix that isn't theirs."""
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    write_tiny_llama(directory, ["some words to train a tokenizer on"] * 4)
    tensors = load_file(directory / "model.safetensors")
    torch.manual_seed(11)
    for name in (EMBEDDINGS, HEAD):
        tensors[name] = torch.randn_like(tensors[EMBEDDINGS])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.real_model
def test_transformers_takes_the_stored_matrix(tmp_path: Path) -> None:
    """It unties what is stored with different values, whatever config.json says."""
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    base = write_tied_with_other_head(tmp_path / "tied")
    stored = load_file(base / "model.safetensors")
    head = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).lm_head.weight
    assert torch.equal(head, stored[HEAD])
    assert not torch.equal(head, stored[EMBEDDINGS])


@pytest.mark.real_vllm
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_vllm_continues_as_transformers_does(tmp_path: Path) -> None:
    """Greedy tokens of both programs are the same."""
    base = write_tied_with_other_head(tmp_path / "tied")
    argv = [sys.executable, "-m", "tests.quantize.model_files.vllm_tokens", str(base)]
    done = subprocess.run(argv, cwd=ROOT, env=environ(), capture_output=True, text=True, check=False)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TOKENS")] or [done.stderr[-2000:]]
    tokens = json.loads(line.removeprefix("TOKENS"))
    assert tokens["vllm"] == tokens["transformers"]
