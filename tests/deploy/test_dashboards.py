"""The committed dashboards are what the code generates, complete, and ask only for what exists."""

from itertools import chain, combinations
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest

from deploy.grafana.__main__ import files, main
from deploy.grafana.queries import ENGINE_METRICS, PROCESS_METRICS, TARGET_LABELS
from gateway.observability.metrics.spec import MetricSpec
from gateway.observability.metrics.table import TABLE
from tests.deploy.promql import (
    DASHBOARDS,
    SUFFIXES,
    Query,
    dashboard_queries,
    panels,
    read_dashboard,
    rule_queries,
    rules,
    selectors,
)

SPECS = {spec.name: spec for spec in TABLE}
RECORDED = {rule["record"] for rule in rules() if "record" in rule}
QUERIES = [*chain.from_iterable(map(dashboard_queries, DASHBOARDS)), *rule_queries()]
SHOWN = [(path.stem, panel) for path in DASHBOARDS for panel in panels(read_dashboard(path))]


def spec_of(name: str) -> MetricSpec | None:
    """The row of the table that a name in a query belongs to."""
    spec = SPECS.get(SUFFIXES.sub("", name))
    return spec if spec and (spec.type == "histogram") != (name == spec.name) else None


def test_the_files_are_generated() -> None:
    """What is committed is what the code generates; `python -m deploy.grafana` writes it."""
    assert main(["--check"]) == 0
    assert sorted(path for path, _ in files()) == sorted(DASHBOARDS)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_queries_ask_for_what_exists(query: Query) -> None:
    """Metrics are in the table, recorded, of the process or of vLLM; labels are those of the table."""
    for selector in selectors(query.parsed()):
        spec = spec_of(selector.name or "")
        if spec is None:
            assert selector.name in {*RECORDED, *PROCESS_METRICS, *ENGINE_METRICS, "up"}, query.place
        else:
            known = {*spec.labels, *TARGET_LABELS, *(("le",) if spec.buckets else ())}
            assert {matcher.name for matcher in selector.matchers.matchers} <= known, query.place


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.place)
def test_gauges_are_aggregated_over_workers_as_their_help_says(query: Query) -> None:
    """A gauge that is to be summed is not maximized, and the other way round."""
    found: list[tuple[str, str]] = []

    def visit(node: promql.Expr) -> bool:
        if isinstance(node, promql.AggregateExpr) and isinstance(node.expr, promql.VectorSelector):
            found.append((str(node.op), node.expr.name or ""))
        return True

    promql.walk(query.parsed(), visit)
    for operator, name in found:
        spec = spec_of(name)
        if spec is not None and spec.type == "gauge" and operator in ("sum", "max"):
            # A sum over replicas of a state, of which exactly one series is 1, counts replicas of one worker.
            assert ("Sum it over workers." in spec.help) == (operator == "sum"), query.place


@pytest.mark.parametrize("dashboard, panel", SHOWN, ids=lambda each: each if isinstance(each, str) else each["title"])
def test_panels_are_complete(dashboard: str, panel: dict[str, Any]) -> None:
    """Each has a description, a unit, queries, and the data source that the variable selects."""
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_fit_together(path: Path) -> None:
    """The uid is the file's name, ids are unique, panels do not overlap, links lead to all others."""
    dashboard = read_dashboard(path)
    assert dashboard["uid"] == path.stem
    assert "id" not in dashboard
    shown = [*panels(dashboard), *(panel for panel in dashboard["panels"] if panel["type"] == "row")]
    assert len({panel["id"] for panel in shown}) == len(shown)
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert not [pair for pair in combinations(places, 2) if overlap(*pair)]
    (link,) = dashboard["links"]
    assert (link["tags"], link["includeVars"], link["keepTime"]) == (dashboard["tags"], True, True)
    assert [variable["name"] for variable in dashboard["templating"]["list"]][:2] == ["datasource", "job"]


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    """Whether two places in the grid overlap."""
    return all(one[at] < other[at] + other[size] and other[at] < one[at] + one[size] for at, size in ("xw", "yh"))


def test_every_metric_is_on_a_dashboard() -> None:
    """Nothing that the gateway counts is invisible."""
    shown = {SUFFIXES.sub("", selector.name or "") for query in QUERIES for selector in selectors(query.parsed())}
    shown |= {selector.name or "" for query in QUERIES for selector in selectors(query.parsed())}
    assert SPECS.keys() - shown == set()
