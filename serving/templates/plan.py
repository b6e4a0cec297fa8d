"""Decide how the servers of a variant handle thinking, from the settings of its aliases."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path

from config.schema import AliasSettings
from config.variant import Variant
from serving.arguments import option
from serving.errors import LaunchRefused
from serving.replica import Launch, Thinking
from serving.templates.capabilities import TemplateCapabilities, template_capabilities
from serving.templates.derive import TemplateRequirements, derived
from serving.templates.render import TemplateUnusable
from serving.templates.source import END_THINK, THINK, chosen_template, has_tokens, read_chat_template

# Right for QwQ, R1-distill and Qwen3 alike, with or without an injected tag, and the only one that reads text.
PARSER = "qwen3"
# These look for token ids, and the server doesn't start without them (vllm/reasoning/basic_parsers.py of 0.32).
PARSERS_OF_TOKENS = ("deepseek_r1", "k2_horizon", "poolside_v1")


def with_thinking(launches: Iterable[Launch], aliases: Mapping[str, AliasSettings], folder: Path) -> tuple[Launch, ...]:
    """Set how the server of each launch handles thinking; see `plan_thinking`."""
    return tuple(
        replace(each, thinking=plan_thinking(aliases, each.variant, folder, each.settings.args)) for each in launches
    )


def plan_thinking(
    aliases: Mapping[str, AliasSettings], variant: Variant, folder: Path, args: Sequence[str] = ()
) -> Thinking:
    """Return how servers of a variant are started, so that each of its aliases gets the thinking that it configures.

    A derived template is written to `folder`. What `args` name (a parser, a template) is the operator's own choice.
    LaunchRefused: no template can be derived, or the chosen parser needs tokens that the model lacks.
    """
    if variant.path is None:
        return Thinking()
    _refuse_missing_tokens(variant.name, variant.path, args)
    wanted = {alias.think for alias in aliases.values() if not variant.names.isdisjoint(alias.ladder)}
    chosen = option(args, "--chat-template")
    template = chosen_template(read_chat_template(variant.path), chosen)
    try:
        thinking, requirements = decide(template_capabilities(template), wanted)
        if requirements is not None:
            _refuse_chosen(variant.name, chosen, requirements)
            thinking = replace(
                thinking, template=write_template(folder, variant.name, requirements, derived(template, requirements))
            )
    except TemplateUnusable as error:
        if wanted & {"prefix", "none"}:
            raise LaunchRefused(
                f"{variant.name}: {variant.path}: no chat template supports the `think` of its aliases: {error}; "
                "fix the template, or set think: auto"
            ) from error
        # vLLM may be able to render it; the replica's prompts are checked when it runs.
        thinking = Thinking(tag=None if template.mentions_thinking else "none")
    chooses_parser = thinking.tag == "none" or option(args, "--reasoning-parser") is not None
    return replace(thinking, parser=None if chooses_parser else PARSER)


def decide(own: TemplateCapabilities, wanted: AbstractSet[str]) -> tuple[Thinking, TemplateRequirements | None]:
    """Return how to start, without parser and file, and what a derived template must do; None if none is needed."""
    prefix = "prefix" in wanted
    thinks = prefix or own.tag != "none"
    enable = prefix if own.off_by_default else None
    requirements = TemplateRequirements(
        prefix=prefix and own.tag != "injected", off="none" in wanted and thinks and not own.switch
    )
    switch = thinks and (own.switch or requirements.off)
    thinking = Thinking(enable_thinking=enable, tag="injected" if prefix else own.tag, switch=switch)
    return thinking, requirements if requirements.prefix or requirements.off else None


def write_template(folder: Path, variant: str, requirements: TemplateRequirements, text: str) -> Path:
    """Write a derived template to a file named by variant, requirements and digest, unless it exists."""
    content = text.encode()
    digest = hashlib.sha256(content).hexdigest()[:12]
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', variant)}-{requirements.name}-{digest}.jinja"
    try:
        if path.exists() and path.read_bytes() == content:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        draft.write_bytes(content)
        draft.replace(path)
    except OSError as error:
        raise LaunchRefused(f"{variant}: its chat template can't be written to {folder}: {error}") from error
    return path


def _refuse_missing_tokens(name: str, path: Path, args: Sequence[str]) -> None:
    parser = option(args, "--reasoning-parser")
    if parser in PARSERS_OF_TOKENS and not has_tokens(path, THINK, END_THINK):
        raise LaunchRefused(
            f"{name}: {path}: parser {parser!r} needs {THINK} and {END_THINK} as single tokens, "
            f"which this tokenizer lacks; leave --reasoning-parser out, {PARSER!r} reads text"
        )


def _refuse_chosen(name: str, chosen: str | None, requirements: TemplateRequirements) -> None:
    if chosen is not None:
        setting = "prefix" if requirements.prefix else "none"
        raise LaunchRefused(
            f"{name}: an alias has think: {setting}, which needs a chat template derived from the model's own, "
            "but the replica's args name another --chat-template; remove one of the two"
        )
