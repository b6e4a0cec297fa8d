"""Missing, unknown and misshapen tensors are found from headers, as transformers finds them while loading."""

import os
from io import StringIO
from pathlib import Path

import pytest

from quantize.base import read_base
from quantize.errors import RecipeError
from quantize.load_report import LoadReport, ShapeMismatch, check_base
from quantize.running.progress import ProgressReporter
from quantize.running.worker import child_environ
from tests.quantize.model_files.forms import FORMS, LOADED_FORMS, Form, write_llama
from tests.quantize.model_files.test_directory_forms import documented

UP = "model.layers.{}.mlp.up_proj.weight"


def outcome_of(directory: Path) -> str:
    """What happens to a directory whose model is built on the meta device, as the page says it."""
    from quantize.load_report_child import read_load_report  # noqa: PLC0415

    try:
        report = read_load_report(directory)
    except RecipeError as error:
        return f"refused: `{without_version(str(error).replace(f'{directory}/', '').replace(f'{directory}: ', ''))}`"
    problem, note = report.problem(), report.note()
    if problem:
        return f"refused: `{problem}`"
    return f"used; `{note}`" if note else "used"


def without_version(message: str) -> str:
    """Leave out the version of transformers."""
    import transformers  # noqa: PLC0415

    return message.replace(f"transformers {transformers.__version__}", "transformers")


@pytest.mark.real_model
@pytest.mark.parametrize("form", LOADED_FORMS, ids=lambda form: form.name)
def test_a_form_is_used_or_refused_as_documented(form: Form, tmp_path: Path) -> None:
    """The page's words are the product's."""
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    form.change(write_llama(tmp_path / "model"))
    assert outcome_of(tmp_path / "model") == documented()[form.name]


@pytest.mark.real_model
def test_a_base_is_checked_in_a_child_process(tmp_path: Path) -> None:
    """What is not used is logged; what is missing is an error that names the directory."""
    pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs torch: install the quantize extra")
    changes = {form.name: form.change for form in (*FORMS, *LOADED_FORMS)}
    base, log = write_llama(tmp_path / "model"), StringIO()
    changes["tensors that the model doesn't know"](base)
    changes["adapter beside merged weights"](base)
    check_base(read_base(base), child_environ(os.environ), ProgressReporter(log))
    assert "base: not used: adapter_model.safetensors\n" in log.getvalue()
    assert "base: 1 tensor unknown to LlamaForCausalLM, not quantized: model.layers.2.eh_proj" in log.getvalue()
    changes["a norm missing"](base)
    with pytest.raises(
        RecipeError, match=r"model: 1 tensor missing .*: model\.layers\.1\.input_layernorm\.weight; save"
    ):
        check_base(read_base(base), child_environ(os.environ), ProgressReporter(log))


def test_what_many_layers_miss_is_said_once() -> None:
    """Names that differ by their layer only are counted."""
    missing = tuple(UP.format(layer) for layer in range(64))
    problem = LoadReport("Qwen2ForCausalLM", 64, missing=missing).problem()
    assert problem is not None
    assert (
        "64 tensors missing that Qwen2ForCausalLM needs: model.layers.0.mlp.up_proj.weight (in 64 layers);" in problem
    )


def test_a_load_without_complaints_is_no_problem() -> None:
    """No line is printed for a base that is in order."""
    report = LoadReport("Qwen2ForCausalLM", 2)
    assert (report.problem(), report.note()) == (None, None)


@pytest.mark.parametrize(
    "unexpected,is_problem",
    [
        (("model.layers.1.self_attn.rotary_emb.inv_freq",), False),
        (("mtp.layers.0.mlp.up_proj.weight", "mtp.fc.weight"), False),
        ((UP.format(2),), True),
        ((UP.format(2), "model.layers.2.eh_proj.weight"), False),  # DeepSeek's MTP block
    ],
)
def test_blocks_beyond_the_config_are_a_problem(unexpected: tuple[str, ...], is_problem: bool) -> None:
    """A config.json of fewer layers would be quantized without the others; MTP blocks are no such layers."""
    report = LoadReport("Qwen2ForCausalLM", 2, unexpected=unexpected)
    assert (report.problem() is not None) == is_problem
    assert report.note() is not None


def test_a_shape_of_another_config_is_named() -> None:
    """Both shapes are told."""
    problem = LoadReport("L", 2, mismatched=(ShapeMismatch("a.weight", (40, 64), (32, 64)),)).problem()
    assert problem == "a.weight has shape 40x64, and config.json implies 32x64; use the config.json of these weights"
