"""The authenticated caller of a request, with the limits of its API key."""

from dataclasses import dataclass

from config.schema import NO_FLOOR, Floor
from gateway.errors import NotAllowed


@dataclass(frozen=True, slots=True)
class Caller:
    """Name and limits of an API key. A limit of None does not apply; `name` is None if no keys are configured."""

    name: str | None = None
    aliases: frozenset[str] | None = None  # models (aliases and variants) it may use; None: all
    floor: Floor = NO_FLOOR
    max_tokens: int | None = None  # of one response
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    may: frozenset[str] = frozenset()  # guarded engine fields it may send

    def allows(self, model: str) -> bool:
        """Whether the caller may use a model name."""
        return self.aliases is None or model in self.aliases

    def check_model(self, model: str) -> None:
        """Raise NotAllowed unless the caller may use a model name.

        Called before the name is looked up: the response does not reveal which names exist.
        """
        if not self.allows(model):
            names = ", ".join(sorted(self.aliases or ())) or "none"
            raise NotAllowed(
                f"the key {self.name!r} may not use the model {model[:100]!r}; it may use: {names}", param="model"
            )


# Without keys, every caller may use all models but no guarded field.
ANONYMOUS = Caller()
