"""Counters that exist at 0 from the start, for every configured alias and variant.

`increase` and `rate` of Prometheus do not see the first step of a series that appears with it: an alert on the first
error, or the first spill, of an alias needs the series before. Of label values that the configuration does not name,
the usual ones are created: chat completions that succeed.
"""

from collections.abc import Iterable, Iterator

from config.variant import Variant
from gateway.errors import GatewayError, UpstreamError
from gateway.observability.metrics import UNKNOWN, Metrics
from gateway.observability.metrics.instruments import Counter, Family
from gateway.openai.endpoints import CHAT
from gateway.routing.target import Catalog, Target

# `cause_of` in gateway/rollout/controller.py.
ROLLBACK_CAUSES = ("preflight", "starting", "smoke", "shadow", "gate", "deadline", "operator")

Series = tuple[Family[Counter], tuple[str, ...]]


def create_series(metrics: Metrics, catalog: Catalog, keys: Iterable[str] = ()) -> None:
    """Create the counters of all aliases, and of API keys if they are counted; those that exist keep their value."""
    for family, labels in _series(metrics, catalog, keys):
        family.exists(*labels)


def rejection_reasons() -> frozenset[str]:
    """Every value of the label `reason` of quantgate_rejections_total."""
    return frozenset(error.metric_reason for error in _subclasses(GatewayError))


def _series(metrics: Metrics, catalog: Catalog, keys: Iterable[str]) -> Iterator[Series]:
    yield metrics.clients_cut, ("slow_reader",)
    for outcome in ("applied", "refused", "failed"):
        yield metrics.reloads, (outcome,)
    for alias in (UNKNOWN, *catalog.aliases):
        for reason in rejection_reasons():
            yield metrics.rejections, (alias, reason)
    for alias in catalog.aliases:
        target = catalog.resolve(alias)
        yield from _of_failures(metrics, alias)
        yield from _of_ladder(metrics, target)
        for number, rung in enumerate(target.permitted):
            yield from _of_rung(metrics, alias, rung, "spill" if number else "preferred")
    for key in keys if metrics.per_key else ():
        yield metrics.key_requests, (key, "200")
        yield metrics.key_tokens, (key, "prompt")
        yield metrics.key_tokens, (key, "completion")


def _of_failures(metrics: Metrics, alias: str) -> Iterator[Series]:
    yield metrics.floor_rejections, (alias,)
    for code in {error.code for error in _subclasses(UpstreamError)}:
        yield metrics.retries, (alias, code)
    for reason in ("poison", "attempts", "budget"):
        yield metrics.retries_refused, (alias, reason)
    for cause in ROLLBACK_CAUSES:
        yield metrics.rollout_rollbacks, (alias, cause)


def _of_ladder(metrics: Metrics, target: Target) -> Iterator[Series]:
    """What only a ladder of several rungs has."""
    for rung in target.permitted[:-1]:
        yield metrics.ladder_switches, (target.name, rung.name, "spill")
        yield metrics.ladder_switches, (target.name, rung.name, "return")
    for rung in target.permitted[1:]:
        yield metrics.spills, (target.name, rung.name)
    for direction in ("up", "down") if len(target.permitted) > 1 else ():
        yield metrics.session_moves, (target.name, direction)


def _of_rung(metrics: Metrics, alias: str, rung: Variant, reason: str) -> Iterator[Series]:
    served = (alias, rung.name, rung.precision)
    yield metrics.requests, (*served, CHAT.name, "200", reason)
    for kind in ("prompt", "completion", "reasoning"):
        yield metrics.tokens, (*served, kind)
    if rung.is_external:
        yield metrics.external_cost_usd, (alias, rung.name)


def _subclasses(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _subclasses(child)
