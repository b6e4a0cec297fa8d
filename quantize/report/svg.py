"""A matplotlib figure as an `<svg>` element inside an HTML page.

Colours are those of the page's style sheet, so that they follow its dark mode; text stays text.
"""

import io
import re
from xml.etree import ElementTree as ET

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

# Distinguishable with any colour vision (Okabe and Ito). report.css names them --c0 to --c7 and has dark variants.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#9a4d8e", "#b58900", "#56a0d3", "#6b5b3e", "#444c56")
TEXT, RULE, HOLLOW = "#1b1f24", "#d8dee4", "#f6f7f9"
_VARIABLES = {color: f"var(--c{number})" for number, color in enumerate(COLORS)} | {
    TEXT: "var(--text)",
    RULE: "var(--rule)",
    HOLLOW: "var(--panel)",
}
# Text instead of glyph outlines, and ids that don't change from run to run.
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "quantgate", "font.family": ["DejaVu Sans"]}
_FONT_FAMILY = re.compile(r"font-family: [^;]*(; |$)")
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def inline_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """Render a figure as an accessible `<svg>` whose ids begin with `name`; equal figures give equal markup."""
    output = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(output, format="svg", transparent=True, metadata=_NO_METADATA)
    drawing = ET.fromstring(output.getvalue())  # noqa: S314 - written by matplotlib just now
    _adapt(drawing, name)
    svg = ET.Element(
        "svg",
        {"viewBox": drawing.get("viewBox", ""), "role": "img", "aria-labelledby": f"{name}-title {name}-desc"},
    )
    ET.SubElement(svg, "title", {"id": f"{name}-title"}).text = title
    ET.SubElement(svg, "desc", {"id": f"{name}-desc"}).text = description
    svg.extend(drawing)
    return Markup(ET.tostring(svg, encoding="unicode"))  # noqa: S704 - ElementTree escapes text and attributes


def _adapt(drawing: ET.Element, name: str) -> None:
    """Leave fonts and colours to the page; remove namespaces, clipping and unreferenced ids, and prefix the others."""
    for element in drawing.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: value for key, value in element.attrib.items() if key != "clip-path"}
    for parent in list(drawing.iter()):
        for child in [child for child in parent if child.tag in ("style", "clipPath")]:
            parent.remove(child)
    targets = {href[1:] for element in drawing.iter() if (href := element.get("href"))}
    for element in drawing.iter():
        if href := element.get("href"):
            element.set("href", f"#{name}-{href[1:]}")
        identifier = element.attrib.pop("id", None)
        if identifier in targets:
            element.set("id", f"{name}-{identifier}")
        if style := element.get("style"):
            element.set("style", _page_style(style))


def _page_style(style: str) -> str:
    style = _FONT_FAMILY.sub("", style)
    for color, variable in _VARIABLES.items():
        style = style.replace(color, variable)
    return style
