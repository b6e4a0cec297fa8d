"""Who asks, and how far its key reaches."""

from dataclasses import dataclass

from config.schema import NO_FLOOR, Floor
from gateway.errors import NotAllowed


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key; a limit that is None isn't there, and `name` is None where no keys are configured."""

    name: str | None = None
    aliases: frozenset[str] | None = None  # aliases and variants that it may use; None: all
    floor: Floor = NO_FLOOR
    max_tokens: int | None = None  # of one answer
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    may: frozenset[str] = frozenset()  # guarded engine fields that it may send

    def allows(self, model: str) -> bool:
        """Tell whether it may use a model name."""
        return self.aliases is None or model in self.aliases

    def check_model(self, model: str) -> None:
        """NotAllowed unless it may use a model name; ask before looking the name up, so that none is given away."""
        if not self.allows(model):
            names = ", ".join(sorted(self.aliases or ())) or "none"
            raise NotAllowed(
                f"the key {self.name!r} may not use the model {model[:100]!r}; it may use: {names}", param="model"
            )


# Deny by default: who needs no key may use all models, but no guarded field.
ANONYMOUS = Caller()
