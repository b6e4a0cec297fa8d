"""What a request to an external model costs: reserved while it runs, booked at its end."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from config.external import ExternalModel
from gateway.openai.external_answer import token_count
from gateway.openai.external_estimate import TOKENS_PER_SECOND, answer_tokens_limit, prompt_tokens
from gateway.proxy.upstream.protocol import UpstreamRequest
from serving.replica import Replica

log = logging.getLogger(__name__)

# A request that litellm has not reported as sent by then is taken for sent.
PREPARE_SECONDS = 1.0


class Spending(Protocol):
    """Who counts US dollars of variants against their budgets."""

    def reserve(self, variant: str, usd: float) -> None:
        """Count what a request may cost while it runs."""

    def settle(self, variant: str, reserved_usd: float, usd: float) -> None:
        """Count what it has cost instead."""


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Configured prices, else litellm's."""

    litellm: Any

    def cost_usd(self, model: ExternalModel, usage: Mapping[str, Any]) -> float:
        """What an answer costs; 0 if there is no price."""
        prompt, completion = token_count(usage, "prompt_tokens"), token_count(usage, "completion_tokens")
        if model.price is not None:
            return model.price.cost_usd(prompt, completion)
        details = usage.get("prompt_tokens_details")
        cached = token_count(details, "cached_tokens") if isinstance(details, dict) else 0
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "cache_read_input_tokens": cached}
        try:
            return float(sum(self.litellm.cost_per_token(model=model.name, **counts)))
        except Exception as error:  # noqa: BLE001 - litellm raises plain Exception for a model that is not in its table
            log.debug("no price for %s: %s", model.name, error)
            return 0.0

    def context_tokens(self, model: ExternalModel) -> int | None:
        """The longest prompt that a model takes; None if that is not known."""
        table = self.litellm.model_cost
        entry = table.get(model.name) or table.get(model.name.partition("/")[2]) or {}
        limit = entry.get("max_input_tokens")
        return limit if isinstance(limit, int) else None


class Charge:
    """One request's share of a budget: its estimate while it runs, its cost once it has ended.

    `fields` are what the provider gets. `sent`: litellm has reported that it sends the request, or has answered.
    """

    def __init__(
        self,
        prices: PriceTable,
        spending: Spending,
        request: UpstreamRequest,
        replica: Replica,
        fields: Mapping[str, Any],
    ) -> None:
        assert replica.external is not None
        self.sent = False
        self._prices = prices
        self._spending = spending
        self._request = request
        self._variant = replica.variant
        self._model = replica.external
        self._clock = asyncio.get_running_loop().time
        self._began_at = self._clock()
        self._prompt_tokens = prompt_tokens(fields)
        if (context_tokens := prices.context_tokens(self._model)) is not None:
            self._prompt_tokens = min(self._prompt_tokens, context_tokens)
        self._answer_limit = answer_tokens_limit(fields)
        usage = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._answer_limit or 0}
        self._reserved_usd = prices.cost_usd(self._model, usage)
        spending.reserve(self._variant, self._reserved_usd)

    def cancel(self) -> None:
        """End it without a cost: the provider has refused the request."""
        self._spending.settle(self._variant, self._reserved_usd, 0.0)

    def end(self, usage: Mapping[str, Any] | None, parts: int = 0) -> None:
        """Book what the answer has cost, for its request and for its model; None: it was not read to its end."""
        if usage is None and not self.was_sent():
            self.cancel()
            return
        cost_usd = self._prices.cost_usd(self._model, self._estimated_usage(parts) if usage is None else usage)
        self._request.book_cost(cost_usd)
        self._spending.settle(self._variant, self._reserved_usd, cost_usd)

    def was_sent(self) -> bool:
        """Whether the provider may have read the prompt."""
        return self.sent or self._clock() - self._began_at >= PREPARE_SECONDS

    def _estimated_usage(self, parts: int) -> Mapping[str, Any]:
        tokens = 0
        if self._request.inference.endpoint.generates:
            tokens = max(parts, int((self._clock() - self._began_at) * TOKENS_PER_SECOND))
        if self._answer_limit is not None:
            tokens = min(tokens, max(self._answer_limit, parts))
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": tokens}
