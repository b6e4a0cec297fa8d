"""What is remembered of conversations and prompts: who answered which, and what they have in their caches by now."""

from collections.abc import Collection, Mapping
from typing import Literal

from gateway.proxy.leases import Want
from gateway.routing.bytes_per_token import BytesPerToken, learned
from gateway.routing.cluster_state import NOBODY, NOTHING_CACHED, Query
from gateway.routing.pick import Choice
from gateway.routing.prefix_hash import BLOCK_BYTES
from gateway.routing.prefix_index import PrefixIndex, blocks_that_fit
from gateway.routing.sessions import Placement, Sessions
from serving.replica import Replica

Move = Literal["up", "down"]

GUESSED = BytesPerToken()


class Affinity:
    """Owns the sessions, the prefixes, and what a token is in bytes, by model name; all of it is bounded."""

    def __init__(self) -> None:
        self._sessions = Sessions()
        self._prefixes = PrefixIndex()
        self._tokens: dict[str, BytesPerToken] = {}
        self._held_tokens: dict[str, int] = {}
        self._ready: Mapping[str, frozenset[str]] = {}  # ids of replicas, by variant

    def bytes_per_token(self, name: str) -> float:
        """How many bytes of a prompt make a token of this model, roughly."""
        return self._tokens.get(name, GUESSED).ratio

    def query(self, want: Want, tried: frozenset[str] = NOBODY) -> Query:
        """Add to a request what is known of its conversation and its prompt."""
        ask = want.ask
        stay = None if ask.session is None else self._sessions.stay(ask.session)
        return Query(ask, want.turn, tried, stay, self._cached_tokens(want) if ask.blocks else NOTHING_CACHED)

    def went(self, want: Want, query: Query, choice: Choice) -> Move | None:
        """Note where a request goes, which `ended` ends; tells if its conversation changes rungs by that."""
        ask = want.ask
        if ask.blocks:
            self._prefixes.remember(choice.replica.id, ask.blocks)
        if ask.session is None or not self._sessions.went(ask.session, choice.variant.name, choice.replica.id):
            return None
        return _direction(want, query.stay, choice)

    def ended(self, want: Want, prompt_tokens: int) -> None:
        """Note the end of a request, and how many tokens its prompt had; 0 says nothing."""
        if want.ask.session is not None:
            self._sessions.ended(want.ask.session)
        if prompt_tokens and want.prompt_bytes:
            name = want.target.name
            self._tokens[name] = learned(self._tokens.get(name, GUESSED), want.prompt_bytes, prompt_tokens)

    def holds(self, replica_id: str, kv_capacity_tokens: int | None) -> None:
        """Note how much a replica's cache holds, which is how much of prompts it can remember."""
        if kv_capacity_tokens and self._held_tokens.get(replica_id) != kv_capacity_tokens:
            self._held_tokens[replica_id] = kv_capacity_tokens
            self._prefixes.resize(replica_id, blocks_that_fit(kv_capacity_tokens, GUESSED.ratio))

    @property
    def blocks_held(self) -> int:
        """How many blocks of prompts are remembered."""
        return len(self._prefixes)

    def stays(self) -> Mapping[str, Placement]:
        """Where conversations are."""
        return self._sessions.stays()

    def keep_only(self, ready: Mapping[str, Collection[Replica]]) -> None:
        """Forget what replicas had in their caches that are gone."""
        self._ready = {variant: frozenset([each.id for each in replicas]) for variant, replicas in ready.items()}
        replica_ids = frozenset[str]().union(*self._ready.values())
        self._prefixes.keep_only(replica_ids)
        self._held_tokens = {each: tokens for each, tokens in self._held_tokens.items() if each in replica_ids}

    def keep_models(self, names: Collection[str]) -> None:
        """Forget how long tokens are of models that are gone."""
        self._tokens = {each: known for each, known in self._tokens.items() if each in names}

    def _cached_tokens(self, want: Want) -> Mapping[str, float]:
        among = [self._ready.get(rung.name, NOBODY) for rung in want.rungs]
        matched = self._prefixes.matched(want.ask.blocks, among)
        if not matched:
            return NOTHING_CACHED
        block_tokens = BLOCK_BYTES / self.bytes_per_token(want.target.name)
        return {replica_id: blocks * block_tokens for replica_id, blocks in matched.items()}


def _direction(want: Want, stay: Placement | None, choice: Choice) -> Move | None:
    names = [rung.name for rung in want.target.rungs]
    if stay is None or stay.variant not in names or choice.variant.name not in names:
        return None
    return "up" if names.index(choice.variant.name) < names.index(stay.variant) else "down"
