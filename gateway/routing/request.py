"""One request as routing sees it."""

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from config.schema import Floor
from config.variant import Variant
from gateway.routing.sessions import Placement
from gateway.routing.target import Target

NO_REPLICAS: frozenset[str] = frozenset()
NOTHING_CACHED: Mapping[str, float] = MappingProxyType({})

# An estimate of a prompt's length may be too high by as much; only this share of it surely has to fit.
CERTAIN_SHARE = 0.7


class RoutingRequest(msgspec.Struct, frozen=True, gc=False, eq=False):
    """One attempt to find a replica for a request.

    Identity: `turn` counts requests and rotates among equal replicas; `key` is the name of the API key.
    Features: `prompt_tokens` is estimated from `prompt_bytes` (0 for token ids); `answer_tokens` is the longest answer
    that the client accepts, None if it sets no limit; `blocks` are chained hashes of the beginning of the prompt;
    `session` names the conversation, None if there is none; `later`: this gateway has not
    seen it, and another one has. `body_bytes` is what the request holds while it waits.
    Constraints: `rungs` are those of the target's ladder that satisfy `floors` and `precisions`.
    Affinity: `placement` is where this gateway sent the conversation last; `session_hash` is the same at every gateway,
    and None where this is the only one. `cached_tokens` is how much of the prompt replicas have probably in their
    prefix caches.
    `tools`: it has tools, which a replica must take.
    Retry: replicas in `tried` have failed this request.
    """

    target: Target
    rungs: tuple[Variant, ...]
    turn: int = 0
    request_id: str = ""
    key: str = ""
    streams: bool = False
    body_bytes: int = 0
    prompt_tokens: float = 0.0
    prompt_bytes: int = 0
    answer_tokens: int | None = None
    blocks: tuple[int, ...] = ()
    session: str | None = None
    floors: tuple[Floor, ...] = ()
    precisions: frozenset[str] | None = None
    later: bool = False
    placement: Placement | None = None
    session_hash: int | None = None
    cached_tokens: Mapping[str, float] = NOTHING_CACHED
    tried: frozenset[str] = NO_REPLICAS
    tools: bool = False

    @property
    def needed_tokens(self) -> float:
        """The context that the request surely needs: of its answer only what the client named."""
        return CERTAIN_SHARE * self.prompt_tokens + (self.answer_tokens or 0)
