"""Keys and values on their way into the cache: rounded as FP8 stores them, read at once or one by one."""

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")
transformers = pytest.importorskip("transformers", reason="needs transformers: install the quantize extra")

from quantize.calibration.cache_scales_child import measure, scales_of  # noqa: E402
from quantize.dense_models import layered_base  # noqa: E402
from quantize.errors import SolveError, VariantError  # noqa: E402
from quantize.kv_cache import (  # noqa: E402
    E4M3_MAX,
    LargestRecorder,
    attention_modules,
    change_cache,
    read_texts,
    recorded,
    round_cache,
    rounded_to_e4m3,
)
from tests.quantize.families import write_family  # noqa: E402

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),
]

IDS = list(range(2, 40))
TEXT = ["one two three four five six seven eight nine ten " * 20]


class Channel:
    """Counts progress."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int]] = []

    def progress(self, done: int, total: int) -> None:
        """Note it."""
        self.done.append((done, total))


def tiny(key_scale: float = 1.0) -> Any:
    """A Llama of two layers in fp32, whose keys are so many times as large."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data *= key_scale
        layer.self_attn.q_proj.weight.data *= 8 / key_scale
    return model


def scales(keys: float, values: float) -> dict[str, tuple[Any, Any]]:
    """The same scales for both layers of the tiny model."""
    return {f"layers.{layer}.self_attn": (torch.tensor([keys]), torch.tensor([values])) for layer in range(2)}


def test_numbers_are_those_of_e4m3() -> None:
    """Three bits of mantissa; what is beyond the range becomes the largest, and what is far below the smallest 0."""
    values = torch.tensor([1.0, 1.06, 1.07, -17.5, 448.0, 1e4, -1e9, 2.0**-9, 2.0**-11]).reshape(1, 1, -1, 1)
    stored = rounded_to_e4m3(values, torch.tensor([1.0])).flatten().tolist()
    assert stored == [1.0, 1.0, 1.125, -18.0, 448.0, 448.0, -448.0, 2.0**-9, 0.0]
    assert rounded_to_e4m3(values, torch.tensor([100.0])).flatten().tolist()[5] == 9600.0
    assert float(rounded_to_e4m3(torch.zeros(1, 1, 2, 2), torch.tensor([0.5])).abs().max()) == 0


def test_each_head_can_have_its_scale() -> None:
    """As the strategy `attn_head` of compressed-tensors stores them, [heads, 1, 1]."""
    values = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    both = rounded_to_e4m3(values, torch.tensor([0.01, 3.0]).reshape(2, 1, 1))
    for head, scale in enumerate((0.01, 3.0)):
        one = rounded_to_e4m3(values[:, head : head + 1], torch.tensor([scale]))
        assert torch.equal(both[:, head : head + 1], one)


def test_reading_and_writing_on_see_the_same_cache() -> None:
    """A text that is read at once, and one token by token from the cache, have the same rounded keys and values."""
    model = tiny()
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        plain = model(ids).logits
        round_cache(model, scales(0.02, 0.003), Path("v"))
        whole = model(ids, use_cache=False).logits
        cache, steps = None, []
        for place in range(len(IDS)):
            given = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = given.past_key_values
            steps.append(given.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-4)
    assert float((whole - plain).abs().max()) > 1e-3


def test_a_scale_keeps_large_keys() -> None:
    """Keys of thousands, as biases make them, are cut at 448 without a scale, and keep three bits with one."""
    ids = torch.tensor([IDS])
    with torch.inference_mode():
        plain = tiny(1e4)(ids).logits.log_softmax(-1)
        distances = {}
        for keys in (1.0, 1e4 / E4M3_MAX):
            model = tiny(1e4)
            round_cache(model, scales(keys, 0.01), Path("v"))
            found = model(ids).logits.log_softmax(-1)
            distances[keys] = float((plain.exp() * (plain - found)).sum(-1).mean())
    assert distances[1e4 / E4M3_MAX] < distances[1.0] / 10


def test_scales_of_another_model_are_refused() -> None:
    """Their layers are not there."""
    with pytest.raises(VariantError, match=r"v: has scales of keys and values for layers\.9\.self_attn"):
        round_cache(tiny(), {"layers.9.self_attn": (torch.ones(1), torch.ones(1))}, Path("v"))


def test_a_handle_ends_the_change() -> None:
    """A model is its own again."""
    model, ids = tiny(), torch.tensor([IDS])
    with torch.inference_mode():
        before = model(ids).logits
        handles = [
            change_cache(module, lambda keys, values: (keys * 0, values * 0))
            for module in attention_modules(model).values()
        ]
        assert not torch.equal(model(ids).logits, before)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(ids).logits, before)


# One of each way to make keys: biases, norms of keys, joined matrices, sliding windows, sinks, experts, vision beside.
@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3", "gemma2", "gpt_oss", "qwen3_moe", "gemma3"])
def test_every_layer_of_a_family_is_seen(name: str, tmp_path: Path) -> None:
    """Its keys are those that the cache of transformers has, after their rotation."""
    base = write_family(tmp_path / "base", name, TEXT)
    layered = layered_base(base)
    modules = attention_modules(layered.model)
    recorders = {layer: LargestRecorder() for layer in modules}
    assert list(recorders) == [f"layers.{layer}.self_attn" for layer in range(2)]
    with torch.inference_mode(), recorded(modules, recorders), layered.reading() as model:
        assert list(read_texts(model, [IDS])) == [len(IDS)]
        cache = model(torch.tensor([IDS]), use_cache=True).past_key_values
    for layer, recorder in zip(cache.layers, recorders.values(), strict=True):
        assert recorder.largest == (float(layer.keys.abs().max()), float(layer.values.abs().max()))


def test_the_largest_value_of_all_samples_makes_the_scale(tmp_path: Path) -> None:
    """Whatever their lengths; larger values of other texts, up to twice as large, have room."""
    assert scales_of("layers.0.self_attn", (224.0, 22.4)) == pytest.approx([1.0, 0.1])
    base = write_family(tmp_path / "base", "llama", TEXT)
    layers, channel = ["layers.0.self_attn", "layers.1.self_attn"], Channel()
    samples = [IDS[:9], IDS, IDS[5:]]
    each = [measure({"base": str(base), "layers": layers, "samples": [one]}, channel)["scales"] for one in samples]  # type: ignore[arg-type]
    every = measure({"base": str(base), "layers": layers, "samples": samples}, channel)["scales"]  # type: ignore[arg-type]
    for layer in layers:
        assert every[layer] == [max(one[layer][part] for one in each) for part in range(2)]
    assert channel.done[-1] == (sum(map(len, samples)), sum(map(len, samples)))
    with pytest.raises(SolveError, match=r"layers\.7\.self_attn writes no keys"):
        measure({"base": str(base), "layers": ["layers.7.self_attn"], "samples": samples}, channel)  # type: ignore[arg-type]


@pytest.mark.parametrize("largest", [(0.0, 1.0), (1.0, float("nan")), (float("inf"), 1.0)])
def test_no_scale_comes_of_no_numbers(largest: tuple[float, float]) -> None:
    """The layer is named."""
    with pytest.raises(SolveError, match=r"layers\.0\.self_attn: its largest key is"):
        scales_of("layers.0.self_attn", largest)
