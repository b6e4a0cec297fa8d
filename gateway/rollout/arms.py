"""Rollouts in the path of requests: each conversation is drawn to an arm, and what becomes of it is recorded.

`Rollouts.active` is None while no rollout runs, which is all that a request then looks at. The follower writes it; the
handler of inference requests calls `draw`.
"""

from collections.abc import Callable, Mapping, Sequence

from gateway.keys import Caller
from gateway.live_config import Route
from gateway.observability.metrics.instruments import Counter, Family
from gateway.openai.endpoints import CHAT
from gateway.openai.request import InferenceRequest
from gateway.proxy.context import RequestContext
from gateway.proxy.leases import Lease
from gateway.proxy.routing_features import Conversation, conversation_of
from gateway.proxy.shadow import Sample, Sampling, Shadow
from gateway.proxy.stats import CLIENT_CLOSED_REQUEST, FINISH_REASONS, RequestStats
from gateway.proxy.upstream.protocol import Sink
from gateway.rollout.collection import Collection, Outcome, logarithm
from gateway.rollout.content import Content, read_content
from gateway.rollout.lottery import Draw, Lottery
from gateway.routing.latency import LatencyEstimate
from gateway.routing.sessions import Placement
from gateway.routing.target import Target

# A longer answer is judged by its beginning only as far as statistics go: not at all for loops.
MAX_OBSERVED_BYTES = 4 * 2**20
MAX_ROUTES = 10_000
SERVER_ERRORS = 500
# Events that the gateway read together came at once, as far as it knows: their logarithm would outweigh all others.
READ_TOGETHER_SECONDS = 1e-4

Estimates = Callable[[str], Sequence[LatencyEstimate]]
Counters = Family[Counter]


class AliasArms:
    """The two arms of an alias in this process, with the lottery and the evidence of its rollout."""

    def __init__(
        self, rollout: str, old: str, canary: Target, lottery: Lottery, estimates: Estimates, counters: Counters
    ) -> None:
        self.rollout = rollout
        self.old = old
        self.lottery = lottery
        self.collection = Collection()
        self._canary = canary
        self._estimates = estimates
        self._counters = counters
        self._routes: dict[str | None, Route] = {}
        self.sampling = Sampling(0.0)
        self.shadow: Shadow | None = None

    def use(self, canary: Target, weight: float, step: int) -> None:
        """Follow a new revision, or a new configuration."""
        self._canary, self._routes = canary, {}
        self.lottery.weight, self.lottery.step = weight, step

    @property
    def canary(self) -> tuple[str, float]:
        """The new variant, and the share of new conversations that are drawn to it."""
        return self._canary.canary or "", self.lottery.weight

    def draw(self, conversation: Conversation, request_id: str, caller: Caller, route: Route) -> tuple[Route, Draw]:
        """Draw a conversation, and return the route of its arm; without an identity each request is one."""
        key, named, later = conversation
        draw, new = self.lottery.draw(key or request_id, later=later, named=named, recurs=bool(key))
        if new:
            self.collection.drawn(draw)
            if draw.counts:
                self._counters.labels(route.target.name, draw.arm).inc()
        return (self._canary_route(caller, route) if draw.arm == "canary" else route), draw

    def expected_first_token_seconds(self, tokens: float) -> float:
        """How long the old variant would take to read so many tokens; 1 while its speed is unknown."""
        for estimate in self._estimates(self.old):
            if estimate.known and estimate.step_seconds + estimate.token_seconds > 0:
                return max(estimate.step_seconds + tokens * estimate.token_seconds, 1e-6)
        return 1.0

    def _canary_route(self, caller: Caller, route: Route) -> Route:
        known = self._routes.get(caller.name)
        if known is not None and known.caller is caller:
            return known
        if len(self._routes) >= MAX_ROUTES:
            self._routes.clear()
        rungs = self._canary.filter((caller.floor,), None).permitted
        made = Route(caller, self._canary, rungs, route.queue_seconds)
        self._routes[caller.name] = made
        return made


class Rollouts:
    """The rollouts that run, by alias; None: there are none."""

    def __init__(self, placement: Callable[[str], Placement | None]) -> None:
        self.active: Mapping[str, AliasArms] | None = None
        self._placement = placement

    def draw(self, route: Route, context: RequestContext) -> Route:
        """Return the route of the arm that a request's conversation belongs to, and record what becomes of it."""
        arms = None if self.active is None else self.active.get(route.target.name)
        inference = context.inference
        if arms is None or not inference.endpoint.generates:
            context.observation = None
            return route
        conversation = conversation_of(inference, context.headers, context.caller.name)
        if conversation.named and not conversation.later:
            # It may go on without its earlier turns in the request.
            conversation = conversation._replace(later=self._placement(conversation.key) is not None)
        chosen, draw = arms.draw(conversation, context.stats.request_id, context.caller, route)
        may_shadow = context.caller.shadow and inference.endpoint is CHAT
        context.observation = ObservedRequest(arms, draw, may_shadow=may_shadow)
        return chosen


class ObservedRequest:
    """Records what becomes of one request; implements `Observation`."""

    __slots__ = ("_arms", "_draw", "_shadowed", "_sink", "_tokens")

    def __init__(self, arms: AliasArms, draw: Draw, *, may_shadow: bool) -> None:
        self._arms = arms
        self._draw = draw
        self._sink: ObservedSink | None = None
        self._shadowed = may_shadow and arms.shadow is not None and draw.arm == "stable" and arms.sampling.take()
        self._tokens = 0.0

    def leased(self, lease: Lease) -> None:
        """Record how much has to be read before the first token."""
        self._tokens = lease.in_flight.tokens + lease.in_flight.tokens_ahead

    def observe(self, sink: Sink) -> Sink:
        """Put an observer in front of the client; only answers that count, or are shadowed, are looked at."""
        if not self._draw.counts and not self._shadowed:
            return sink
        self._sink = ObservedSink(sink)
        return self._sink

    def ended(self, context: RequestContext) -> None:
        """Count what became of the request."""
        content = None if self._sink is None else self._sink.content()
        if self._shadowed and content is not None and context.stats.code == "200":
            self._offer(context.inference, content)
        if not self._draw.counts:
            return
        expected = self._arms.expected_first_token_seconds(self._tokens)
        self._arms.collection.ended(self._draw, outcome_of(context, content, expected))

    def _offer(self, inference: InferenceRequest, content: Content) -> None:
        messages, shadow = inference.fields.get("messages"), self._arms.shadow
        if messages is not None and shadow is not None and not content.calls:
            thought = f"<think>\n{content.reasoning}\n</think>\n\n" if content.reasoning else ""
            shadow.offer(Sample(bytes(messages), thought + content.text))


class ObservedSink:
    """Passes an answer on, and keeps a copy of it while it is not too long; implements `Sink`."""

    __slots__ = ("_copy", "_sink", "_too_long")

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._copy = bytearray()
        self._too_long = False

    def content(self) -> Content | None:
        """What was sent; None if it was too long, or not in a known form."""
        return None if self._too_long or not self._copy else read_content(bytes(self._copy))

    @property
    def write_paused(self) -> bool:
        """Whether the client reads slower than the gateway writes."""
        return self._sink.write_paused

    def send(self, body: bytes) -> None:
        """Send a whole answer."""
        self._keep(body)
        self._sink.send(body)

    def begin(self) -> str | None:
        """Forget an earlier attempt."""
        self._copy.clear()
        return self._sink.begin()

    def hold(self, openers: bytes) -> None:
        """Keep openers until there is content."""
        self._sink.hold(openers)

    def write(self, events: bytes) -> None:
        """Send events."""
        self._keep(events)
        self._sink.write(events)

    def end(self) -> None:
        """End a complete stream."""
        self._sink.end()

    async def drain(self) -> None:
        """Wait until the client has read enough."""
        await self._sink.drain()

    def _keep(self, data: bytes) -> None:
        if len(self._copy) + len(data) > MAX_OBSERVED_BYTES:
            self._too_long = True
            self._copy.clear()
        elif not self._too_long:
            self._copy += data


def outcome_of(context: RequestContext, content: Content | None, expected_seconds: float) -> Outcome:
    """What a request is evidence of; `expected_seconds` is what the old variant would need to its first token."""
    stats, inference = context.stats, context.inference
    events = set()
    if context.failures or is_server_error(stats.code):
        events.add("errors")
    complete = stats.code == "200"
    if complete and FINISH_REASONS.get(stats.finish) == "length":
        events.add("cut_by_length")
    if complete and content is not None:
        events |= content.events
    values = _times(stats, inference, expected_seconds, complete=complete)
    if complete:
        values |= _lengths(stats, inference, content)
    return Outcome(frozenset(events), values)


def is_server_error(code: str) -> bool:
    """Whether a request failed by no fault of its client: by its status, or by the error code of a broken stream."""
    return int(code) >= SERVER_ERRORS if code.isdigit() else code != CLIENT_CLOSED_REQUEST


def _times(
    stats: RequestStats, inference: InferenceRequest, expected_seconds: float, *, complete: bool
) -> dict[str, float]:
    values = {}
    first = stats.first_token_seconds
    if first is not None:
        values["first_token_seconds"] = logarithm((first - stats.queued_seconds) / expected_seconds)
        between = seconds_between_tokens(stats.last_event_at - stats.started_at - first, stats.token_events)
        if between is not None:
            values["token_seconds"] = logarithm(between)
    elif complete and stats.sent_at is not None:
        _, answer_tokens = stats.lengths(inference.stream)
        if answer_tokens:
            values["token_seconds"] = logarithm((stats.clock() - stats.sent_at) / answer_tokens)
    return values


def seconds_between_tokens(seconds: float, events: int) -> float | None:
    """The mean time between the events of a stream that took so long; None if it says nothing of the engine."""
    between = seconds / (events - 1) if events > 1 else 0.0
    return between if between >= READ_TOGETHER_SECONDS else None


def _lengths(stats: RequestStats, inference: InferenceRequest, content: Content | None) -> dict[str, float]:
    _, tokens = stats.lengths(inference.stream)
    if not tokens:
        return {}
    reasoning = stats.usage.reasoning if stats.usage is not None else 0
    if not reasoning and content is not None and content.reasoning:
        # Engines that don't count them: by the share of characters.
        reasoning = round(tokens * len(content.reasoning) / (len(content.reasoning) + len(content.text)))
    values = {"answer_tokens": logarithm(1 + max(tokens - reasoning, 0))}
    return values | ({"reasoning_tokens": logarithm(1 + reasoning)} if reasoning else {})
