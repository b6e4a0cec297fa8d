"""The whole way with the real library: a tiny random Llama becomes variants, and every figure can be read back."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.manifest import Manifest
from config.quantization import QuantizationArgs, kv_cache_of
from quantize.base import read_base
from quantize.model_files.kept_files import kept_files
from quantize.schemes.forecast import predicted_bytes
from quantize.variants.weights import read_dense
from tests.fakes.running import wait_until
from tests.quantize.command_line import ROOT, command, environ, run
from tests.quantize.conftest import SCHEMES, quantize
from tests.quantize.models import CHATML

safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors: install the quantize extra")
torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")
pytest.importorskip("gptqmodel", reason="needs gptqmodel: install the quantize extra")

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(300)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_variant_is_whole(tiny_variants: Path, scheme: str) -> None:
    """The manifest tells scheme, text and quality, and the seal holds."""
    manifest = Manifest.read(tiny_variants / scheme)
    assert manifest.altered_files(tiny_variants / scheme) == []
    assert manifest.scheme.name == scheme
    assert manifest.quantizer.modules == 14
    assert manifest.quantizer.fallback_modules == ()
    assert manifest.calibration is not None
    assert manifest.calibration.samples == 16
    assert 0 < manifest.calibration.reasoning_tokens < manifest.calibration.tokens
    assert 0 < manifest.quality.kl_mean < 0.1
    assert manifest.quality.top1_agreement > 0.5
    assert not list((tiny_variants / scheme).glob(".*"))
    size = (tiny_variants / scheme / "model.safetensors").stat().st_size
    assert size == pytest.approx(predicted_bytes(read_base(tiny_variants / "tiny"), manifest.scheme), rel=0.05)
    modules = json.loads((tiny_variants / scheme / "quant_log.json").read_bytes())["modules"]
    assert len(modules) == 14
    assert not any(module["fallback"] for module in modules)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_words_and_untouched_tensors_are_the_bases_own(tiny_variants: Path, scheme: str) -> None:
    """Tokenizer, template and generation config are copied byte for byte; embeddings and norms bit for bit."""
    for file in kept_files(tiny_variants / "tiny"):
        assert (tiny_variants / scheme / file.name).read_bytes() == file.read_bytes()
    ours, layers = read_dense(tiny_variants / scheme)
    theirs = dict(_tensors(tiny_variants / "tiny"))
    assert ours.keys() == theirs.keys()
    assert len(layers) == 14
    for name in theirs.keys() - {f"{layer}.weight" for layer in layers}:
        assert torch.equal(ours[name], theirs[name]), name
    for layer in layers:
        error = (ours[f"{layer}.weight"] - theirs[f"{layer}.weight"].float()).norm()
        assert error < 0.2 * theirs[f"{layer}.weight"].float().norm(), layer


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_tells_where_it_was_made(tiny_variants: Path, scheme: str) -> None:
    """No text file of a variant holds a path of this machine."""
    for file in (tiny_variants / scheme).glob("*.json"):
        assert str(tiny_variants) not in file.read_text(), file.name
        assert "/tmp" not in file.read_text(), file.name


def test_fp8_needs_no_calibration(tiny_base: Path) -> None:
    """Made and measured like every variant, from the base alone: another seed is the same variant."""
    out = tiny_base / "fp8-dynamic"
    made = quantize(tiny_base, "fp8-dynamic", out, "--eval-prompts", 0)
    assert made.returncode == 0, made.stderr
    manifest = Manifest.read(out)
    assert (manifest.scheme.name, manifest.scheme.precision) == ("fp8-dynamic", "fp8")
    assert (manifest.quantizer.backend, manifest.quantizer.modules, manifest.calibration) == ("rtn-fp8", 14, None)
    assert 0 < manifest.quality.kl_mean < 0.1
    again = quantize(tiny_base, "fp8-dynamic", out, "--eval-prompts", 0, "--seed", 1)
    assert again.returncode == 0
    assert "reused" in again.stderr


def test_scales_of_a_kv_cache_are_in_the_variant(tiny_base: Path) -> None:
    """Two a layer, in the configuration and the manifest, which then names the text that they come from."""
    out = tiny_base / "kv-fp8"
    made = quantize(tiny_base, "fp8-dynamic", out, "--eval-prompts", 0, "--kv-cache", "fp8")
    assert made.returncode == 0, made.stderr
    manifest = Manifest.read(out)
    assert (manifest.scheme.name, manifest.scheme.kv_cache) == ("fp8-dynamic-kv-fp8", QuantizationArgs(type="float"))
    assert manifest.calibration is not None
    assert 0 < manifest.quality.kl_mean < 0.1
    told = json.loads((out / "config.json").read_bytes())["quantization_config"]
    assert kv_cache_of(told) == manifest.scheme.kv_cache
    tensors = safetensors_torch.load_file(out / "model.safetensors")
    scales = {name: float(value) for name, value in tensors.items() if name.endswith((".k_scale", ".v_scale"))}
    assert set(scales) == {f"model.layers.{layer}.self_attn.{part}_scale" for layer in range(2) for part in "kv"}
    assert all(0 < scale < 1 for scale in scales.values())


def test_gptq_configs_agree(tiny_variants: Path) -> None:
    """Both places where a GPTQ reader may look say the same, in AutoGPTQ's words."""
    out = tiny_variants / "w4a16-g64"
    told = json.loads((out / "config.json").read_bytes())["quantization_config"]
    assert told == json.loads((out / "quantize_config.json").read_bytes())
    assert (told["quant_method"], told["checkpoint_format"], told["bits"], told["group_size"]) == (
        "gptq",
        "gptq",
        4,
        64,
    )


def test_int4_reads_like_the_librarys_own_loader(tiny_variants: Path) -> None:
    """Our reading of the packed words is GPTQModel's: dense weights agree layer by layer."""
    code = (
        "import sys, torch; from gptqmodel import GPTQModel, BACKEND\n"
        "model = GPTQModel.load(sys.argv[1], backend=BACKEND.GPTQ_TORCH, device='cpu').model\n"
        "layer = model.model.layers[1].mlp.down_proj\n"
        "torch.save(layer(torch.eye(256, dtype=torch.float16)[None])[0].float().t(), sys.argv[2])\n"
    )
    target = tiny_variants / "down.pt"
    env = {**environ(), "GPTQMODEL_CPU_WORKERS": "2"}
    subprocess.run(
        [sys.executable, "-c", code, tiny_variants / "w4a16-g64", target], env=env, check=True, capture_output=True
    )
    ours, _ = read_dense(tiny_variants / "w4a16-g64")
    assert torch.allclose(torch.load(target), ours["model.layers.1.mlp.down_proj.weight"], rtol=0.01)  # bf16


def test_the_same_recipe_gives_the_same_bytes(tiny_variants: Path) -> None:
    """Two runs of one recipe differ in time and duration only."""
    again = quantize(tiny_variants, "w4a16-g64", tiny_variants / "again", "--json", "--no-resume")
    assert again.returncode == 0, again.stderr
    first, second = Manifest.read(tiny_variants / "w4a16-g64"), Manifest.model_validate_json(again.stdout)
    assert (first.id, first.files, first.quality) == (second.id, second.files, second.quality)


def test_a_finished_variant_is_reused(tiny_variants: Path) -> None:
    """The second command finds the variant of its recipe and makes nothing; another seed is another recipe."""
    before = (tiny_variants / "w8a8" / "manifest.json").stat().st_mtime_ns
    reused = quantize(tiny_variants, "w8a8", tiny_variants / "w8a8")
    assert reused.returncode == 0
    assert "reused, it already holds tiny-int8-" in reused.stderr
    assert "tokens" not in reused.stderr
    assert (tiny_variants / "w8a8" / "manifest.json").stat().st_mtime_ns == before
    assert quantize(tiny_variants, "w8a8", tiny_variants / "w8a8", "--seed", 1).returncode == 2


def test_the_gate_speaks_through_the_exit_code(tiny_variants: Path) -> None:
    """A missed limit is no error unless --gate asks; then it is 3."""
    passed = Manifest.read(tiny_variants / "w4a16-g64").quality.verdict == "pass"
    assert quantize(tiny_variants, "w4a16-g64", tiny_variants / "w4a16-g64").returncode == 0
    assert quantize(tiny_variants, "w4a16-g64", tiny_variants / "w4a16-g64", "--gate").returncode == (
        0 if passed else 3
    )


def test_evaluating_again_gives_the_sealed_figures(tiny_variants: Path) -> None:
    """`evaluate` on the same text measures what the manifest says."""
    done = run(
        "evaluate_main",
        tiny_variants / "w8a8",
        "--against",
        tiny_variants / "tiny",
        "--data",
        tiny_variants / "chats.jsonl",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    sealed = Manifest.read(tiny_variants / "w8a8").quality
    assert json.loads(done.stdout)["kl_mean"] == pytest.approx(sealed.kl_mean)
    assert json.loads(done.stdout)["perplexity_ratio"] == pytest.approx(sealed.perplexity_ratio)


# One process runs all checks: importing GPTQModel takes most of the time.
CHECK_EACH = """
import sys
from tests.benchmarks.reproduce import main
variants, rest = sys.argv[1].split(","), sys.argv[2:]
print("exit codes", *(main([variant, *rest]) for variant in variants))
"""


def test_the_independent_check_finds_a_true_manifest_and_a_false_one(tiny_variants: Path, tmp_path: Path) -> None:
    """`tests.benchmarks.reproduce` confirms figures of both int4 formats, and rejects a manifest with a better KL."""
    variant, false = tiny_variants / "w4a16-g64", tmp_path / "false"
    shutil.copytree(variant, false)
    sealed = Manifest.read(variant)
    better = sealed.quality.model_copy(update={"kl_mean": sealed.quality.kl_mean * 0.9})
    (false / "manifest.json").write_text(sealed.model_copy(update={"quality": better}).to_json())
    rest = ("--against", tiny_variants / "tiny", "--data", tiny_variants / "chats.jsonl")
    variants = ",".join(map(str, (variant, tiny_variants / "w4a16-asym-g64", false)))
    argv = [sys.executable, "-c", CHECK_EACH, variants, *map(str, rest)]
    done = subprocess.run(argv, cwd=ROOT, env=environ(), capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "exit codes 0 0 1", done.stdout + done.stderr


def test_a_weight_that_is_no_number_is_an_error_by_name(tiny_variants: Path, tmp_path: Path) -> None:
    """A NaN in one matrix makes GPTQModel fall back silently; the solver names the module, and nothing is written."""
    base = _copy_with(tiny_variants / "tiny", tmp_path / "broken")
    done = run(
        "quantize_main",
        base,
        "--scheme",
        "w4a16-g64",
        "--data",
        tiny_variants / "chats.jsonl",
        "--out",
        tmp_path / "out",
    )
    assert done.returncode == 2
    told = "model.layers.0.mlp.up_proj: has non-finite weights (NaN or Inf); repair the base, or copy it again"
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("number,code,word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_in_the_quantize_stage_leaves_nothing(
    tiny_variants: Path, tmp_path: Path, number: int, code: int, word: str
) -> None:
    """Ctrl-C and SIGTERM end the child, remove what was staged, and say so in one line."""
    with _started(tiny_variants, tmp_path) as process:
        _read_until(process, "solve ...")
        watch = os.pidfd_open(child_of(process.pid))
        process.send_signal(number)
        _, told = process.communicate(timeout=30)
    assert process.returncode == code
    assert told.splitlines()[-1] == f"quantgate quantize: {word}"
    assert _ended(watch)  # one that had only been forked sees that its parent is gone, and ends by itself
    assert list(tmp_path.iterdir()) == []


def test_the_child_dies_with_a_killed_parent(tiny_variants: Path, tmp_path: Path) -> None:
    """After kill -9 of the parent the worker is gone too, and the final name is still free."""
    with _started(tiny_variants, tmp_path) as process:
        _read_until(process, "solve ...")
        child = child_of(process.pid)
        watch = os.pidfd_open(child)
        process.kill()
        process.wait(timeout=30)
    assert _ended(watch)
    assert not (tmp_path / "out").exists()


def child_of(pid: int) -> int:
    """The one child of a process, once it has one."""
    (child,) = wait_until(Path(f"/proc/{pid}/task/{pid}/children").read_text).split()
    return int(child)


def _ended(watch: int) -> bool:
    import select  # noqa: PLC0415

    try:
        return bool(select.select([watch], [], [], 30)[0])
    finally:
        os.close(watch)


def _started(tiny_variants: Path, folder: Path) -> "subprocess.Popen[str]":
    told = command(
        "quantize_main",
        tiny_variants / "tiny",
        "--scheme",
        "w8a8",
        "--data",
        tiny_variants / "chats.jsonl",
        "--out",
        folder / "out",
    )
    # A home of its own: elsewhere the same run has been made, and its stages would be reused.
    env = {**environ(), "QUANTGATE_HOME": str(folder.with_name(f"{folder.name}-home"))}
    return subprocess.Popen(told, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _read_until(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stderr is not None
    while line not in (read := process.stderr.readline()):
        assert read, "ended before that stage"


def _tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file  # noqa: PLC0415

    loaded: dict[str, Any] = load_file(directory / "model.safetensors")
    return loaded


def _copy_with(base: Path, copy: Path) -> Path:
    from safetensors.torch import save_file  # noqa: PLC0415

    shutil.copytree(base, copy)
    tensors = _tensors(base)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert (copy / "chat_template.jinja").read_text() == CHATML
    return copy
