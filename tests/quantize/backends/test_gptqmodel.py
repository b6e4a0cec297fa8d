"""What GPTQModel is told: settings of a scheme whose modules differ."""

from typing import Any

import pytest

from config.manifest import Override, Scheme
from config.quantization import grouped
from quantize.backends.gptqmodel import settings
from quantize.modules import direct_tree
from quantize.schemes.settings import SETTINGS

SHAPES = {f"model.layers.{number}.mlp.{name}": (64, 128) for number in range(2) for name in ("up_proj", "down_proj")}


@pytest.mark.parametrize(
    "solver,plain,other,order,expected",
    [
        ("best", 64, -1, True, {"group_size": -1, "act_group_aware": False}),
        ("best", -1, 128, False, {"group_size": 128, "act_group_aware": True}),
        ("best", 64, 128, True, {"group_size": 128}),
        ("classic", 64, -1, False, {"group_size": -1}),
        ("classic", -1, 128, False, {"group_size": 128}),
    ],
)
def test_inputs_are_ordered_in_groups_and_only_there(
    solver: str, plain: int, other: int, order: bool, expected: dict[str, Any]
) -> None:
    """The library raises for a module that has no groups and shall be ordered inside them."""
    override = Override(modules="*.down_proj", bits=4, group_size=other)
    scheme = Scheme(name="x", compression="gptq", weights=grouped(4, plain), overrides=(override,))
    told = settings(scheme, SETTINGS[solver], direct_tree(SHAPES))
    assert told["act_group_aware"] is order
    assert list(told["dynamic"].values()) == [expected]
