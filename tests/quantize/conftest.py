"""A tiny base and its variants, made once for all tests that only read them."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.quantize.chats import chat, write_chats
from tests.quantize.command_line import run
from tests.quantize.models import write_tiny_llama

# GPTQModel reads it when it is imported, and cannot load models with one worker.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

SCHEMES = ("w4a16-g64", "w4a16-asym-g64", "w8a8")
CHATS = 60


@pytest.fixture(scope="session", autouse=True)
def quantgate_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of the test run's own: results of stages of earlier runs would hide what is tested."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTGATE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny`, a random Llama of two layers, and `chats.jsonl`, its calibration text."""
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    folder = tmp_path_factory.mktemp("tiny")
    write_chats(folder / "chats.jsonl", CHATS)
    text = [message["content"] for number in range(CHATS) for message in chat(number)["messages"]]
    model = write_tiny_llama(folder / "tiny", text)
    # As a trainer leaves it: a path of its machine, and the configuration of a processor.
    config = json.loads((model / "config.json").read_bytes())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": "/tmp/checkpoint-500"}))
    (model / "preprocessor_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="session")
def tiny_variants(tiny_base: Path) -> Path:
    """The same folder with a variant of each scheme, made by `quantgate quantize`."""
    pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")
    for scheme in SCHEMES:
        made = quantize(tiny_base, scheme, tiny_base / scheme)
        assert made.returncode == 0, made.stderr
    return tiny_base


def quantize(folder: Path, scheme: str, out: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """Quantize the tiny base of a folder; one scheme is always one recipe, but for `options`."""
    data = ("--scheme", scheme, "--data", folder / "chats.jsonl")
    samples = ("--samples", 16) if scheme in SCHEMES else ()
    # Smoothing changes norms: tests of transforms look at that.
    transform = ("--transform", "none") if scheme == "w8a8" else ()
    return run("quantize_main", folder / "tiny", *data, *samples, *transform, "--out", out, *options)
