"""Forms in which tools leave a model on disk, as changes to a directory that is in order; no torch."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.quantize.models import safetensors_of

Shapes = dict[str, tuple[int, ...]]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
ADAPTER: Shapes = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (16, 64),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (64, 16),
}
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@dataclass(frozen=True, slots=True)
class Form:
    """A form by its name in the documentation, and how a directory gets it."""

    name: str
    change: Callable[[Path], None]


def llama_shapes() -> Shapes:
    """The tensors of CONFIG."""
    shapes: Shapes = {"model.embed_tokens.weight": (32, 64), "model.norm.weight": (64,), "lm_head.weight": (32, 64)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        for part, rows in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (rows, 64)
        shapes[f"{block}.mlp.gate_proj.weight"] = shapes[f"{block}.mlp.up_proj.weight"] = (128, 64)
        shapes[f"{block}.mlp.down_proj.weight"] = (64, 128)
        shapes[f"{block}.input_layernorm.weight"] = shapes[f"{block}.post_attention_layernorm.weight"] = (64,)
    return shapes


def write_llama(directory: Path) -> Path:
    """Write a Llama of two layers with zero weights, in order."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    write_weights(directory, llama_shapes())
    return directory


def write_weights(directory: Path, shapes: Shapes, name: str = "model.safetensors") -> None:
    """Write zero tensors."""
    (directory / name).write_bytes(safetensors_of(shapes))


def configured(**changes: Any) -> Callable[[Path], None]:
    """Change keys of config.json; None is null."""

    def change(directory: Path) -> None:
        (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))

    return change


def with_tensors(extra: Shapes | None = None, *, without: Iterable[str] = ()) -> Callable[[Path], None]:
    """Add tensors to the weights, and leave some out."""

    def change(directory: Path) -> None:
        shapes = {name: shape for name, shape in llama_shapes().items() if name not in set(without)}
        write_weights(directory, {**shapes, **(extra or {})})

    return change


def with_file(name: str, content: str = "x") -> Callable[[Path], None]:
    """Add a file."""

    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)

    return change


def without(*names: str) -> Callable[[Path], None]:
    """Remove files."""

    def change(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return change


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    """Make several changes in order."""

    def change(directory: Path) -> None:
        for step in changes:
            step(directory)

    return change


def sharded(directory: Path) -> None:
    """Split the weights into two files with an index."""
    shapes = llama_shapes()
    names = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    parts = [dict(list(shapes.items())[number::2]) for number in (0, 1)]
    for name, part in zip(names, parts, strict=True):
        write_weights(directory, part, name)
    index = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "model.safetensors").unlink()


def truncated(directory: Path) -> None:
    """Cut the second shard."""
    path = directory / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4096])


def with_adapter(directory: Path) -> None:
    """Put a LoRA adapter into the directory."""
    write_weights(directory, ADAPTER, "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/QwQ-32B"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def with_consolidated(directory: Path) -> None:
    """Put Mistral's own format of the weights beside them."""
    write_weights(directory, {"layers.0.attention.wq.weight": (64, 64)}, "consolidated.safetensors")
    (directory / "params.json").write_text("{}")


def packed(directory: Path) -> None:
    """Store one matrix as packed 4-bit words."""
    header = json.dumps({UP_PROJ: {"dtype": "I32", "shape": [16, 64], "data_offsets": [0, 4096]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4096))


def renamed_weights(directory: Path) -> None:
    """Give the weights a name that transformers doesn't look for."""
    (directory / "model.safetensors").rename(directory / "weights.safetensors")


def with_byte_order_mark(directory: Path) -> None:
    """Write config.json as some editors do."""
    path = directory / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


_WEIGHTS = "model.safetensors"
_SHARD = "model-00002-of-00002.safetensors"
_BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}

# Seen in names, headers and config.json, without torch; these are also refused by --plan.
FORMS = (
    Form("one file", lambda _: None),
    Form("shards and an index", sharded),
    Form("shards, no index", both(sharded, without("model.safetensors.index.json"))),
    Form("a shard missing", both(sharded, without(_SHARD))),
    Form("a shard truncated", both(sharded, truncated)),
    Form("one file beside an index of others", both(sharded, with_tensors())),
    Form("`.bin` weights only", both(without(_WEIGHTS), with_file("pytorch_model.bin"))),
    Form("`.bin` beside safetensors", with_file("pytorch_model.bin")),
    Form("GGUF only", both(without(_WEIGHTS, "config.json"), with_file("model.gguf"))),
    Form("`consolidated.safetensors` only", both(without(_WEIGHTS), with_consolidated)),
    Form("`consolidated.safetensors` beside the weights", with_consolidated),
    Form("LoRA adapter", both(without(_WEIGHTS, "config.json"), with_adapter)),
    Form("LoRA adapter with config.json", both(without(_WEIGHTS), with_adapter)),
    Form("adapter beside merged weights", with_adapter),
    Form("other names of the weights", renamed_weights),
    Form("Hugging Face cache entry", both(without(_WEIGHTS, "config.json"), with_file("snapshots/x"))),
    Form("`quantization_config: null`", configured(quantization_config=None)),
    Form("`quantization_config` left by a QLoRA merge", configured(quantization_config=_BNB)),
    Form("quantized", both(configured(quantization_config={"quant_method": "awq"}), packed)),
    Form("quantized, not said in config.json", packed),
    Form("config.json with a byte order mark", with_byte_order_mark),
    Form("`torch_dtype` (transformers 4)", configured(dtype=None, torch_dtype="bfloat16")),
    Form("no dtype", configured(dtype=None)),
    Form("multimodal", configured(vision_config={"hidden_size": 64})),
    Form("paths of the training machine", configured(_name_or_path="/home/me/QwQ-32B")),
    Form("files of a trainer", both(with_file("trainer_state.json", "{}"), with_file("optimizer.pt"))),
)
_RENAMED: Shapes = {f"_orig_mod.{UP_PROJ}": (128, 64)}
# Seen by building the model on the meta device.
LOADED_FORMS = (
    Form("in order", lambda _: None),
    Form("a matrix missing", with_tensors(without=[UP_PROJ])),
    Form("a norm missing", with_tensors(without=["model.layers.1.input_layernorm.weight"])),
    Form("`lm_head` missing, embeddings not tied", with_tensors(without=["lm_head.weight"])),
    Form(
        "`lm_head` missing, embeddings tied",
        both(configured(tie_word_embeddings=True), with_tensors(without=["lm_head.weight"])),
    ),
    Form("own `lm_head`, embeddings tied", configured(tie_word_embeddings=True)),
    Form("tensors with a prefix", with_tensors(_RENAMED, without=[UP_PROJ])),
    Form("tensors that the model doesn't know", with_tensors({"model.layers.2.eh_proj.weight": (64, 128)})),
    Form("config.json of fewer layers", configured(num_hidden_layers=1)),
    Form("config.json of another size", configured(intermediate_size=256)),
    Form("embeddings resized, `vocab_size` not", with_tensors({"model.embed_tokens.weight": (40, 64)})),
    Form("unknown model type", configured(model_type="brandnew")),
    Form(
        "own code for an unknown model type",
        configured(model_type="brandnew", auto_map={"AutoConfig": "configuration_x.XConfig"}),
    ),
    Form(
        "own code for a known model type",
        both(configured(auto_map={"AutoConfig": "configuration_x.XConfig"}), with_file("configuration_x.py")),
    ),
    Form("not a language model", configured(model_type="t5")),
    Form("invalid config.json", configured(num_attention_heads="four")),
)
