"""External models of the configuration: their entries in the registry, and what they cost.

==========  ==============================================  =========
state       event                                           next
==========  ==============================================  =========
ready       the cost of the day reaches the budget          stopped
ready       with what requests that run may cost it does    starting
starting    such a request ends, and has cost less          ready
stopped     a new day begins (UTC), or a larger budget      ready
stopped     litellm is not loaded: the next start           stopped
==========  ==============================================  =========

The cost of the day is kept in memory. `spent` is what all processes have spent before this one started, by variant:
a record of costs that outlives processes gives it here.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Self

from config.external import ExternalModel, external_model
from config.schema import Settings, VariantSettings
from config.variant import EXTERNAL
from gateway.errors import ReplicaFull, RequestError
from gateway.observability.metrics import Metrics
from gateway.openai.external_support import unsupported_field
from gateway.openai.request import InferenceRequest
from gateway.routing.budget import DaySpend, budget_reserved, budget_spent, day_of, seconds_left
from serving.registry import Registry
from serving.replica import EXTERNAL_MODELS, Replica, State

log = logging.getLogger(__name__)

NOT_LOADED = "litellm is loaded at the start only; restart the gateway"
MAX_TIMER_SECONDS = 3600.0  # the clock may be set meanwhile
NOTHING_SPENT: Mapping[str, float] = {}


def unknown_parameters(_: ExternalModel) -> Collection[str] | None:
    """None: nobody knows which parameters a model has."""
    return None


class ExternalModels:
    """Owns the registry's entries of external models while the `with` block runs.

    `share` is this process's part of each budget, and of what was spent. `loaded`: there is an upstream for them.
    `parameters` are those of chats that a model has, None if they are not known.
    """

    def __init__(
        self,
        registry: Registry,
        metrics: Metrics,
        *,
        loaded: bool,
        share: float = 1.0,
        spent: Mapping[str, float] = NOTHING_SPENT,
        parameters: Callable[[ExternalModel], Collection[str] | None] = unknown_parameters,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = registry.source(EXTERNAL_MODELS)
        self._metrics = metrics
        self._loaded = loaded
        self._share = share
        self._parameters = parameters
        self._wall_clock = wall_clock
        self._replicas: dict[str, Replica] = {}  # by variant
        self._spends = {variant: DaySpend(self._today(), usd * share) for variant, usd in spent.items()}
        self._reserved: dict[str, float] = {}  # US dollars, by variant
        self._running = Counter[str]()
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._source.keep_only(())

    def __repr__(self) -> str:
        return f"<ExternalModels {', '.join(self._replicas) or 'none'}>"

    def replace(self, replicas: tuple[Replica, ...]) -> None:
        """Have these models from now on; what others have cost today is kept in case they return."""
        self._replicas = {replica.variant: replica for replica in replicas}
        self._source.keep_only({replica.id for replica in replicas})
        for variant in self._replicas:
            self._update(variant)
        if self._timer is None and self._replicas:
            self._set_timer()

    def unsupported(self, variant: str, inference: InferenceRequest) -> RequestError | None:
        """Return why a model can't answer a request as asked; None if it can."""
        replica = self._replicas.get(variant)
        if replica is None or replica.external is None:
            return None
        name = unsupported_field(inference, self._parameters(replica.external))
        if name is None:
            return None
        what = f"{name!r} is not supported by {variant!r} as it is sent: the model is external, and would not see it"
        return RequestError(what, param=name, code="unsupported")

    def available(self, replicas: tuple[Replica, ...]) -> frozenset[str]:
        """The variants of models that would be ready at once, were they configured."""
        if not self._loaded:
            return frozenset()
        return frozenset([each.variant for each in replicas if not self._exhausted(each, 0.0)])

    def reserve(self, variant: str, usd: float) -> None:
        """Count what a request may cost while it runs; ReplicaFull if others may cost all that is left."""
        replica, reserved_usd = self._replicas.get(variant), self._reserved.get(variant, 0.0)
        if replica is not None and reserved_usd and self._exhausted(replica, reserved_usd):
            raise ReplicaFull  # it was leased in the same step as they were
        self._reserved[variant] = self._reserved.get(variant, 0.0) + usd
        self._running[variant] += 1
        if usd:
            self._updated(variant)

    def settle(self, variant: str, reserved_usd: float, usd: float) -> None:
        """Add the cost of an answer in place of what it reserved; when the budget is spent, the model gets no more."""
        self._running[variant] -= 1
        # Without requests nothing is reserved, whatever the sum of fractions says.
        self._reserved[variant] = self._reserved[variant] - reserved_usd if self._running[variant] else 0.0
        self._spends[variant] = self._spends.get(variant, DaySpend()).plus(usd, self._today())
        self._updated(variant)

    def _updated(self, variant: str) -> None:
        if variant in self._replicas:
            self._update(variant)

    def _update(self, variant: str) -> None:
        replica, today = self._replicas[variant], self._today()
        assert replica.external is not None
        spend, limit = self._spends.get(variant, DaySpend()).on(today), self._limit(replica.external)
        self._metrics.external_spent_usd.labels(variant).value = spend.usd
        if limit is not None:
            self._metrics.external_budget_usd.labels(variant).value = limit
        if not self._loaded:
            self._source.put(replica, State.STOPPED, NOT_LOADED)
        elif limit is not None and spend.exhausts(limit, today):
            reason = budget_spent(limit, today)
            log.warning("%s: %s", replica.id, reason)
            self._source.put(replica, State.STOPPED, reason)
        elif limit is not None and self._exhausted(replica, self._reserved.get(variant, 0.0)):
            self._source.put(replica, State.STARTING, budget_reserved(limit))
        else:
            self._source.put(replica, State.READY)

    def _exhausted(self, replica: Replica, reserved_usd: float) -> bool:
        assert replica.external is not None
        spend, today = self._spends.get(replica.variant, DaySpend()), self._today()
        return spend.plus(reserved_usd, today).exhausts(self._limit(replica.external), today)

    def _limit(self, model: ExternalModel) -> float | None:
        return None if model.usd_per_day is None else model.usd_per_day * self._share

    def _today(self) -> int:
        return day_of(self._wall_clock())

    def _set_timer(self) -> None:
        delay_seconds = min(seconds_left(self._wall_clock()), MAX_TIMER_SECONDS)
        self._timer = asyncio.get_running_loop().call_later(delay_seconds, self._on_timer)

    def _on_timer(self) -> None:
        """Let models return whose budget is of another day."""
        for variant in self._replicas:
            self._update(variant)
        self._set_timer()


def external_model_replicas(variants: Mapping[str, VariantSettings]) -> tuple[Replica, ...]:
    """The external models of a configuration, each as one replica of its variant."""
    models = {name: model for name, settings in variants.items() if (model := external_model(settings)) is not None}
    return tuple(
        Replica(
            f"{name}-external",
            name,
            EXTERNAL,
            model.address,
            model.name,
            max_in_flight=variants[name].max_in_flight,
            tools=True,
            external=model,
        )
        for name, model in models.items()
    )


def external_ladders(settings: Settings) -> dict[str, tuple[str, ...]]:
    """The external variants of each alias, for `gateway.routing.budget.spent_by_variant`."""
    external = {name for name, variant in settings.variants.items() if variant.external is not None}
    return {
        name: tuple([rung for rung in alias.ladder if rung in external]) for name, alias in settings.aliases.items()
    }
