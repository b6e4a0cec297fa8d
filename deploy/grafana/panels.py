"""Panels and dashboards with the settings that all of ours share."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from grafana_foundation_sdk.builders import bargauge, common, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.queries import Queries
from gateway.observability.metrics import table as metrics
from gateway.observability.metrics.spec import MetricSpec

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
TAG = "quantgate"
WIDTH = 24
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "yellow", "orange", "red", "blue", "#808080"

# Units of Grafana; `suffix:` shows a text behind the number.
RATIO, SECONDS, COUNT, BYTES, REQUESTS = "percentunit", "s", "short", "bytes", "reqps"
TOKENS_PER_SECOND, PER_SECOND, US_DOLLARS = "suffix: tokens/s", "cps", "currencyUSD"

# Where the values of a variable come from.
_VALUES = MappingProxyType(
    {
        "alias": (metrics.REQUESTS, "Models that clients ask for: aliases, and variants by name."),
        "variant": (metrics.REPLICA_STATE, "Variants with replicas."),
        "replica": (metrics.REPLICA_STATE, "Replicas."),
        "instance": (metrics.BUILD_INFO, "Admin ports of the gateway's workers."),
    }
)

Target = prometheus.Dataquery
Stack = Literal["none", "normal"]


def target(expression: str, legend: str = "") -> Target:
    """A query over the time shown; `legend` may have labels: `{{alias}}`."""
    return Target().datasource(SOURCE).expr(expression).legend_format(legend or "value").range()


def row_target(expression: str) -> Target:
    """A query for one column of a table."""
    return Target().datasource(SOURCE).expr(expression).format(PromQueryFormat.TABLE).instant()


def graph(
    title: str,
    description: str,
    unit: str,
    *targets: Target,
    width: int = 8,
    stack: Stack = "none",
    limit: float | None = None,
    most: float | None = None,
    soft_least: float | None = None,
) -> timeseries.Panel:
    """Lines over time; `limit` draws a red line, `most` is the top of the axis.

    The axis begins at 0, or with `soft_least` there or at the least value.
    """
    panel = timeseries.Panel().title(title).description(description).datasource(SOURCE)
    panel = panel.targets([each.ref_id(name) for each, name in zip(targets, "ABCDEFGH", strict=False)])
    panel = panel.unit(unit).span(width).height(8).line_width(1).show_points(models.VisibilityMode.NEVER)
    panel = panel.fill_opacity(10 if stack == "none" else 60)
    panel = panel.stacking(common.StackingConfig().mode(models.StackingMode(stack)).group("A"))
    legend = common.VizLegendOptions().display_mode(models.LegendDisplayMode.LIST)
    panel = panel.legend(legend.placement(models.LegendPlacement.BOTTOM).show_legend(True).calcs(["lastNotNull"]))
    tooltip = common.VizTooltipOptions().mode(models.TooltipDisplayMode.MULTI).sort(models.SortOrder.DESCENDING)
    panel = panel.tooltip(tooltip)
    panel = panel.min(0) if soft_least is None else panel.axis_soft_min(soft_least)
    if most is not None:
        panel = panel.max(most)
    if limit is not None:
        line = common.GraphThresholdsStyleConfig().mode(models.GraphThresholdsStyleMode.DASHED)
        panel = panel.thresholds(thresholds((None, "transparent"), (limit, RED))).thresholds_style(line)
    return panel


def number(
    title: str, description: str, unit: str, query: Target, *steps: tuple[float | None, str], width: int = 3
) -> stat.Panel:
    """The last value, with its course; `steps` are colours from a value on."""
    panel = stat.Panel().title(title).description(description).datasource(SOURCE).with_target(query.ref_id("A"))
    panel = panel.unit(unit).span(width).height(4).no_value("none").thresholds(thresholds(*(steps or ((None, BLUE),))))
    panel = panel.graph_mode(models.BigValueGraphMode.AREA).color_mode(models.BigValueColorMode.VALUE)
    return panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def timeline(
    title: str, description: str, query: Target, states: Mapping[str, str], *, width: int = 24, height: int = 8
) -> statetimeline.Panel:
    """States over time; `states` has their colours, in the order of their numbers, which begin with 1."""
    named = {
        str(position): ValueMappingResult(text=state, color=color, index=position)
        for position, (state, color) in enumerate(states.items(), 1)
    }
    panel = statetimeline.Panel().title(title).description(description).datasource(SOURCE)
    panel = panel.with_target(query.ref_id("A")).unit(COUNT).span(width).height(height)
    panel = panel.mappings([ValueMap(options=named)]).thresholds(thresholds((None, GREY)))
    panel = panel.color_scheme(builders.FieldColor().mode(FieldColorModeId.THRESHOLDS))
    legend = common.VizLegendOptions().display_mode(models.LegendDisplayMode.LIST)
    legend = legend.placement(models.LegendPlacement.BOTTOM).show_legend(True)
    return panel.row_height(0.8).merge_values(True).show_value(models.VisibilityMode.AUTO).legend(legend)


def bars(
    title: str, description: str, unit: str, query: Target, *steps: tuple[float | None, str], width: int = 8
) -> bargauge.Panel:
    """The last value of each series as a bar."""
    panel = bargauge.Panel().title(title).description(description).datasource(SOURCE).with_target(query.ref_id("A"))
    panel = panel.unit(unit).span(width).height(8).thresholds(thresholds(*(steps or ((None, BLUE),))))
    panel = panel.orientation(models.VizOrientation.HORIZONTAL).display_mode(models.BarGaugeDisplayMode.BASIC)
    return panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))


def rows(
    title: str, description: str, key: str, columns: Mapping[str, tuple[str, Target]], *, height: int = 8
) -> table.Panel:
    """A table with a row per value of the label `key`; `columns` has the unit and the query of each column.

    The first query may have more labels, which are columns, too; each other one has `key` alone.
    """
    panel = table.Panel().title(title).description(description).datasource(SOURCE).span(WIDTH).height(height)
    names = dict(zip("ABCDEFGHIJ", columns, strict=False))
    panel = panel.targets([columns[column][1].ref_id(name) for name, column in names.items()])
    panel = panel.with_transformation(
        DataTransformerConfig(id_val="joinByField", options={"byField": key, "mode": "outer"})
    )
    hidden = {"Time": True, **{f"Time {position}": True for position in range(1, len(names) + 1)}}
    renamed = {f"Value #{name}": column for name, column in names.items()}
    panel = panel.with_transformation(
        DataTransformerConfig(id_val="organize", options={"excludeByName": hidden, "renameByName": renamed})
    )
    for column, (unit, _) in columns.items():
        panel = panel.override_by_name(column, [DynamicConfigValue(id_val="unit", value=unit)])
    return panel.unit(COUNT).no_value("unknown")


def thresholds(*steps: tuple[float | None, str]) -> builders.ThresholdsConfig:
    """Colours from a value on; the first one has None."""
    assert [value is None for value, _ in steps] == [True, *[False] * (len(steps) - 1)]
    values = [value for value, _ in steps if value is not None]
    assert all(low < high for low, high in pairwise(values))
    return (
        builders.ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=value, color=color) for value, color in steps])
    )


def dashboard(uid: str, title: str, description: str, variables: Sequence[str] = ()) -> builders.Dashboard:
    """A dashboard without panels; `variables` are the labels that it can select by, beside the job of the gateways."""
    link = builders.DashboardLink("quantgate").type(DashboardLinkType.DASHBOARDS).tags([TAG])
    made = (
        builders.Dashboard(f"quantgate / {title}")
        .uid(f"quantgate-{uid}")
        .description(description)
        .tags([TAG])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .readonly()
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(link.as_dropdown(False).include_vars(True).keep_time(True))
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", metrics.BUILD_INFO, "Job of the gateways in Prometheus."))
    )
    for name in variables:
        made = made.with_variable(_variable(name, *_VALUES[name]))
    return made.annotation(_events("Rollbacks", RED, metrics.ROLLOUT_ROLLBACKS)).annotation(
        _events("Configuration reloads", BLUE, metrics.CONFIG_RELOADS)
    )


def _variable(name: str, spec: MetricSpec, description: str) -> builders.QueryVariable:
    # Names of variables of the dashboards are those of the labels. "All" is a pattern, so that panels show what is new.
    scope = "" if name == "job" else '{job=~"$job"}'
    variable = builders.QueryVariable(name).label(name.capitalize()).description(description).datasource(SOURCE)
    variable = variable.query(f"label_values({spec.name}{scope}, {name})").refresh(
        VariableRefresh.ON_TIME_RANGE_CHANGED
    )
    variable = variable.sort(VariableSort.ALPHABETICAL_ASC).multi(True).include_all(True).all_value(".*")
    return variable.current(VariableOption(selected=True, text=["All"], value=["$__all"]))


def _events(name: str, color: str, spec: MetricSpec) -> builders.AnnotationQuery:
    label = spec.labels[-1]
    expression = f"{Queries().increase(spec, label, over='$__interval')} > 0"
    return builders.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expression)
