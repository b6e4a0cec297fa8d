"""Every query of the dashboards and of the rules has data in a real Prometheus that scrapes a gateway with traffic."""

import math
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
import pytest_asyncio

from tests.deploy.observed import Observed, observed
from tests.deploy.prometheus import Prometheus, Series, program
from tests.deploy.promql import (
    DASHBOARDS,
    Query,
    dashboard_queries,
    panels,
    parts_with_data,
    read_dashboard,
    rule_queries,
    with_values,
)
from tests.fakes.running import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")
SAMPLES = 5


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scraped(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Observed]:
    """A gateway under load, scraped several times; skipped where Prometheus is not installed."""
    executable = program("prometheus")
    if executable is None:
        pytest.skip("no Prometheus; `apt-get install prometheus` brings one")
    async with observed(executable, tmp_path_factory.mktemp("observed")) as everything:
        clients = everything.clients
        with clients.asking("qwq-32b", 8), clients.asking("assistant", 3, "batch"), clients.asking("int4", 1):
            assert await clients.ask("exact") == 503
            assert await clients.ask("nothing") == 404
            assert await clients.ask("qwq-32b", "wrong") == 401
            await everything.start_rollout()
            await eventually(lambda: _enough(everything.prometheus))
            yield everything


async def _enough(prometheus: Prometheus) -> bool:
    scrapes = await prometheus.query("min(count_over_time(up[1m]))")
    drawn = await prometheus.query('rate(quantgate_rollout_conversations_total{arm="canary"}[10s]) > 0')
    return bool(scrapes and drawn) and float(scrapes[0]["value"][1]) >= SAMPLES


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
async def test_every_panel_has_data(scraped: Observed, path: Path) -> None:
    """Each query of panels, variables and annotations gives values that are numbers."""
    assert await _without_data(scraped.prometheus, dashboard_queries(path)) == []


async def test_every_rule_has_data(scraped: Observed) -> None:
    """What rules compare, combine and record has values, so that an alert can fire."""
    assert await _without_data(scraped.prometheus, rule_queries()) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
async def test_legends_and_states_are_complete(scraped: Observed, path: Path) -> None:
    """The labels that legends show are in the results, and each number of a state has a name."""
    for panel in panels(read_dashboard(path)):
        for target in panel["targets"]:
            series = await scraped.prometheus.query(with_values(target["expr"]))
            labels = {label for each in series for label in each["metric"]}
            shown = {part.partition("}}")[0] for part in target.get("legendFormat", "").split("{{")[1:]}
            assert shown <= labels, panel["title"]
            if panel["type"] == "state-timeline":
                names = panel["fieldConfig"]["defaults"]["mappings"][0]["options"]
                assert {each["value"][1] for each in series} <= names.keys(), panel["title"]


async def test_alerts(scraped: Observed) -> None:
    """The rules work as a whole: what is wrong here becomes an alert, and what works does not."""
    wrong = {"QuantgateReplicaDown", "QuantgateCertificateExpires"}

    async def found() -> dict[str, str] | None:
        alerts = await scraped.prometheus.alerts()
        return alerts if wrong <= alerts.keys() else None

    works = {"GatewayDown", "MetricsAbsent", "VariantDown", "EngineMetricMissing", "StateDatabaseDown", "RolloutFailed"}
    assert not {f"Quantgate{name}" for name in works} & (await eventually(found)).keys()


async def _without_data(prometheus: Prometheus, queries: Iterable[Query]) -> list[str]:
    """The queries without any number."""
    parts = [(query.place, part) for query in queries for part in parts_with_data(query)]
    return [f"{place}: {part}" for place, part in parts if not _numbers(await prometheus.query(part))]


def _numbers(series: Series) -> list[float]:
    values = [float(each["value"][1]) for each in series]
    return [value for value in values if math.isfinite(value)]
