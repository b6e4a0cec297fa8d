"""The child that solves with AutoGPTQ 0.7.1; its only imports are those of the isolated environment.

Our side starts it like every worker, `python -m quantize.backends.autogptq_child JOB PIPE PARENT`; its first step is to
become the isolated interpreter. From then on nothing of ours is importable, so the protocol is written out here.
"""

import ctypes
import json
import logging
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_WORD_BITS = 32
_FAILED = 1
_USAGE = 2
_ROOM = 0.9  # of a GPU, where the recipe doesn't say how much

Job = dict[str, Any]


class Refused(Exception):
    """What our side raises as its own error of this kind."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(problem)
        self.kind = kind


class RunRecord:
    """What is known of the run: names of the modules, losses as the library tells them, packed tensors."""

    def __init__(self, job: Job, stream: Any) -> None:
        self.job, self.stream = job, stream
        self.names: dict[int, str] = {}
        self.packed: dict[str, Any] = {}
        self.losses = LossLog()

    def send(self, line: Job) -> None:
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()


class LossLog(logging.Handler):
    """Catches a module's loss, which AutoGPTQ writes to its log only."""

    loss = math.nan

    def emit(self, record: logging.LogRecord) -> None:
        name, _, number = record.getMessage().partition("avg loss: ")
        if number and not name:
            self.loss = float(number)


def main() -> int:
    if not sys.flags.isolated:
        python = json.loads(Path(sys.argv[1]).read_bytes())["python"]
        os.execv(python, [python, "-I", str(Path(__file__).resolve()), *sys.argv[1:]])  # noqa: S606
    job_file, descriptor, parent = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    die_with(parent)
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w") as stream:
        run = RunRecord(json.loads(Path(job_file).read_bytes()), stream)
        try:
            run.send({"result": {"seconds": quantize(run)}})
        except Refused as error:
            run.send({"error": {"kind": error.kind, "problems": [str(error)]}})
            return _USAGE if error.kind == "RecipeError" else _FAILED
    return 0


def die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def quantize(run: RunRecord) -> float:
    """Solve and pack every module; the raw directory then holds `model.safetensors`."""
    from auto_gptq.modeling import _base  # type: ignore[import-not-found]  # noqa: PLC0415
    from safetensors.torch import save_file  # noqa: PLC0415

    started = time.monotonic()
    model = load(run.job)
    layers = model.model.config.num_hidden_layers
    run.names = {id(module): name for name, module in model.model.named_modules()}
    solver = logging.getLogger("auto_gptq.quantization.gptq")
    solver.setLevel(logging.INFO)
    solver.addHandler(run.losses)
    _base.GPTQ = recording(_base.GPTQ, run, layers)
    # The watched solver has packed already. The library's own loop over every input takes as long as a sixth of the
    # solving, and in bf16 it divides by rounded scales, which gives other integers at 8 bits.
    _base.pack_model = lambda **_: None
    tokenized = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in run.job["samples"]]
    model.quantize(tokenized, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
    run.send({"progress": [layers, layers]})
    raw = Path(run.job["raw"])
    raw.mkdir()
    save_file(run.packed, str(raw / "model.safetensors"), metadata={"format": "pt"})
    return round(time.monotonic() - started, 1)


def load(job: Job) -> Any:
    """Load the base in bf16 (its default, fp16, overflows on models that were trained in bf16)."""
    import torch  # noqa: PLC0415
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # type: ignore[import-not-found]  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise Refused(
            "RecipeError", "auto-gptq needs CUDA, and its torch finds no usable GPU here; use --backend gptqmodel"
        )
    config = BaseQuantizeConfig(
        bits=job["bits"],
        group_size=job["group_size"],
        damp_percent=job["damping"][0],
        desc_act=False,
        static_groups=False,
        sym=True,
        true_sequential=job["true_sequential"],
    )
    memory = max_memory(job)
    try:
        return AutoGPTQForCausalLM.from_pretrained(job["base"], config, max_memory=memory, torch_dtype=torch.bfloat16)
    except TypeError as error:
        if "isn't supported yet" not in str(error):
            raise
        raise Refused("RecipeError", f"auto-gptq 0.7.1: {error} use --backend gptqmodel") from error


def max_memory(job: Job) -> Any:
    """Share the weights between the chosen GPUs and main memory; without a choice they wait in main memory."""
    import torch  # noqa: PLC0415

    if not job["gpus"]:
        return None
    shares = {}
    for gpu in range(job["gpus"]):
        whole = torch.cuda.get_device_properties(gpu).total_memory
        shares[gpu] = min(job["memory_bytes"] or int(whole * _ROOM), whole)
    return {**shares, "cpu": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")}


def recording(solver: Any, run: RunRecord, layers: int) -> Any:
    """Derive from AutoGPTQ's solver one that names what is wrong, climbs the damping ladder, and packs."""
    import torch  # noqa: PLC0415

    class RecordingGptq(solver):  # type: ignore[misc]
        H: Any

        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            self.name = run.names[id(layer)]
            self.peaks: list[Any] = []
            self.tokens = 0

        def add_batch(self, inp: Any, out: Any) -> None:
            self.peaks.append(inp.abs().amax())
            self.tokens += inp.numel() // inp.shape[-1]
            super().add_batch(inp, out)

        def fasterquant(self, *places: Any, **options: Any) -> Any:
            require_finite(self.name, self.peaks, run.job["where"])
            hessian: Any = self.H
            diagonal = hessian.diagonal().clone()
            for damp in run.job["damping"]:
                self.H = hessian
                hessian.diagonal().copy_(diagonal)
                try:
                    found = super().fasterquant(*places, **{**options, "percdamp": damp})
                except torch.linalg.LinAlgError:
                    continue
                loss = loss_a_token(run.losses.loss, self.nsamples, self.tokens)
                record(run, self.name, loss, damp, layers)
                run.packed.update(packed(self.name, self.layer.weight.data, found, run.job["bits"]))
                return found
            raise Refused("SolveError", f"{self.name}: its Hessian doesn't factor with any damping of {dampings(run)}")

    return RecordingGptq


def require_finite(module: str, peaks: list[Any], where: list[str]) -> None:
    """Name the first sample that brought a module something that is no number."""
    for sample, peak in enumerate(peaks):
        if not math.isfinite(float(peak)):
            raise Refused(
                "SolveError",
                f"{where[sample]}: gives {module} an input that is no finite number (largest: {float(peak)}); "
                "remove the sample",
            )


def loss_a_token(loss: float, samples: int, tokens: int) -> float:
    """Convert AutoGPTQ's loss, an average over samples twice, to GPTQModel's, an average over tokens twice."""
    return loss * (samples / tokens) ** 2


def record(run: RunRecord, module: str, loss: float, damp: float, layers: int) -> None:
    if not math.isfinite(loss):
        raise Refused("SolveError", f"{module}: its loss is no number ({loss}); is a weight of the base none, either?")
    layer = next(int(part) for part in module.split(".") if part.isdigit())
    run.send({"progress": [layer, layers]})
    run.send({"event": {"module": module, "layer": layer, "loss": loss, "damp": damp}})


def dampings(run: RunRecord) -> str:
    return ", ".join(f"{damp:g}" for damp in run.job["damping"]) + "; add samples, or try a larger --damp"


def packed(module: str, weight: Any, found: tuple[Any, Any, Any], bits: int) -> dict[str, Any]:
    """Pack one module as AutoGPTQ's format says.

    `weight` [N, K] holds what the integers stand for; scale and zero are [N, G], g_idx is [K].
    """
    import torch  # noqa: PLC0415

    scale, zero, g_idx = found
    groups = g_idx.long()
    integers = torch.round(weight.float() / scale[:, groups] + zero[:, groups]).to(torch.int32)
    tensors = {
        "qweight": words(integers.t(), bits),
        "qzeros": words(zero.to(torch.int32) - 1, bits).t(),
        "scales": scale.t().to(torch.float16),
        "g_idx": g_idx.to(torch.int32),
    }
    return {f"{module}.{part}": tensor.contiguous().cpu() for part, tensor in tensors.items()}


def words(values: Any, bits: int) -> Any:
    """[R, C] values -> [R*bits/32, C] int32 words of consecutive rows, lowest bits first."""
    import torch  # noqa: PLC0415

    apart = values.reshape(-1, _WORD_BITS // bits, values.shape[1])
    joined = torch.zeros_like(apart[:, 0])
    for place in range(apart.shape[1]):
        joined |= apart[:, place] << (bits * place)
    return joined


if __name__ == "__main__":
    sys.exit(main())
