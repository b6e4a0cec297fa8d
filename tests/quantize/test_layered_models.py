"""A model that is read by layers gives what the whole model gives, and never holds two layers."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")

from quantize.errors import VariantError  # noqa: E402
from quantize.evaluation.lm_head import find_lm_head, last_hidden_states  # noqa: E402
from quantize.layered_models import LayeredModel, open_layered  # noqa: E402
from quantize.model_class import model_class  # noqa: E402
from quantize.variants.weights import LazyTensor, lazy_tensors  # noqa: E402

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(120),
    # transformers loads torchao, whose docstrings say "\\." when they are first compiled.
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    ),
    "qwen3 moe": (transformers.Qwen3MoeConfig, EXPERTS),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 256}),
}
SAMPLES = [[(7 * place + place * place) % 64 for place in range(length)] for length in (40, 9, 23)]


def tiny(family: str, folder: Path) -> Any:
    """Save a tiny random model of a family, and return it as the loader gives it."""
    config, changes = FAMILIES[family]
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config(**{**SIZES, **changes}), dtype=torch.float32)
    model.save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def architecture(folder: Path) -> tuple[Any, Any]:
    """The class and the config of a saved model."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return model_class(config), config


def loaded_layers(layered: LayeredModel) -> int:
    """Count the layers that hold any weight."""
    return sum(any(not value.is_meta for value in layer.parameters()) for layer in layered.layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_whole_models(family: str, tmp_path: Path) -> None:
    """Read by layers and in one padded batch, each sample has the states of a plain forward pass."""
    whole = tiny(family, tmp_path)
    layered = open_layered(architecture(tmp_path), lazy_tensors(tmp_path), tmp_path, torch.float32, "cpu")
    most: list[int] = []
    for layer in layered.layers:
        layer.register_forward_hook(lambda *_: most.append(loaded_layers(layered)))
    with torch.inference_mode():
        with layered.without_layers() as model:
            head = find_lm_head(model, SAMPLES[0])
        assert head.weight is not None
        with layered.reading() as model:
            states = list(last_hidden_states(model, head, SAMPLES))
        for ids, found in zip(SAMPLES, states, strict=True):
            expected = whole.base_model(torch.tensor([ids[:-1]])).last_hidden_state[0]
            assert torch.allclose(found, expected, atol=1e-5)
    assert most == [1] * 3
    assert loaded_layers(layered) == 0


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """Of a layer when it is read, of the rest at once."""
    tiny("qwen2", tmp_path)
    tensors = lazy_tensors(tmp_path)
    inner = {name: value for name, value in tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}
    layered = open_layered(architecture(tmp_path), inner, tmp_path, torch.float32, "cpu")
    with (
        pytest.raises(VariantError, match=r"layer 1 has no tensor for mlp\.up_proj\.weight"),
        layered.reading() as model,
    ):
        model(torch.tensor([SAMPLES[0]]))
    outer = {name: value for name, value in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(VariantError, match=r"has no tensor for model\.norm\.weight"):
        open_layered(architecture(tmp_path), outer, tmp_path, torch.float32, "cpu")


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    """With both shapes."""
    tiny("qwen2", tmp_path)
    tensors = lazy_tensors(tmp_path) | {"model.layers.0.mlp.up_proj.weight": LazyTensor(lambda: torch.zeros(2, 2))}
    layered = open_layered(architecture(tmp_path), tensors, tmp_path, torch.float32, "cpu")
    with pytest.raises(VariantError, match=r"up_proj"), layered.reading() as model:
        model(torch.tensor([SAMPLES[0]]))
