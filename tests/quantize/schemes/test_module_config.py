"""Overrides: which numbers a module gets, and the rules that tell GPTQModel and vLLM the same."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.manifest import Override, Scheme
from quantize.schemes.module_config import WeightArgs, differing_modules, dynamic_rules, weight_args_of
from quantize.schemes.scheme import preset

LEAVES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYERS = [f"model.layers.{number}.{leaf}" for number in range(12) for leaf in LEAVES]


def scheme(*overrides: Override) -> Scheme:
    """int4 in groups of 64, with exceptions."""
    return preset("w4a16-g64").model_copy(update={"overrides": overrides})


@pytest.mark.parametrize(
    "module,weight_args",
    [
        ("model.layers.0.mlp.down_proj", WeightArgs(8, 64)),
        ("model.layers.1.mlp.down_proj", WeightArgs(8, 32)),
        ("model.layers.1.mlp.up_proj", WeightArgs(4, 64)),
        ("model.layers.2.self_attn.o_proj", None),
    ],
)
def test_the_first_pattern_that_matches_counts(module: str, weight_args: WeightArgs | None) -> None:
    """Bits and group size come from one override; without bits a module stays as it is."""
    told = scheme(
        Override(modules="*.1.mlp.down_proj", bits=8, group_size=32),
        Override(modules="*.down_proj", bits=8),
        Override(modules="*.2.self_attn.*"),
    )
    assert weight_args_of(module, told) == weight_args


def test_without_overrides_there_are_no_rules() -> None:
    """A plain scheme's configuration stays plain."""
    assert dynamic_rules(scheme(), LAYERS) == {}


def test_a_rule_names_the_fused_module_too() -> None:
    """vLLM asks for qkv_proj, GPTQModel for q_proj."""
    rules = dynamic_rules(scheme(Override(modules="*.10.self_attn.[qkv]_proj", bits=8)), LAYERS)
    for name in ("q_proj", "k_proj", "v_proj", "qkv_proj"):
        assert differing_modules(rules, f"model.layers.10.self_attn.{name}") == {"bits": 8}
    assert differing_modules(rules, "model.layers.1.self_attn.qkv_proj") == {}
    assert differing_modules(rules, "model.layers.10.self_attn.o_proj") == {}


def test_a_module_that_is_left_alone_has_a_negative_rule() -> None:
    """`-:` is what both readers skip by."""
    rules = dynamic_rules(scheme(Override(modules="*.0.mlp.*")), LAYERS)
    assert all(rule.startswith("-:") for rule in rules)
    assert differing_modules(rules, "model.layers.0.mlp.gate_up_proj") is None
    assert differing_modules(rules, "model.layers.1.mlp.gate_up_proj") == {}


overrides = st.builds(
    Override,
    modules=st.sampled_from(["*.down_proj", "*.1*.mlp.*", "*.[qkv]_proj", "model.layers.3.*", "lm_head"]),
    bits=st.sampled_from([None, 4, 8]),
    group_size=st.sampled_from([None, 32, 128]),
)


@given(st.lists(overrides, max_size=4), st.sampled_from(LAYERS))
def test_the_rules_say_what_the_overrides_mean(given_overrides: list[Override], module: str) -> None:
    """Looking a module up in the written rules gives the numbers that its overrides ask for."""
    told = scheme(*given_overrides)
    rules = dynamic_rules(told, LAYERS)
    weight_args, found = weight_args_of(module, told), differing_modules(rules, module)
    if weight_args is None:
        assert found is None
    else:
        assert found is not None
        assert weight_args == WeightArgs(found.get("bits", told.bits), found.get("group_size", told.group_size))
    assert all(re.compile(rule[2:]) for rule in rules)


EXPERTS = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in (1, 2) for expert in range(3)]


def test_experts_of_a_block_are_one_module() -> None:
    """A rule about all of them names the block's experts, as vLLM asks, and each expert's layers, as GPTQModel does."""
    rules = dynamic_rules(scheme(Override(modules="*.experts.*")), [*EXPERTS, "model.layers.1.self_attn.o_proj"])
    ((rule, changes),) = rules.items()
    assert changes == {}
    for module in ("model.layers.2.mlp.experts", *EXPERTS):
        assert differing_modules(rules, module) is None, module
    assert rule.startswith("-:")
    assert differing_modules(rules, "model.layers.1.mlp.shared_experts.up_proj") == {}


def test_experts_that_differ_keep_their_names() -> None:
    """Then vLLM doesn't load them, which the plan says; the solver still gets its rules."""
    rules = dynamic_rules(scheme(Override(modules="*.experts.1.*", bits=8)), EXPERTS)
    assert differing_modules(rules, EXPERTS[1]) == {"bits": 8}
    assert differing_modules(rules, EXPERTS[0]) == {}
