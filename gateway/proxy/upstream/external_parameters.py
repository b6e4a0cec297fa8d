"""Which parameters external models have, by litellm."""

import logging
from dataclasses import dataclass, field
from typing import Any

from config.external import ExternalModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ParameterTable:
    """Looks each model up once."""

    litellm: Any
    _known: dict[str, frozenset[str] | None] = field(default_factory=dict, repr=False)

    def of(self, model: ExternalModel) -> frozenset[str] | None:
        """The parameters of chats that a model has; None if litellm does not know the provider."""
        if model.name not in self._known:
            self._known[model.name] = self._look_up(model)
        return self._known[model.name]

    def _look_up(self, model: ExternalModel) -> frozenset[str] | None:
        try:
            names = self.litellm.get_supported_openai_params(model=model.name)
        except Exception as error:  # noqa: BLE001 - litellm raises any exception of its providers' code
            log.debug("no parameters of %s: %s", model.name, error)
            return None
        return None if names is None else frozenset(names)
