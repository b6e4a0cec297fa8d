"""Child process of `quantize.gguf`: transformers reads the GGUF file, this writes safetensors and JSON."""

import json
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize.errors import RecipeError
from quantize.gguf_tokenizer import read_tokenizer_fields, require_ends, text_ends
from quantize.running.worker import WorkerChannel, run_child
from quantize.variants.checkpoint import write_json, write_shards

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

# Keys about how transformers loaded the file, not about the model.
_LOADING_KEYS = ("_name_or_path", "_model_name_or_path", "_from_model_config", "quantization_config")
# llama.cpp's pre-tokenizers that split numbers into digits before the byte-level pattern, which transformers omits.
_DIGIT_SPLITTERS = frozenset({"smollm"})


def unpack(job: dict[str, Any], channel: WorkerChannel) -> dict[str, Any]:
    """Write weights, config, tokenizer, chat template and generation config; a job is `{file, sha256, into}`."""
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415

    file, into = Path(job["file"]), Path(job["into"])
    channel.progress(0, 1)
    named = {"gguf_file": file.name, "local_files_only": True}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **named
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    except (OSError, ValueError, IndexError, KeyError, NotImplementedError, struct.error) as error:
        first_line = str(error).partition("\n")[0]
        raise RecipeError(f"{file}: not supported by transformers: {first_line}") from error
    tensors = {name: tensor.contiguous() for name, tensor in sorted(model.state_dict().items())}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    write_shards(iter(tensors.items()), into)
    _write_configs(model, tokenizer, into)
    _write_tokenizer(tokenizer, file, model.config, into)
    write_json(into / "source.json", {"gguf": file.name, "sha256": job["sha256"]})
    channel.progress(len(tensors), len(tensors))
    return {"tensors": len(tensors)}


def _write_configs(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", into: Path) -> None:
    config = _plain(model.config.to_diff_dict())
    write_json(into / "config.json", {**config, "architectures": [type(model).__name__]})
    generation = {"bos_token_id": config.get("bos_token_id"), "eos_token_id": tokenizer.eos_token_id}
    write_json(into / "generation_config.json", {**generation, "pad_token_id": tokenizer.pad_token_id})


def _write_tokenizer(tokenizer: "PreTrainedTokenizerFast", file: Path, config: "PretrainedConfig", into: Path) -> None:
    fields, engine = read_tokenizer_fields(file), tokenizer.backend_tokenizer
    if fields.get("pre") in _DIGIT_SPLITTERS:
        from tokenizers.pre_tokenizers import Digits, Sequence  # noqa: PLC0415

        engine.pre_tokenizer = Sequence([Digits(individual_digits=True), engine.pre_tokenizer])
    added = require_ends(tokenizer, text_ends(fields))
    engine.save(str(into / "tokenizer.json"))
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    # Engines read tokenizer.json; these keys are for tools that build a tokenizer from its vocabulary.
    ends = {key: True for key, is_added in (("add_bos_token", added.bos), ("add_eos_token", added.eos)) if is_added}
    write_json(
        into / "tokenizer_config.json",
        {
            **named,
            **ends,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position_embeddings,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    if tokenizer.chat_template:
        (into / "chat_template.jinja").write_text(tokenizer.chat_template)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Keep the JSON values of a config that describe the model."""
    model_keys = {key: value for key, value in config.items() if key not in _LOADING_KEYS and value is not None}
    return dict(json.loads(json.dumps(model_keys, default=str)))


if __name__ == "__main__":
    sys.exit(run_child(unpack))
