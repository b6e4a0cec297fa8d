"""Which special tokens a GGUF file's tokenizer puts at the ends of a text, and the post-processor that does it.

transformers reads the vocabulary of a GGUF file but not these flags (5.19): a model that needs its BOS lost it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Pre-tokenizers of byte-pair vocabularies to which llama.cpp adds BOS where the file says nothing.
_BOS_PRE_TOKENIZERS = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken", "chameleon"}
)
_FIELDS = ("model", "pre", "add_bos_token", "add_eos_token")


@dataclass(frozen=True, slots=True)
class TextEnds:
    """Whether a tokenizer begins each text with its BOS, and ends it with its EOS."""

    bos: bool
    eos: bool


def read_tokenizer_fields(file: Path) -> dict[str, Any]:
    """Read what a GGUF file says of its tokenizer beside the vocabulary: `model`, `pre`, `add_bos_token`, ..."""
    from gguf import GGUFReader  # noqa: PLC0415

    fields = GGUFReader(file).fields
    return {name: fields[key].contents() for name in _FIELDS if (key := f"tokenizer.ggml.{name}") in fields}


def text_ends(fields: Mapping[str, Any]) -> TextEnds:
    """Decide as llama.cpp does: by the file's flags, else by its kind of vocabulary (`llama_vocab::impl::load`)."""
    model = fields.get("model")
    bos = model == "llama" or (model == "gpt2" and fields.get("pre") in _BOS_PRE_TOKENIZERS)
    return TextEnds(bool(fields.get("add_bos_token", bos)), bool(fields.get("add_eos_token", model == "t5")))


def require_ends(tokenizer: "PreTrainedTokenizerFast", ends: TextEnds) -> TextEnds:
    """Let a tokenizer's engine add the ends that it has tokens for, and nothing else; gives those."""
    bos, eos = tokenizer.bos_token if ends.bos else None, tokenizer.eos_token if ends.eos else None
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (bos, eos) if token is not None}
    _set_post_processor(tokenizer.backend_tokenizer, bos, eos, ids)
    return TextEnds(bos is not None, eos is not None)


def _set_post_processor(engine: "Tokenizer", bos: str | None, eos: str | None, ids: Mapping[str, int]) -> None:
    """Replace what adds tokens, so that none is added twice; one that only trims offsets stays."""
    from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing  # noqa: PLC0415

    def part(name: str, number: int) -> list[str]:
        tokens = [bos, f"${name}", eos]
        return [f"{token}:{number}" for token in tokens if token is not None]

    template = TemplateProcessing(
        single=part("A", 0), pair=[*part("A", 0), *part("B", 1)], special_tokens=list(ids.items())
    )
    present = engine.post_processor
    engine.post_processor = Sequence([present, template]) if isinstance(present, ByteLevel) else template
