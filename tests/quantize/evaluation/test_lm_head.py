"""From last states to logits: the known families by their matrix, all others by their own logits."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")

from quantize.dense_models import fake_quantize_tokens, placement  # noqa: E402
from quantize.errors import MachineError  # noqa: E402
from quantize.evaluation.lm_head import WHOLE, describe_lm_head, find_lm_head, last_hidden_states, load_lm_head  # noqa: E402

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(120),
    # transformers loads torchao, whose docstrings say "\\." when they are first compiled.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}
IDS = [(7 * place + place * place) % 300 for place in range(700)]
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma2": (transformers.Gemma2Config, {"final_logit_softcapping": 0.5}),
    "granite": (transformers.GraniteConfig, {"logits_scaling": 8.0}),
    "cohere": (transformers.CohereConfig, {"logit_scale": 0.25}),
}


def tiny(family: str) -> Any:
    """A tiny random model of a family."""
    config, changes = FAMILIES[family]
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or family != "cohere"}
    torch.manual_seed(3)
    return transformers.AutoModelForCausalLM.from_config(config(**{**sizes, **changes}), dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_states_make_the_models_own_logits(family: str, tmp_path: Path) -> None:
    """Read in two stretches and through the matrix in the base's files, logits are those of one plain forward."""
    model = tiny(family)
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        found = find_lm_head(model, IDS)
        told = describe_lm_head(found, tmp_path)
        assert told is not None
        states = torch.cat(list(last_hidden_states(model, found, [IDS])))
        logits = load_lm_head(told, tmp_path, model).logits(states, 0, 300)
        assert states.shape == (len(IDS) - 1, 32)
        assert torch.allclose(logits, model(torch.tensor([IDS[:-1]])).logits[0], atol=1e-4)


def test_a_head_that_does_more_is_read_by_its_logits() -> None:
    """Where a model's logits aren't what its matrix makes of its states, they themselves are the states."""
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.sin())
    with torch.inference_mode():
        found = find_lm_head(model, IDS)
        states = torch.cat(list(last_hidden_states(model, found, [IDS])))
        assert found == WHOLE
        assert torch.allclose(states, model(torch.tensor([IDS[:-1]])).logits[0], atol=1e-4)


def test_a_matrix_that_the_files_dont_hold_isnt_described(tmp_path: Path) -> None:
    """A base whose files hold another matrix can't be read back from them."""
    tiny("llama").save_pretrained(tmp_path)
    model = tiny("qwen2")
    with torch.inference_mode():
        assert describe_lm_head(find_lm_head(model, IDS), tmp_path) is None


def test_tokens_are_rounded_one_by_one() -> None:
    """Each token has its own scale, and its largest value survives."""
    activations = torch.tensor([[127.0, 1.4, -0.6], [1.27, 0.014, -0.006], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[127.0, 1.0, -1.0], [1.27, 0.01, -0.01], [0.0, 0.0, 0.0]])
    assert torch.allclose(fake_quantize_tokens(activations), expected)


@pytest.mark.parametrize(
    "model_bytes,free,expected",
    [
        (65, (), "cpu"),
        (65, (80,), "cuda:0"),
        (65, (40, 40), "auto"),
        (67, (40, 40), "auto"),
        (65, (80, 80), "cuda:0"),
    ],
)
def test_a_model_runs_where_it_fits(model_bytes: int, free: tuple[int, ...], expected: str) -> None:
    """One GPU if it has room for weights and what comes with them, else all of them, else the CPU."""
    assert placement(model_bytes, free) == expected


@pytest.mark.parametrize("free", [(70,), (38, 38)])
def test_a_model_that_fits_no_gpus_is_refused(free: tuple[int, ...]) -> None:
    """With how many would do: on the CPU beside them it would take hours."""
    with pytest.raises(MachineError, match=r"needs the whole model.*; \d GPUs like the largest here would do"):
        placement(65, free)
