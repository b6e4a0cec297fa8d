"""The names that clients may send as `model`, and the rungs behind them."""

import pytest

from config.schema import Floor
from gateway.errors import UnknownModel
from gateway.routing.target import Catalog
from tests.gateway.fleet import deployment

DEPLOYMENT = deployment()
CATALOG = Catalog(DEPLOYMENT.settings.aliases, DEPLOYMENT.variants)


@pytest.mark.parametrize(
    "name, rungs, floor, pinned",
    [
        ("smol", ["hi", "mid", "lo"], Floor(), False),
        ("strict", ["hi", "mid", "lo"], Floor(top1_agreement=0.95), False),
        ("team/small", ["lo"], Floor(), False),
        ("lo", ["lo"], Floor(), True),
        ("odd", ["odd"], Floor(), True),
    ],
)
def test_a_name_is_an_alias_or_pins_a_variant(name: str, rungs: list[str], floor: Floor, pinned: bool) -> None:
    """An alias has its ladder and floor; the name of a variant has that variant and no floor."""
    target = CATALOG.resolve(name)
    assert ([rung.name for rung in target.rungs], target.floor, target.pinned) == (rungs, floor, pinned)


@pytest.mark.parametrize("name", ["", "SMOL", "smol ", "x" * 10_000, "\x00\n", "gpt-4o"])
def test_other_names_are_unknown(name: str) -> None:
    """An unknown name is refused with 404, in a message of bounded length."""
    with pytest.raises(UnknownModel) as caught:
        CATALOG.resolve(name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 200


def test_names() -> None:
    """Aliases come first, so a client that takes the first name gets one with a ladder."""
    assert CATALOG.names() == ["smol", "strict", "team/small", "hopeless", "hi", "mid", "lo", "odd"]


def test_adapters_do_not_share_a_prefix_cache_with_their_base() -> None:
    """vLLM caches the prompts of each LoRA adapter apart, so their hashes are salted; other targets share theirs."""
    table = {"precision": "int4", "lora": {"math": {}, "law": {}}}
    aliases = {"x": {"ladder": ["lo-math"]}, "y": {"ladder": ["lo"]}}
    deployed = deployment({"variants": {"lo": table}, "aliases": aliases})
    catalog = Catalog(deployed.settings.aliases, deployed.variants)
    salts = {name: catalog.resolve(name).cache_salt for name in catalog.names()}
    assert salts["y"] == salts["lo"] == b""
    assert salts["x"] == salts["lo-math"] != b""
    assert len({salts[name] for name in ("lo", "lo-math", "lo-law")}) == 3
