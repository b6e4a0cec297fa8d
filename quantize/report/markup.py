"""HTML and SVG from nested calls; plain text is escaped, so that nobody can forget it."""

from html import escape

_VOID = frozenset({"meta", "br", "hr"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


Child = str | float | None


def element(name: str, /, *children: Child, **attributes: Child) -> Markup:
    """Build `<name ...>children</name>`; None is left out, `aria_label` becomes `aria-label`, `class_` `class`."""
    told = "".join(
        f' {_attribute(key)}="{escape(str(value))}"' for key, value in attributes.items() if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{told}>")
    return Markup(f"<{name}{told}>{joined(*children)}</{name}>")


def joined(*children: Child) -> Markup:
    """Put parts one after another."""
    return Markup(
        "".join(child if isinstance(child, Markup) else escape(str(child)) for child in children if child is not None)
    )


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
