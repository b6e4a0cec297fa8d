"""The queries of dashboards and rules: what they are, which metrics they read, and which parts must have data."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import promql_parser as promql
import yaml

from tests.fakes.running import ROOT

GRAFANA, PROMETHEUS = ROOT / "deploy" / "grafana", ROOT / "deploy" / "prometheus"
DASHBOARDS = tuple(sorted((GRAFANA / "dashboards").glob("*.json")))
RULES = tuple(sorted((PROMETHEUS / "rules").glob("*.yml")))
# What Grafana replaces in a query; `All` of a variable is a pattern.
GRAFANA_VARIABLES = MappingProxyType({"__rate_interval": "10s", "__interval": "10s", "__range": "60s"})
COMPARISONS = frozenset({"==", "!=", ">", "<", ">=", "<="})
SETS = frozenset({"and", "or", "unless"})
SUFFIXES = re.compile(r"_(bucket|sum|count)$")


@dataclass(frozen=True, slots=True)
class Query:
    """One query, and where it is: the panel of a dashboard, an annotation, or a rule.

    A condition is empty while nothing is wrong.
    """

    place: str
    text: str
    condition: bool = False

    def parsed(self) -> promql.Expr:
        """Parse it, with values instead of Grafana's variables."""
        return promql.parse(self.text)


def read_dashboard(path: Path) -> dict[str, Any]:
    """Read a dashboard."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the panels, also those in collapsed rows, without the rows."""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            yield from panel["panels"]
        else:
            yield panel


def dashboard_queries(path: Path) -> Iterator[Query]:
    """Yield every query of a dashboard as Prometheus gets it: those of panels, variables and annotations."""
    dashboard = read_dashboard(path)
    for panel in panels(dashboard):
        for target in panel["targets"]:
            yield Query(f"{path.stem}: {panel['title']}: {target['refId']}", with_values(target["expr"]))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
            yield Query(f"{path.stem}: ${variable['name']}", f"group by ({label}) ({with_values(series)})")
    for annotation in dashboard["annotations"]["list"]:
        yield Query(f"{path.stem}: {annotation['name']}", with_values(annotation["expr"]), condition=True)


def rule_queries() -> Iterator[Query]:
    """Yield the expression of every rule."""
    for rule in rules():
        yield Query(rule.get("alert") or rule["record"], rule["expr"], condition="alert" in rule)


def rules() -> list[dict[str, Any]]:
    """Return all recording rules and alerts."""
    documents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in RULES]
    return [rule for document in documents for group in document["groups"] for rule in group["rules"]]


def with_values(text: str) -> str:
    """Replace Grafana's variables."""
    return re.sub(r"\$(?:(\w+)|\{(\w+)\})", lambda match: GRAFANA_VARIABLES.get(match[1] or match[2], ".*"), text)


def selectors(expression: promql.Expr) -> list[promql.VectorSelector]:
    """Return every selector of series in an expression."""
    found: list[promql.VectorSelector] = []

    def visit(node: promql.Expr) -> bool:
        if isinstance(node, promql.VectorSelector):
            found.append(node)
        elif isinstance(node, promql.MatrixSelector):
            found.append(node.vector_selector)
        return True

    promql.walk(expression, visit)
    return found


def parts_with_data(query: Query) -> list[str]:
    """Return what must have values even while nothing is wrong: of conditions, what they compare and combine."""
    return [part.prettify() for part in _operands(query.parsed())] if query.condition else [query.text]


def _operands(expression: promql.Expr) -> Iterator[promql.Expr]:
    if isinstance(expression, promql.ParenExpr):
        yield from _operands(expression.expr)
    elif isinstance(expression, promql.BinaryExpr) and str(expression.op) in COMPARISONS | SETS:
        yield from _operands(expression.lhs)
        yield from _operands(expression.rhs)
    elif isinstance(expression, promql.Call) and expression.func.name == "absent":
        yield expression.args[0]
    else:
        yield expression
