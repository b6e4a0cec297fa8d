"""What a variant takes over byte for byte."""

import json
from pathlib import Path

import pytest

from quantize.model_files.directory_rules import portable_config
from quantize.model_files.kept_files import kept_files
from tests.quantize.model_files.forms import write_llama


def kept(directory: Path) -> list[str]:
    """The kept files by name, without the tokenizer that every fixture has."""
    return [path.name for path in kept_files(directory) if path.name != "tokenizer.json"]


@pytest.mark.parametrize(
    "name",
    [
        "tekken.json",  # Mistral
        "tokenizer.model.v7",
        "qwen.tiktoken",
        "tiktoken.model",  # Kimi
        "vocab.txt",
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "chat_template.json",
    ],
)
def test_tokenizers_and_processors_of_every_kind_are_kept(tmp_path: Path, name: str) -> None:
    """A server needs them as the base has them."""
    (write_llama(tmp_path / "model") / name).touch()
    assert kept(tmp_path / "model") == [name]


def test_files_of_a_trainer_are_not_kept(tmp_path: Path) -> None:
    """Nor are weights, nor code that nothing names."""
    model = write_llama(tmp_path / "model")
    for name in ("trainer_state.json", "args.json", "optimizer.pt", "training_args.bin", "Modelfile", "train.py"):
        (model / name).touch()
    assert kept(model) == []


def test_code_of_auto_map_is_kept_with_what_it_imports(tmp_path: Path) -> None:
    """Of config, tokenizer and processor; a class of another repository is not there."""
    model = write_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_bytes())
    maps = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "someone/else--modeling_y.Y"}
    (model / "config.json").write_text(json.dumps({**config, "auto_map": maps}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (model / "configuration_x.py").write_text("import json\nfrom .shared import A\nfrom . import other\n")
    (model / "tokenization_x.py").write_text("def (")  # not Python; that is its reader's business
    for name in ("shared.py", "other.py", "unrelated.py"):
        (model / name).touch()
    assert kept(model) == ["configuration_x.py", "other.py", "shared.py", "tokenization_x.py", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["../secret.X", "/etc/passwd.X", "..X", ""])
def test_auto_map_names_no_files_elsewhere(tmp_path: Path, name: str) -> None:
    """A path is no module name."""
    model = write_llama(tmp_path / "model")
    (tmp_path / "secret.py").touch()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoConfig": name}}))
    assert kept(model) == []


@pytest.mark.parametrize("path", ["/home/me/QwQ-32B", "~/models/qwq", "./checkpoint-500", "../x/y/", r"C:\models\qwq"])
def test_local_paths_are_left_out_of_a_config(path: str) -> None:
    """At any depth; names of the hub and everything else stay."""
    rest = {"model_type": "qwen2", "rope": {"type": "yarn"}, "teacher": "Qwen/QwQ-32B", "eos_token_id": [1, 2]}
    config = {**rest, "_name_or_path": path, "text_config": {"_name_or_path": path, "hidden_act": "silu"}}
    assert portable_config(config) == {**rest, "text_config": {"hidden_act": "silu"}}
