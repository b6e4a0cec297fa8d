"""What a variant's files hold: stacked layers, experts one by one, and what config.json leaves alone."""

import json
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from config.manifest import Override
from config.quantization import schemes_of
from quantize.errors import VariantError
from quantize.model_files.safetensors_header import StoredTensor
from quantize.modules import ModuleTree, direct_tree
from quantize.schemes.scheme import preset
from quantize.variants.checkpoint import other_layers, quantization_config, write_shards
from quantize.variants.storage_format import configured_format, scheme_format

torch = pytest.importorskip("torch", reason="needs torch: install the quantize extra")

from quantize.variants.weights import (  # noqa: E402
    LazyTensor,
    Tensors,
    gptq_dense,
    pack_quantized_dense,
    packed_module,
    read_tensors,
    with_base_matrices,
)
from tests.quantize.variants.test_weights import layer_of  # noqa: E402

EXPERTS = [f"model.layers.0.mlp.experts.{expert}.up_proj" for expert in range(2)]


def gptq_layer(name: str, seed: int, group_size: int = 8) -> Tensors:
    """A GPTQ layer of 16 inputs and 8 outputs with 4 bits."""
    stored = torch.randint(0, 16, (16, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    zeros = torch.full((16 // group_size, 8), 8, dtype=torch.int32)
    scales = torch.rand((16 // group_size, 8), generator=torch.Generator().manual_seed(seed)).half()
    return {f"{name}.{part}": tensor for part, tensor in layer_of(stored, zeros, scales, group_size, bits=4).items()}


def parts_of(tensors: Tensors, name: str) -> Tensors:
    """The tensors of one layer by their last name."""
    return {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}


def test_layers_of_one_matrix_are_stacked() -> None:
    """`gate_up_proj` stands for gate above up."""
    tensors = gptq_layer("gate", 1) | gptq_layer("up", 2)
    packed = packed_module(tensors, ["gate", "up"], "gate_up_proj", preset("w4a16-g64"))
    halves = [gptq_dense(parts_of(tensors, name), 4) for name in ("gate", "up")]
    assert torch.equal(gptq_dense(parts_of(packed, "gate_up_proj"), 4), torch.cat(halves))


def test_zero_points_are_packed_along_the_outputs() -> None:
    """As compressed-tensors has them, for parts that share a matrix too: the same weights as the GPTQ layers'."""
    scheme = preset("w4a16-asym-g64")
    tensors: Tensors = {}
    for seed, name in enumerate(("gate", "up")):
        generator = torch.Generator().manual_seed(seed)
        stored, zeros = (torch.randint(0, 16, (rows, 8), generator=generator, dtype=torch.int32) for rows in (16, 2))
        zeros[0, :2] = torch.tensor([0, 15])
        layer = layer_of(stored, zeros, torch.rand((2, 8), generator=generator), 8, bits=4)
        tensors |= {f"{name}.{part}": tensor for part, tensor in layer.items()}
    parts = parts_of(packed_module(tensors, ["gate", "up"], "gate_up_proj", scheme), "gate_up_proj")
    assert {part: (str(tensor.dtype), tuple(tensor.shape)) for part, tensor in parts.items()} == {
        "weight_packed": ("torch.int32", (16, 2)),
        "weight_scale": ("torch.float16", (16, 2)),
        "weight_zero_point": ("torch.int32", (2, 2)),
        "weight_shape": ("torch.int64", (2,)),
    }
    halves = [gptq_dense(parts_of(tensors, name), 4) for name in ("gate", "up")]
    assert torch.equal(pack_quantized_dense(parts), torch.cat(halves))


def test_exceptions_of_8_bits_have_no_zero_points() -> None:
    """vLLM has no kernel for them: half of the range is zero, and config.json says symmetric."""
    scheme = preset("w4a16-asym-g64").model_copy(
        update={"overrides": (Override(modules="m.layers.1.*.[qkv]_proj", bits=8, group_size=-1),)}
    )
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(0, 256, (16, 8), generator=generator, dtype=torch.int32)
    layer = layer_of(stored, torch.full((1, 8), 128), torch.rand((1, 8), generator=generator), 16, bits=8)
    name = "m.layers.1.self_attn.q_proj"
    tensors = {f"{name}.{part}": tensor for part, tensor in layer.items()}
    parts = parts_of(packed_module(tensors, [name], name, scheme), name)
    assert set(parts) == {"weight_packed", "weight_scale", "weight_shape"}
    assert torch.equal(pack_quantized_dense(parts), gptq_dense(layer, 8))


def test_exceptions_are_groups_of_their_own() -> None:
    """Named by the modules and by the matrix that vLLM makes of them; all others are the first group."""
    overrides = (
        Override(modules="*.0.self_attn.[qkv]_proj", bits=8, group_size=-1),
        Override(modules="*.down_proj", bits=4, group_size=32),
        Override(modules="*.1.mlp.up_proj"),
    )
    scheme = preset("w4a16-asym-g64").model_copy(update={"overrides": overrides})
    names = [f"m.layers.{layer}.self_attn.{part}_proj" for layer in (0, 1) for part in "qkvo"]
    names += [f"m.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "up", "down")]
    config = quantization_config(scheme, 0.01, names)
    assert config["ignore"] == ["lm_head", "m.layers.1.mlp.up_proj"]
    assert [group["targets"][0] for group in config["config_groups"].values()] == [
        "Linear",
        r"re:m\.layers\.(0)\.self_attn\.(q_proj|qkv_proj)$",
        r"re:m\.layers\.(0|1)\.mlp\.down_proj$",
    ]
    for name in names:
        assert configured_format(config, name) == scheme_format(scheme, name, "pack-quantized")
    fused = configured_format(config, "m.layers.0.self_attn.qkv_proj")
    assert fused is not None
    assert (fused.bits, fused.group_size, fused.sym) == (8, -1, True)
    assert len(schemes_of(config)) == 3


def test_layers_with_other_groups_cant_share_a_matrix() -> None:
    """Their `g_idx` differ, and the matrix has one."""
    tensors = gptq_layer("gate", 1) | gptq_layer("up", 2, group_size=16)
    with pytest.raises(VariantError, match="different groups"):
        packed_module(tensors, ["gate", "up"], "gate_up_proj", preset("w4a16-g64"))


def test_experts_are_put_back_into_the_bases_tensors() -> None:
    """[E, N, K], gate above up; what the base stores one by one stays so."""
    experts = {
        f"m.experts.{expert}.{part}_proj.weight": torch.full((2, 3), float(10 * expert + number))
        for expert in range(2)
        for number, part in enumerate(("gate", "up", "down"))
    }
    found = with_base_matrices(dict(experts), ["m.experts.gate_up_proj", "m.experts.down_proj", "m.norm.weight"])
    assert found.keys() == {"m.experts.gate_up_proj", "m.experts.down_proj"}
    assert found["m.experts.gate_up_proj"][...][:, :, 0].tolist() == [[0, 0, 1, 1], [10, 10, 11, 11]]
    assert found["m.experts.down_proj"][...].shape == (2, 2, 3)
    assert with_base_matrices(dict(experts), list(experts)).keys() == experts.keys()


def test_parts_are_put_back_into_the_bases_matrix() -> None:
    """[N, K], gate above up, for a base that stores both in one."""
    parts = {
        f"mlp.{part}_proj.weight": LazyTensor(partial(torch.full, (2, 3), float(number)))
        for number, part in enumerate(("gate", "up"))
    }
    found = with_base_matrices(dict(parts), ["mlp.gate_up_proj.weight"])
    assert found.keys() == {"mlp.gate_up_proj.weight"}
    assert found["mlp.gate_up_proj.weight"][...][:, 0].tolist() == [0, 0, 1, 1]


def test_w8a8_ignores_what_is_never_quantized() -> None:
    """An engine takes any linear layer for a quantized one: routers and vision towers are named, embeddings are not."""
    tree = direct_tree(dict.fromkeys(EXPERTS, (8, 8)))
    tensors = {f"{name}.weight": StoredTensor((8, 8), 128) for name in EXPERTS} | {
        "model.embed_tokens.weight": StoredTensor((8, 8), 128),
        "lm_head.weight": StoredTensor((8, 8), 128),
        "model.norm.weight": StoredTensor((8,), 16),
        "model.layers.0.mlp.gate.weight": StoredTensor((2, 8), 32),
        "model.layers.0.linear_attn.conv1d.weight": StoredTensor((8, 1, 4), 64),
    }
    others = other_layers(tensors, tree)
    assert others == ["model.layers.0.linear_attn.conv1d", "model.layers.0.mlp.gate"]
    config = quantization_config(preset("w8a8"), 0.01, sorted(tree.shapes), others)
    assert config["ignore"] == ["lm_head", *others]
    assert other_layers({name: tensors[name] for name in list(tensors)[2:5]}, ModuleTree(())) == []


def test_kept_experts_are_one_pattern() -> None:
    """A large model has tens of thousands of them."""
    scheme = preset("w8a8").model_copy(update={"overrides": (keep("*.experts.*"),)})
    config = quantization_config(scheme, 0.01, [*EXPERTS, "model.layers.0.self_attn.o_proj"])
    assert config["ignore"] == ["lm_head", r"re:.*\.experts\.\d+\..*"]


def keep(pattern: str) -> Override:
    """An exception that leaves modules as they are."""
    return Override(modules=pattern)


def test_one_file_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Tensors are let go as soon as their file is written; the index names the file of each."""
    alive: set[int] = set()
    most = 0

    def tensors() -> Iterator[tuple[str, Any]]:
        nonlocal most
        for number in range(10):
            tensor = torch.full((100,), float(number))
            alive.add(number)
            weakref.finalize(tensor, alive.discard, number)
            most = max(most, len(alive))
            yield f"t{number}", tensor

    write_shards(tensors(), tmp_path, shard_bytes=1200)
    names = [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"]["total_size"] == 4000
    assert [index["weight_map"][f"t{number}"] for number in (0, 2, 3, 9)] == [names[0], names[0], names[1], names[3]]
    assert {name: float(tensor[0]) for name, tensor in read_tensors(tmp_path)} == {f"t{n}": float(n) for n in range(10)}
    assert most <= 4


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    """It has the plain name."""
    write_shards([("t", torch.zeros(4))], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
