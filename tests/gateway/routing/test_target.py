"""From a model name to the variants that may answer it."""

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
    """An alias stands for its ladder and floor; a variant's own name for itself, with no floor but the caller's."""
    target = CATALOG.resolve(name)
    assert ([variant.name for variant in target.rungs], target.floor, target.pinned) == (rungs, floor, pinned)


@pytest.mark.parametrize("name", ["", "SMOL", "smol ", "x" * 10_000, "\x00\n", "gpt-4o"])
def test_other_names_are_unknown(name: str) -> None:
    """A made-up name is refused in a message of bounded length."""
    with pytest.raises(UnknownModel) as caught:
        CATALOG.resolve(name)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")
    assert len(caught.value.message) < 200


def test_names() -> None:
    """Aliases come first: clients that take the first name get one with a ladder."""
    assert CATALOG.names() == ["smol", "strict", "team/small", "hopeless", "hi", "mid", "lo", "odd"]
