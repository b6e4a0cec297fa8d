"""Which class of transformers a base is loaded as: its language model, with all parts of a multimodal one."""

from typing import Any


def model_class(config: Any) -> Any:
    """Give the class for a transformers config, None if transformers has none that generates text.

    A multimodal model is loaded whole, so that its tensors keep their names; text alone doesn't touch the other parts.
    """
    from transformers.models.auto import modeling_auto as auto  # noqa: PLC0415

    mappings = [auto.MODEL_FOR_CAUSAL_LM_MAPPING]
    if "text_config" in config.sub_configs:
        mappings = [auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, auto.MODEL_FOR_MULTIMODAL_LM_MAPPING, *mappings]
    for mapping in mappings:
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None
