"""What is remembered of conversations and prompts, and what a decision is told of it."""

import pytest

from config.schema import NO_FLOOR
from config.variant import QualityMeasures, Variant
from gateway.proxy.affinity import GUESSED, Affinity
from gateway.proxy.leases import Want
from gateway.routing.pick import Choice
from gateway.routing.prefix_hash import BLOCK_BYTES
from gateway.routing.request import Ask
from gateway.routing.sessions import Placement
from gateway.routing.target import Target
from serving.replica import Replica

QUALITY = QualityMeasures("measured", 0.0, 1.0, 1.0)
HI, LO, ELSE = (Variant(name, "any", QUALITY) for name in ("hi", "lo", "else"))
SMOL, OTHER = Target("smol", (HI, LO), NO_FLOOR, pinned=False), Target("other", (ELSE,), NO_FLOOR, pinned=False)
REPLICAS = {
    f"{each.name}-1": Replica(f"{each.name}-1", each.name, "any", "http://nowhere", "m1") for each in (HI, LO, ELSE)
}
BLOCKS = (1, 2, 3, 4)
BLOCK_TOKENS = BLOCK_BYTES / GUESSED.ratio


def memory() -> Affinity:
    """One that knows a replica of each variant."""
    made = Affinity()
    made.keep_only({replica.variant: (replica,) for replica in REPLICAS.values()})
    return made


def want(
    target: Target = SMOL, blocks: tuple[int, ...] = (), session: str | None = None, prompt_bytes: int = 0
) -> Want:
    """A request."""
    return Want(target, target.rungs, 7, Ask(100.0, None, blocks, session), prompt_bytes=prompt_bytes)


def choice(variant: Variant) -> Choice:
    """Its only replica."""
    return Choice(REPLICAS[f"{variant.name}-1"], variant, "preferred")


def test_a_request_that_nobody_knows() -> None:
    query = memory().query(want(blocks=BLOCKS, session="s"), frozenset({"hi-1"}))
    assert (query.turn, query.stay, dict(query.cached_tokens), query.tried) == (7, None, {}, frozenset({"hi-1"}))


def test_where_a_prompt_went_it_is_cached_from_then_on() -> None:
    """As far as it is the same; only with those that may answer the request."""
    here = memory()
    for target, variant in ((SMOL, HI), (OTHER, ELSE)):
        asked = want(target, BLOCKS)
        here.went(asked, here.query(asked), choice(variant))
    assert dict(here.query(want(blocks=(1, 2, 9))).cached_tokens) == {"hi-1": 2 * BLOCK_TOKENS}
    assert dict(here.query(want(OTHER, BLOCKS)).cached_tokens) == {"else-1": 4 * BLOCK_TOKENS}
    assert here.blocks_held == 8
    here.keep_only({"lo": (REPLICAS["lo-1"],)})
    assert dict(here.query(want(blocks=BLOCKS)).cached_tokens) == {}
    assert here.blocks_held == 0


def test_a_small_cache_forgets() -> None:
    """As many blocks as fit into what its engine says that it holds; what it doesn't say changes nothing."""
    here = memory()
    here.holds("hi-1", round(2 * BLOCK_TOKENS))
    here.holds("hi-1", None)
    asked = want(blocks=BLOCKS)
    here.went(asked, here.query(asked), choice(HI))
    assert dict(here.query(asked).cached_tokens) == {"hi-1": 2 * BLOCK_TOKENS}


@pytest.mark.parametrize(
    "before, after, move", [(None, HI, None), (HI, HI, None), (HI, LO, "down"), (LO, HI, "up"), (ELSE, HI, None)]
)
def test_a_conversation_that_changes_rungs_is_told(before: Variant | None, after: Variant, move: str | None) -> None:
    """Where it was on the same ladder."""
    here, asked = memory(), want(session="s")
    if before is not None:
        here.went(asked, here.query(asked), choice(before))
        here.ended(asked, 0)
    assert here.went(asked, here.query(asked), choice(after)) == move
    assert here.stays() == {"s": Placement(after.name, f"{after.name}-1", 1)}
    here.ended(asked, 0)
    assert here.query(asked).stay == Placement(after.name, f"{after.name}-1", 0)


def test_what_a_token_is_in_bytes_is_learned_for_each_model() -> None:
    """From what engines count; an answer that doesn't say says nothing."""
    here = memory()
    for _ in range(200):
        here.ended(want(prompt_bytes=600), 300)
        here.ended(want(OTHER, prompt_bytes=600), 0)
    assert here.bytes_per_token("smol") == pytest.approx(2.0, rel=0.05)
    assert here.bytes_per_token("other") == GUESSED.ratio
