"""Values: a model that another provider runs, and what it costs."""

from dataclasses import dataclass, field

from config.schema import PriceSettings, VariantSettings

TOKENS_PER_PRICE = 1_000_000
MASK = "**********"
MIN_SECRET_CHARACTERS = 8  # of a shorter one, any text would have parts


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per token."""

    prompt_usd: float
    completion_usd: float

    @classmethod
    def of(cls, settings: PriceSettings) -> "Price":
        """Read it from the configuration, where it is per million tokens."""
        return cls(settings.prompt_usd / TOKENS_PER_PRICE, settings.completion_usd / TOKENS_PER_PRICE)

    def cost_usd(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd


@dataclass(frozen=True, slots=True)
class ExternalModel:
    """A model as litellm names it, `PROVIDER/MODEL`, and how it is asked; no text of it contains a secret.

    `usd_per_day` is its budget, None without one. `price` is None for that of litellm's table.
    """

    name: str
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    usd_per_day: float | None = None
    price: Price | None = None

    @property
    def address(self) -> str:
        """Where it is, for people: the address if the configuration has one, else its name."""
        return self.base_url or f"litellm:{self.name}"

    def masked(self, text: str) -> str:
        """Replace its secrets in a text that it did not write."""
        for secret in (self.api_key or "", *(value for _, value in self.credentials)):
            if len(secret) >= MIN_SECRET_CHARACTERS:
                text = text.replace(secret, MASK)
        return text


def external_model(settings: VariantSettings) -> ExternalModel | None:
    """Read the external model of a variant; None if it is none."""
    if settings.external is None:
        return None
    return ExternalModel(
        settings.external,
        settings.base_url,
        settings.api_key.get_secret_value() if settings.api_key else None,
        tuple(sorted([(name, value.get_secret_value()) for name, value in settings.credentials.items()])),
        settings.budget.usd_per_day if settings.budget else None,
        Price.of(settings.price) if settings.price else None,
    )
