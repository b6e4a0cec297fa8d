"""Affinity: which replica answered a conversation, and which prompts replicas have probably in their caches."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence

import msgspec

from config.variant import Variant
from gateway.observability.metrics import Metrics
from gateway.proxy.leases import Lease
from gateway.routing.bytes_per_token import BytesPerToken, learned
from gateway.routing.prefix_index import BLOCK_BYTES, PrefixIndex, blocks_that_fit
from gateway.routing.rendezvous import EMPTY_TABLE, SHARED_FROM, RendezvousTable, hash_of, unseen_share, with_homes
from gateway.routing.request import NO_REPLICAS, NOTHING_CACHED, RoutingRequest
from gateway.routing.sessions import Placement, Sessions
from gateway.routing.target import Target
from serving.replica import Replica

DEFAULT_BYTES_PER_TOKEN = BytesPerToken()


class Affinity:
    """Owns sessions, the prefix index, and the bytes of a token by model name, all bounded; a Ledger."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._sessions = Sessions()
        self._prefixes = PrefixIndex()
        self._tokens: dict[str, BytesPerToken] = {}
        self._capacity_tokens: dict[str, int] = {}
        self._ready: Mapping[str, frozenset[str]] = {}  # ids of replicas, by variant
        self._tables: Mapping[str, RendezvousTable] = {}  # of the same
        self._unseen_share = 0.0

    def bytes_per_token(self, model: str) -> float:
        """How many bytes of a prompt make a token of this model, on average."""
        return self._tokens.get(model, DEFAULT_BYTES_PER_TOKEN).ratio

    def placement(self, session: str) -> Placement | None:
        """Where a conversation was answered last."""
        return self._sessions.placement(session)

    @property
    def shared(self) -> bool:
        """Whether other gateways answer turns of the same conversations: later turns of some were not seen here."""
        return self._unseen_share >= SHARED_FROM

    def session_hash(self, session: str) -> int | None:
        """The hash of a conversation that every gateway chooses by; None if this is the only one: it knows more."""
        return hash_of(session) if self.shared else None

    def with_homes(
        self, cached_tokens: Mapping[str, float], session_hash: int, rungs: tuple[Variant, ...], prompt_tokens: float
    ) -> Mapping[str, float]:
        """Add what the home of a conversation on each rung has cached of the turns that other gateways sent there."""
        homes = [self._tables.get(rung.name, EMPTY_TABLE).home(session_hash) for rung in rungs]
        return with_homes(cached_tokens, [home for home in homes if home is not None], prompt_tokens)

    def cached_tokens(self, model: str, rungs: tuple[Variant, ...], blocks: tuple[int, ...]) -> Mapping[str, float]:
        """How many tokens of a prompt replicas have probably cached, at least those of some rungs that have any."""
        among: Sequence[frozenset[str]] = ()
        if self._prefixes.is_common(blocks[0]):
            among = [self._ready.get(rung.name, NO_REPLICAS) for rung in rungs]
        matches = self._prefixes.matched(blocks, among)
        if not matches:
            return NOTHING_CACHED
        block_tokens = BLOCK_BYTES / self.bytes_per_token(model)
        if len(blocks) == 1:
            return dict.fromkeys(matches, block_tokens)
        return {replica_id: count * block_tokens for replica_id, count in matches.items()}

    def refreshed(self, request: RoutingRequest, tried: frozenset[str] | None = None) -> RoutingRequest:
        """The same request with the affinity of now, for another attempt after it waited or failed."""
        placement, session_hash, cached_tokens = None, None, NOTHING_CACHED
        if request.session is not None:
            placement = self.placement(request.session) or request.placement
            session_hash = self.session_hash(request.session)
        if request.blocks:
            cached_tokens = self.cached_tokens(request.target.name, request.rungs, request.blocks)
        if session_hash is not None and request.later:
            cached_tokens = self.with_homes(cached_tokens, session_hash, request.rungs, request.prompt_tokens)
        return msgspec.structs.replace(
            request,
            placement=placement,
            session_hash=session_hash,
            cached_tokens=cached_tokens,
            tried=request.tried if tried is None else tried,
        )

    def enter(self, lease: Lease) -> None:
        """Record where a request goes; counts a conversation that changes rungs by it."""
        request = lease.request
        if request.blocks:
            self._prefixes.remember(lease.replica.id, request.blocks)
        if request.session is not None:
            variant = lease.replica.variant
            if request.later or request.placement is not None:
                self._unseen_share = unseen_share(self._unseen_share, unseen=request.later)
            before = self._sessions.begin(request.session, variant, lease.replica.id) or request.placement
            if before is not None and before.variant != variant:
                self._count_move(request.target, before.variant, variant)

    def leave(self, lease: Lease) -> None:
        """End the turn of a conversation; learns from the engine's count how many bytes a token has."""
        request = lease.request
        if request.session is not None:
            self._sessions.end(request.session, self._clock())
        if lease.prompt_tokens and request.prompt_bytes:
            model = request.target.name
            known = self._tokens.get(model, DEFAULT_BYTES_PER_TOKEN)
            self._tokens[model] = learned(known, request.prompt_bytes, lease.prompt_tokens)

    def set_capacity(self, replica_id: str, kv_capacity_tokens: int | None) -> None:
        """Set how much a replica's KV cache holds, and so how many blocks of prompts it can have; None: unknown."""
        if kv_capacity_tokens and self._capacity_tokens.get(replica_id) != kv_capacity_tokens:
            self._capacity_tokens[replica_id] = kv_capacity_tokens
            self._prefixes.resize(replica_id, blocks_that_fit(kv_capacity_tokens, DEFAULT_BYTES_PER_TOKEN.ratio))

    @property
    def blocks_held(self) -> int:
        """How many blocks of prompts are recorded."""
        return len(self._prefixes)

    def placements(self) -> Mapping[str, Placement]:
        """Where all conversations are, by session."""
        return self._sessions.placements()

    def keep_only(self, ready: Mapping[str, Collection[Replica]]) -> None:
        """Follow the registry: forget what replicas had cached that are gone."""
        self._ready = {variant: frozenset([each.id for each in replicas]) for variant, replicas in ready.items()}
        self._tables = {variant: RendezvousTable.of(sorted(ids)) for variant, ids in self._ready.items()}
        replica_ids = frozenset[str]().union(*self._ready.values())
        self._prefixes.keep_only(replica_ids)
        self._capacity_tokens = {each: tokens for each, tokens in self._capacity_tokens.items() if each in replica_ids}

    def keep_models(self, models: Collection[str]) -> None:
        """Forget the bytes of a token of all other models."""
        self._tokens = {model: known for model, known in self._tokens.items() if model in models}

    def _count_move(self, target: Target, before: str, variant: str) -> None:
        places = {rung.name: place for place, rung in enumerate(target.rungs)}
        if before in places and variant in places and (change := places[variant] - places[before]) != 0:
            self._metrics.session_moves.labels(target.name, "up" if change < 0 else "down").inc()
