"""A whole evaluation of a tiny model: exact figures, the parent's words reused, texts and answers compared."""

import json
import os
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from config.measurements import Measurements
from config.quality import Quality
from quantize.errors import CalibrationError, VariantError
from quantize.evaluation.evaluate import EvaluationPlan, evaluate
from quantize.evaluation.spans import flags
from quantize.running.context import RunContext
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from tests.quantize.chats import chat, write_lines

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")
pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")

from tests.quantize.variants.test_weights import pack_rows  # noqa: E402

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(300),
    # transformers loads torchao, whose docstrings say "\\." when they are first compiled.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

PLAN = EvaluationPlan(prompts=3, seeds=2, new_tokens=12)


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base and a variant of it that is rounded to nearest in 4 bits."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "base").symlink_to(tiny_base / "tiny")
    write_rounded(folder / "base", folder / "variant", bits=4, group_size=64)
    return folder


def write_rounded(base: Path, out: Path, *, bits: int, group_size: int) -> None:
    """Write a GPTQ directory whose layers are the base's, rounded to nearest."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    half = 2 ** (bits - 1)
    for name in [name for name in tensors if ".layers." in name and tensors[name].ndim == 2]:
        weight, layer = tensors.pop(name).float(), name.removesuffix(".weight")
        groups = weight.view(weight.shape[0], -1, group_size)
        scales = (groups.abs().amax(-1) / (half - 0.5)).half()
        rounded = (groups / scales.float().unsqueeze(-1)).round().clamp(-half, half - 1).view_as(weight)
        zeros = torch.full((groups.shape[1], weight.shape[0]), half - 1)
        tensors[f"{layer}.qweight"] = pack_rows(rounded.t() + half, bits)
        tensors[f"{layer}.qzeros"] = pack_rows(zeros.t(), bits).t().contiguous()
        tensors[f"{layer}.scales"] = scales.t().contiguous()
        tensors[f"{layer}.g_idx"] = torch.arange(weight.shape[1], dtype=torch.int32) // group_size
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_bytes())
    told = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True, "desc_act": False}
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": told}))


def samples(base: Path) -> list[dict[str, Any]]:
    """Chats as token samples with their ranges of reasoning and answer; the last ones longer than a forward pass."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    made = []
    for number in range(6):
        text = tokenizer.apply_chat_template(chat(number)["messages"], tokenize=False)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        first = sum(start < text.index("<think>") for start in starts)
        last = sum(start < text.index("</think>") + len("</think>") for start in starts)
        sample = {"ids": ids, "sha256": f"{number:064x}", "reasoning": [[first, last]], "answer": [last, len(ids)]}
        made.append(sample)
    return [*made, {**made[0], "ids": (made[0]["ids"] * 20)[:600], "sha256": "f" * 64}]


def measured(
    folder: Path, work: Path, variant: str = "variant", plan: EvaluationPlan = PLAN, **options: Any
) -> Quality:
    """Evaluate in a work folder, with a home directory beside the models."""
    work.mkdir(exist_ok=True)
    environ = child_environ({**os.environ, "QUANTGATE_HOME": str(folder / "home")})
    context = RunContext(work, environ, ProgressReporter(StringIO()))
    return evaluate(
        folder / variant,
        folder / "base",
        samples(folder / "base"),
        4,
        context,
        plan=plan,
        evidence=work / "evaluation.json",
        **options,
    )


def exact(folder: Path) -> dict[str, Any]:
    """KL, agreement and perplexity ratio by plain transformers and whole softmaxes in fp64, and of reasoning alone."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from quantize.variants.weights import read_dense  # noqa: PLC0415

    parent = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    dense, _ = read_dense(folder / "variant")
    config = LlamaConfig.from_pretrained(folder / "base")
    child = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dense, dtype=torch.float32)
    divergence, likelihood, agreed, thinking, generated = [], [], [], [], []
    with torch.inference_mode():
        for sample in samples(folder / "base"):
            tokens = torch.tensor([sample["ids"]])
            ours, theirs = (model(tokens).logits[0, :-1].double().log_softmax(-1) for model in (parent, child))
            divergence.append((ours.exp() * (ours - theirs)).sum(-1))
            likelihood.append((ours - theirs).gather(-1, tokens[0, 1:, None])[:, 0])
            agreed.append((ours.argmax(-1) == theirs.argmax(-1)).double())
            thinking.append(torch.tensor(flags(sample["reasoning"], len(sample["ids"]))))
            generated.append(torch.tensor(flags([*sample["reasoning"], sample["answer"]], len(sample["ids"]))))
    every, inside, counts = torch.cat(divergence), torch.cat(thinking), torch.cat(generated)
    return {
        "tokens": int(counts.sum()),
        "kl_mean": float(every[counts].mean()),
        "top1_agreement": float(torch.cat(agreed)[counts].mean()),
        "perplexity_ratio": float(torch.cat(likelihood)[counts].mean().exp()),
        "prompt_kl": float(every[~counts].mean()),
        "reasoning_kl": float(every[inside].mean()),
    }


def test_figures_are_exact(folder: Path, tmp_path: Path) -> None:
    """The parent's states and the sliced vocabulary give what whole logits of both models give."""
    quality, wanted = measured(folder, tmp_path / "work"), exact(folder)
    assert quality.tokens == wanted["tokens"]
    assert quality.kl_mean == pytest.approx(wanted["kl_mean"], rel=1e-3)
    assert quality.top1_agreement == pytest.approx(wanted["top1_agreement"], abs=2 / wanted["tokens"])
    assert quality.perplexity_ratio == pytest.approx(wanted["perplexity_ratio"], rel=1e-5)
    assert quality.reasoning is not None
    assert quality.reasoning.kl_mean == pytest.approx(wanted["reasoning_kl"], rel=1e-3)
    assert quality.answer is not None
    assert quality.reasoning.tokens + quality.answer.tokens == quality.tokens
    assert quality.prompt is not None
    assert quality.prompt.kl_mean == pytest.approx(wanted["prompt_kl"], rel=1e-3)
    assert (quality.chats, quality.longest_position) == (7, 599)
    assert quality.kl_floor == pytest.approx(0, abs=1e-9)
    interval = quality.intervals["kl_mean"]
    assert interval.low is not None
    assert interval.high is not None
    assert interval.low < quality.kl_mean < interval.high


def test_the_parents_words_are_used_again(folder: Path, tmp_path: Path) -> None:
    """A second evaluation finds them under the base's digest and gives the same bytes; damage costs only time."""
    first = measured(folder, tmp_path / "first", base_digest="d1")
    entries = sorted((folder / "home" / "stages").iterdir())
    assert [path.name.rpartition("-")[0] for path in entries] == ["parent-states", "parent-texts"]
    stamps = [(path / "stage.json").stat().st_mtime_ns for path in entries]
    assert measured(folder, tmp_path / "second", base_digest="d1") == first
    assert [(path / "stage.json").stat().st_mtime_ns for path in entries] == stamps
    (entries[0] / "states.bin").write_bytes(b"damaged")
    assert measured(folder, tmp_path / "third", base_digest="d1") == first
    told = [(tmp_path / name / "evaluation.json").read_bytes() for name in ("first", "second", "third")]
    assert told[0] == told[1] == told[2]
    assert (entries[1] / "stage.json").stat().st_mtime_ns == stamps[1]


def test_generations_are_paired(folder: Path, tmp_path: Path) -> None:
    """Figures of all texts are in the quality, the first pairs and the worst tokens in the evidence."""
    quality = measured(folder, tmp_path)
    told = json.loads((tmp_path / "evaluation.json").read_bytes())
    assert quality.generation is not None
    assert (quality.generation.prompts, quality.generation.seeds, quality.generation.new_tokens) == (3, 2, 12)
    assert quality.length_ratio == quality.generation.length_ratio
    assert len(told["generations"]) == 6
    assert len({(pair["prompt"], pair["seed"]) for pair in told["generations"]}) == 6
    assert len({pair["parent"] for pair in told["generations"]}) == 6
    assert all(pair["prompt"].endswith("<|im_start|>assistant\n") for pair in told["generations"])
    assert all(pair["parent_tokens"] <= 12 for pair in told["generations"])
    assert sum(told["kl_histogram"]["counts"]) == told["tokens"] > quality.tokens
    assert Measurements.model_validate(told["measurements"]).chats[-1].positions == 599
    assert len(told["worst"]) == 7
    assert {"where", "kl_mean", "text", "next", "parent", "variant"} <= told["worst"][0].keys()
    assert told["worst"][0]["kl_mean"] >= told["worst"][-1]["kl_mean"]


def test_a_model_is_no_distance_from_itself(folder: Path, tmp_path: Path) -> None:
    """Dense weights in 16-bit numbers of the base's own values: equal texts, no divergence, ratio 1."""
    shutil.copytree(folder / "base", folder / "same", dirs_exist_ok=True)
    config = json.loads((folder / "base" / "config.json").read_bytes())
    told = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
    (folder / "same" / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    quality = measured(folder, tmp_path, "same")
    assert quality.kl_mean == pytest.approx(0, abs=1e-6)
    assert (quality.top1_agreement, quality.length_ratio, quality.verdict) == (1.0, 1.0, "not shown")
    verdicts = {check.name: check.verdict for check in quality.checks}
    assert [verdicts[name] for name in ("kl_mean", "top1_agreement", "perplexity_ratio")] == ["pass"] * 3
    assert verdicts["length_ratio"] == "not shown"  # three prompts, whose completions were cut


def test_questions_are_put_to_both(folder: Path, tmp_path: Path) -> None:
    """Accuracy, recovery and flips come with the digest of the questions; no prompts, no generations."""
    lines = [json.dumps({"question": f"What is {n} plus {n}?", "answer": 2 * n}) for n in range(3)]
    tasks = write_lines(tmp_path / "questions.jsonl", lines)
    quality = measured(folder, tmp_path, plan=EvaluationPlan(prompts=0, tasks=tasks, task_tokens=8))
    assert (quality.generation, quality.length_ratio) == (None, None)
    assert quality.tasks is not None
    assert (quality.tasks.items, quality.tasks.flips) == (
        3,
        abs(quality.tasks.accuracy - quality.tasks.parent_accuracy),
    )


def test_a_variant_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    """Weights of another shape are one line, not a trace."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.copytree(folder / "variant", folder / "other", dirs_exist_ok=True)
    tensors = load_file(folder / "other" / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(64)
    save_file(tensors, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VariantError, match="other: doesn't fit"):
        measured(folder, tmp_path, "other")


def test_weights_that_are_no_numbers_are_blamed_on_their_model(folder: Path, tmp_path: Path) -> None:
    """A NaN in the variant is the variant's."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    shutil.copytree(folder / "variant", folder / "nan", dirs_exist_ok=True)
    tensors = load_file(folder / "nan" / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = float("nan")
    save_file(tensors, folder / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VariantError, match="nan: gives logits that are no numbers; quantize it anew"):
        measured(folder, tmp_path, "nan")


def test_nothing_to_read_is_an_error(folder: Path, tmp_path: Path) -> None:
    """Samples of one token predict nothing."""
    context = RunContext(
        tmp_path, child_environ({**os.environ, "QUANTGATE_HOME": str(tmp_path)}), ProgressReporter(StringIO())
    )
    with pytest.raises(CalibrationError, match="two tokens or more"):
        evaluate(folder / "variant", folder / "base", [{"ids": [1], "sha256": "0" * 64}], 4, context)
