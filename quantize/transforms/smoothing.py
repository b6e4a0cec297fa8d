"""Scales of input channels, moved from activations into weights: SmoothQuant's formula, searched as AWQ searches.

A layer that reads x / s with the weight W s gives what it gave (arXiv 2211.10438); x / s costs nothing, because what
makes x is divided instead: the weights of a norm, or the rows of the linear layer before. s = a^alpha / w^(1 - alpha)
of the channel's activations a and its largest weight w; alpha, and whether a is the largest activation or its root mean
square, are those with the least error of the rounded layer's output (arXiv 2306.00978), per group of layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantize.dense_models import fake_quantize_tokens
from quantize.planning.block_form import BlockForm
from quantize.schemes.module_config import WeightArgs
from quantize.transforms.layout import Layout

ALPHAS = tuple(step / 10 for step in range(1, 11))
_SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class ScaleGroup:
    """Layers of a block that read the same input, and what that input comes from: a norm, or a linear layer.

    `repeats` heads read each of the source's outputs, in spans of `span` channels. The outputs are those from row
    `first_row` of a linear layer on, whose other rows are another layer's. A norm multiplies by `norm_offset` and its
    weights; None for a linear layer.
    """

    source: str
    layers: tuple[str, ...]
    repeats: int = 1
    span: int = 1
    first_row: int = 0
    norm_offset: float | None = None

    def spread(self, scales: Any) -> Any:
        """Repeat the scales of the source's outputs for the channels that the layers read."""
        return scales.reshape(-1, self.span).repeat_interleave(self.repeats, 0).reshape(-1)

    def gathered(self, channels: Any) -> Any:
        """Reduce figures of the channels that the layers read to the largest of each of the source's outputs."""
        return channels.reshape(-1, self.repeats, self.span).amax(1).reshape(-1)


@dataclass(frozen=True, slots=True)
class ChannelActivations:
    """What the layers of a group read: the largest and mean square of each channel, and some tokens [T, K]."""

    largest: Any
    mean_square: Any
    tokens: Any

    def to(self, device: str) -> "ChannelActivations":
        """Copy them to a device."""
        return ChannelActivations(self.largest.to(device), self.mean_square.to(device), self.tokens.to(device))


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a layer is rounded: weights, None for a layer that is kept, and the bits of activations."""

    weights: WeightArgs | None
    activation_bits: int


def groups_of(layer: int, layout: Layout, form: BlockForm) -> Iterator[ScaleGroup]:
    """Yield the groups of a block: attention and MLP inputs where norms come before, inputs of o_proj and down_proj."""
    block = f"model.layers.{layer}"
    readers: dict[str, tuple[str, ...]] = {}
    for norm, layers in ((form.attention_norm, form.attention_inputs), (form.mlp_norm, form.mlp_inputs)):
        if norm is not None:
            readers[norm] = (*readers.get(norm, ()), *(f"{block}.{name}" for name in layers))
    for norm, names in readers.items():
        yield ScaleGroup(f"{block}.{norm}", names, norm_offset=form.norm_offset)
    yield ScaleGroup(
        f"{block}.self_attn.{form.values}",
        (f"{block}.self_attn.o_proj",),
        repeats=layout.heads // layout.kv_heads,
        span=layout.head_dim,
        first_row=(layout.heads + layout.kv_heads) * layout.head_dim if form.values == "qkv_proj" else 0,
    )
    if form.mlp_up is not None:
        joined = form.mlp_up == "gate_up_proj"
        yield ScaleGroup(
            f"{block}.mlp.{form.mlp_up}",
            (f"{block}.mlp.down_proj",),
            first_row=layout.intermediate_size if joined else 0,
        )


def best_scales(
    group: ScaleGroup,
    activations: ChannelActivations,
    weights: Mapping[str, Any],
    roundings: Mapping[str, Rounding],
) -> Any:
    """Search the scales [outputs of the source] with the least error; ones where none is better than no scales.

    `weights` are those of the group's layers [N, K].
    """
    import torch  # noqa: PLC0415

    wanted = {name: activations.tokens @ weight.T for name, weight in weights.items()}
    plain = torch.ones_like(group.gathered(activations.largest))
    best, least = plain, float("inf")
    for scales in (plain, *candidates(group, activations, weights.values())):
        channel = group.spread(scales)
        error = sum(
            _error(wanted[name], activations, channel, weight, roundings[name]) for name, weight in weights.items()
        )
        if error < least:
            best, least = scales, error
    return best


def candidates(group: ScaleGroup, activations: ChannelActivations, weights: Any) -> Iterator[Any]:
    """Yield scales for each alpha, of geometric mean 1, by largest activations and by their root mean squares."""
    import torch  # noqa: PLC0415

    heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    weight_sizes = group.gathered(heaviest).clamp(min=_SMALLEST)
    for sizes in (activations.largest, activations.mean_square.sqrt()):
        activation_sizes = group.gathered(sizes).clamp(min=_SMALLEST)
        for alpha in ALPHAS:
            scales = activation_sizes**alpha / weight_sizes ** (1 - alpha)
            yield scales / scales.log().mean().exp()


def _error(
    wanted: Any,
    activations: ChannelActivations,
    channel: Any,
    weight: Any,
    rounding: Rounding,
) -> float:
    """Mean over tokens of the squared error of a layer's output, relative to the output.

    Relative, because the first token of a text has activations a thousand times as large and would decide alone.
    """
    tokens, changed = activations.tokens / channel, weight * channel
    if rounding.weights is not None:
        changed = rounded_to_nearest(changed, rounding.weights)
        tokens = fake_quantize_tokens(tokens) if rounding.activation_bits == 8 else tokens
    error = (tokens @ changed.T - wanted).square().sum(1)
    return float((error / wanted.square().sum(1).clamp(min=_SMALLEST)).mean())


def rounded_to_nearest(weight: Any, args: WeightArgs) -> Any:
    """Round a weight [N, K] in its groups, scaled by the largest: a cheap stand-in for what the solver does."""
    size = weight.shape[1] if args.group_size < 0 else args.group_size
    grouped = weight.reshape(weight.shape[0], -1, size)
    scale = (grouped.abs().amax(2, keepdim=True) / ((1 << (args.bits - 1)) - 1)).clamp(min=1e-12)
    return ((grouped / scale).round() * scale).reshape(weight.shape)


def smoothed(
    tensors: Mapping[str, Any], groups: Sequence[ScaleGroup], scales: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of a model by name, in fp32 where they changed; `scales` by the source of each group.

    A norm keeps its dtype. What its weights lose by that is made up for in the layers that read it.
    """
    norms = {group.source: _divided_norm(tensors, group, scales) for group in groups if group.norm_offset is not None}
    exact = {**scales, **{source: divisor for source, (_, divisor) in norms.items()}}
    sources = {group.source: group for group in groups}
    readers = {layer: group for group in groups for layer in group.layers}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in norms:
            yield name, norms[module][0]
            continue
        changed = tensor[...]
        if module in sources:
            changed = _divided_rows(changed.float(), sources[module], exact[module])
        if module in readers and kind == "weight":
            group = readers[module]
            changed = changed.float() * group.spread(exact[group.source])
        yield name, changed


def _divided_rows(value: Any, group: ScaleGroup, scales: Any) -> Any:
    """Divide outputs of a linear layer, from `first_row` on: rows of its weight [N, K], or of its bias [N]."""
    import torch  # noqa: PLC0415

    divisor = torch.cat([scales.new_ones(group.first_row), scales])
    return value / (divisor.unsqueeze(1) if value.ndim > 1 else divisor)


def _divided_norm(tensors: Mapping[str, Any], group: ScaleGroup, scales: Mapping[str, Any]) -> tuple[Any, Any]:
    """Divide a norm; give its weights in their dtype, and the scales by which they are divided indeed, rounded so."""
    import torch  # noqa: PLC0415

    weight, offset = tensors[f"{group.source}.weight"][...], group.norm_offset or 0.0
    factor = weight.float() + offset
    stored = (factor / scales[group.source] - offset).to(weight.dtype)
    divided = stored.float() + offset
    stays = divided == 0
    return torch.where(stays, weight, stored), torch.where(stays, torch.ones_like(factor), factor / divided)
