"""Where conversations were answered, what replicas have in their caches, and how long a token is."""

import msgspec
import pytest

from config.schema import NO_FLOOR
from config.variant import QualityMeasures, Variant
from gateway.observability.metrics import Metrics
from gateway.proxy.affinity import DEFAULT_BYTES_PER_TOKEN, Affinity
from gateway.proxy.leases import Lease
from gateway.routing.latency import ReplicaMetrics, estimate_latency
from gateway.routing.pick import Candidate
from gateway.routing.prefix_index import BLOCK_BYTES
from gateway.routing.rendezvous import CACHED_SHARE, hash_of
from gateway.routing.request import RoutingRequest
from gateway.routing.sessions import Placement
from gateway.routing.target import Target
from serving.replica import Replica

QUALITY = QualityMeasures("measured", 0.0, 1.0, 1.0)
HI, LO, ELSE = (Variant(name, "any", QUALITY) for name in ("hi", "lo", "else"))
SMOL = Target("smol", (HI, LO), NO_FLOOR, pinned=False)
OTHER = Target("other", (ELSE,), NO_FLOOR, pinned=False)
REPLICAS = {
    f"{each.name}-1": Replica(f"{each.name}-1", each.name, "any", "http://nowhere", "m1") for each in (HI, LO, ELSE)
}
BLOCKS = (1, 2, 3, 4)
NOW = 100.0
BLOCK_TOKENS = BLOCK_BYTES / DEFAULT_BYTES_PER_TOKEN.ratio


def affinity(metrics: Metrics | None = None) -> Affinity:
    """An affinity that knows one ready replica of each variant."""
    made = Affinity(metrics or Metrics(), clock=lambda: NOW)
    made.keep_only({replica.variant: (replica,) for replica in REPLICAS.values()})
    return made


def request(
    target: Target = SMOL, blocks: tuple[int, ...] = (), session: str | None = None, prompt_bytes: int = 0
) -> RoutingRequest:
    """A request whose affinity is not looked up yet."""
    return RoutingRequest(
        target, target.rungs, 7, prompt_tokens=100.0, prompt_bytes=prompt_bytes, blocks=blocks, session=session
    )


def lease_of(routed: RoutingRequest, variant: Variant, prompt_tokens: int = 0) -> Lease:
    """A lease of the only replica of a variant."""
    replica = REPLICAS[f"{variant.name}-1"]
    candidate = Candidate(estimate_latency(ReplicaMetrics(replica)), variant, "preferred")
    lease = Lease(candidate, routed, 0.0, (), lambda _: None)
    lease.replica, lease.prompt_tokens = replica, prompt_tokens
    return lease


def moves(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """How often conversations changed rungs, by alias and direction."""
    return {names: count.value for names, count in metrics.session_moves.children.items()}


def test_a_new_request() -> None:
    """It has no placement and nothing cached; its turn stays, and the replicas that it tried are set."""
    new = affinity().refreshed(request(blocks=BLOCKS, session="s"), frozenset({"hi-1"}))
    assert (new.turn, new.placement, dict(new.cached_tokens), new.tried) == (7, None, {}, frozenset({"hi-1"}))
    assert affinity().refreshed(new).tried == {"hi-1"}


def test_a_prompt_is_cached_where_it_was_sent() -> None:
    """As far as it is the same; other models' replicas may be in it, and are only looked for where few hold it."""
    known = affinity()
    for target, variant in ((SMOL, HI), (OTHER, ELSE)):
        known.enter(lease_of(known.refreshed(request(target, BLOCKS)), variant))
    assert known.refreshed(request(blocks=(1, 2, 9))).cached_tokens["hi-1"] == 2 * BLOCK_TOKENS
    assert known.refreshed(request(OTHER, BLOCKS)).cached_tokens["else-1"] == 4 * BLOCK_TOKENS
    assert dict(known.refreshed(request(blocks=(9, 2, 3))).cached_tokens) == {}
    assert known.blocks_held == 8
    known.keep_only({"lo": (REPLICAS["lo-1"],)})
    assert dict(known.refreshed(request(blocks=BLOCKS)).cached_tokens) == {}
    assert known.blocks_held == 0


def test_a_small_cache() -> None:
    """Only as many blocks are recorded as fit into the KV cache; an unknown capacity changes nothing."""
    known = affinity()
    known.set_capacity("hi-1", round(2 * BLOCK_TOKENS))
    known.set_capacity("hi-1", None)
    known.enter(lease_of(known.refreshed(request(blocks=BLOCKS)), HI))
    assert dict(known.refreshed(request(blocks=BLOCKS)).cached_tokens) == {"hi-1": 2 * BLOCK_TOKENS}


@pytest.mark.parametrize(
    "before, after, move", [(None, HI, None), (HI, HI, None), (HI, LO, "down"), (LO, HI, "up"), (ELSE, HI, None)]
)
def test_a_conversation_that_changes_rungs_is_counted(before: Variant | None, after: Variant, move: str | None) -> None:
    """Only if both rungs are of the same ladder."""
    metrics = Metrics()
    known, turn = affinity(metrics), request(session="s")
    if before is not None:
        first = lease_of(known.refreshed(turn), before)
        known.enter(first)
        known.leave(first)
        assert moves(metrics) == {}
    second = lease_of(known.refreshed(turn), after)
    known.enter(second)
    assert moves(metrics) == ({} if move is None else {("smol", move): 1})
    assert known.placements() == {"s": Placement(after.name, f"{after.name}-1", 1)}
    known.leave(second)
    assert known.refreshed(turn).placement == Placement(after.name, f"{after.name}-1", 0, NOW)


def test_a_second_turn_that_is_known_by_its_opening() -> None:
    """Its session is new, so that the placement found under the opening stays, and a move from there is counted."""
    metrics = Metrics()
    known, opening = affinity(metrics), Placement("hi", "hi-1", 0, NOW)
    second = msgspec.structs.replace(request(session="s"), placement=opening)
    assert known.refreshed(second).placement == opening
    known.enter(lease_of(known.refreshed(second), LO))
    assert moves(metrics) == {("smol", "down"): 1}
    assert known.refreshed(second).placement == Placement("lo", "lo-1", 1)


def test_the_bytes_of_a_token_are_learned_for_each_model() -> None:
    """They are learned from the engine's count of the prompt; a request without a count changes nothing."""
    known = affinity()
    for _ in range(200):
        known.leave(lease_of(request(prompt_bytes=600), HI, prompt_tokens=300))
        known.leave(lease_of(request(OTHER, prompt_bytes=600), ELSE, prompt_tokens=0))
    assert known.bytes_per_token("smol") == pytest.approx(2.0, rel=0.05)
    assert known.bytes_per_token("other") == DEFAULT_BYTES_PER_TOKEN.ratio


def unseen(known: Affinity, count: int = 5) -> None:
    """Answer later turns of conversations that began at another gateway."""
    for number in range(count):
        later = msgspec.structs.replace(request(session=f"elsewhere {number}"), later=True)
        lease = lease_of(known.refreshed(later), HI)
        known.enter(lease)
        known.leave(lease)


def test_a_gateway_by_itself_needs_no_homes() -> None:
    """While it has seen every conversation, nothing but its own placements and its prefix index count."""
    known, turn = affinity(), request(session="s", blocks=BLOCKS)
    for _ in range(3):
        lease = lease_of(known.refreshed(turn), HI)
        known.enter(lease)
        known.leave(lease)
    assert not known.shared
    assert known.refreshed(turn).session_hash is None


def test_gateways_of_the_same_conversations_choose_by_the_same_hash() -> None:
    """Also for what they expect in the cache of the home; a first turn has nothing cached."""
    gateways = affinity(), affinity()
    later = msgspec.structs.replace(request(session="s"), later=True)
    for each in gateways:
        unseen(each)
        assert each.shared
    routed = [each.refreshed(later) for each in gateways]
    assert [each.session_hash for each in routed] == [hash_of("s")] * 2
    expected = {"hi-1": CACHED_SHARE * later.prompt_tokens, "lo-1": CACHED_SHARE * later.prompt_tokens}
    assert [dict(each.cached_tokens) for each in routed] == [expected, expected]
    assert dict(gateways[0].refreshed(request(session="s")).cached_tokens) == {}
