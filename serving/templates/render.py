"""Chat template -> prompt, the way transformers and vLLM render it. For probes at start, never for a request."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


class TemplateUnusable(Exception):
    """A chat template can't be parsed, or fails on an ordinary chat."""


def renderer(template: str, special_tokens: Mapping[str, str] | None = None) -> Callable[..., str]:
    """Compile a template into `render(messages, add_generation_prompt=..., **kwargs)`; TemplateUnusable if it's broken.

    The environment is transformers' own (utils/chat_template_utils.py of 5.16): a template must see no difference.
    """
    from jinja2 import TemplateError  # noqa: PLC0415 - a fifth of a second that only a thinking model's replicas cost

    try:
        compiled = _environment().from_string(template)
    except TemplateError as error:
        raise TemplateUnusable(f"it can't be parsed: {error}") from error

    def render(messages: Sequence[Message], *, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        given = {**(special_tokens or {}), "tools": None, "documents": None, **kwargs, "messages": messages}
        try:
            return compiled.render(given, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise TemplateUnusable(f"it fails on a chat: {error}") from error

    return render


def _environment() -> "ImmutableSandboxedEnvironment":
    from jinja2 import TemplateError, nodes  # noqa: PLC0415 - as above
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.parser import Parser  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(Extension):
        """`{% generation %}` marks what was generated, for training; to a prompt it means nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own type

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment
