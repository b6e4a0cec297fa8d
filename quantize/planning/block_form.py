"""Which layers of a block read what, by family: all that scales of channels need to know of an architecture. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class BlockForm:
    """Names of a block's norms and linear layers, as the base's files have them.

    attention_norm   norm whose output q, k and v read and nothing else; None: there is none, or others read it
    mlp_norm         the same of gate and up; with the name of `attention_norm`, one norm feeds all five (parallel)
    norm_offset      a norm multiplies by its weights and this: Gemma's by 1 + w
    values           the matrix that has v, the last rows of it where q and k are in it, too
    mlp_up           the matrix that has up, the last half of it where gate is in it, too; None: experts
    adds             the outputs of o and of down are added to the residual stream one after the other, as they are
    """

    attention_norm: str | None = "input_layernorm"
    mlp_norm: str | None = "post_attention_layernorm"
    norm_offset: float = 0.0
    values: str = "v_proj"
    mlp_up: str | None = "up_proj"
    adds: bool = True

    @property
    def attention_inputs(self) -> tuple[str, ...]:
        """The layers that read the input of attention."""
        return (
            ("self_attn.qkv_proj",) if self.values == "qkv_proj" else tuple(f"self_attn.{part}_proj" for part in "qkv")
        )

    @property
    def mlp_inputs(self) -> tuple[str, ...]:
        """The layers that read the input of the MLP; none where routers choose experts."""
        if self.mlp_up is None:
            return ()
        return ("mlp.gate_up_proj",) if self.mlp_up == "gate_up_proj" else ("mlp.gate_proj", "mlp.up_proj")


_TWO_NORMS = BlockForm()
_GEMMA = BlockForm(mlp_norm="pre_feedforward_layernorm", norm_offset=1.0, adds=False)
# Norms after the layers: what q, k, v, gate and up read is the residual stream itself.
_NORMS_AFTER = BlockForm(attention_norm=None, mlp_norm=None, adds=False)
_GLM = BlockForm(mlp_up="gate_up_proj")
# A router reads what the experts read, and experts are too many to search scales for: their inputs stay as they are.
_EXPERTS = BlockForm(mlp_norm=None, mlp_up=None, adds=False)

# Read in transformers 5.19; tests/quantize/transforms compares the logits of each.
BLOCK_FORMS: Mapping[str, BlockForm] = MappingProxyType(
    {
        "cohere2": BlockForm(mlp_norm="input_layernorm", adds=False),
        "ernie4_5": _TWO_NORMS,
        "exaone4": _NORMS_AFTER,
        "gemma2": _GEMMA,
        "gemma3_text": _GEMMA,
        "glm": _GLM,
        "glm4": BlockForm(mlp_up="gate_up_proj", adds=False),
        "granite": BlockForm(adds=False),  # times a constant
        "hunyuan_v1_dense": _TWO_NORMS,
        "llama": _TWO_NORMS,
        "ministral3": _TWO_NORMS,
        "mistral": _TWO_NORMS,
        "mixtral": _EXPERTS,
        "olmo2": _NORMS_AFTER,
        "olmo3": _NORMS_AFTER,
        "phi3": BlockForm(values="qkv_proj", mlp_up="gate_up_proj"),
        "qwen2": _TWO_NORMS,
        "qwen2_moe": _EXPERTS,
        "qwen3": _TWO_NORMS,
        "qwen3_moe": _EXPERTS,
        "seed_oss": _TWO_NORMS,
        "smollm3": _TWO_NORMS,
    }
)
