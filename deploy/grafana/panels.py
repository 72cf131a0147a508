"""How the dashboard's panels look: five kinds, each drawn in one way."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    AxisPlacement,
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataTransformerConfig,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode, HeatmapColorScale
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.units import Short

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
# Grafana writes `1.2 K images/s`.
IMAGES_PER_SECOND = "count:images/s"
BATCHES_PER_SECOND = "count:batches/s"
HEIGHT, STAT_HEIGHT = 8, 4  # in the grid's rows

Panel = timeseries.Panel | stat.Panel | heatmap.Panel | table.Panel | statetimeline.Panel
P = TypeVar("P", timeseries.Panel, stat.Panel, heatmap.Panel, table.Panel, statetimeline.Panel)
Thresholds = Sequence[tuple[float, str]]  # colours from these values on


def line(
    title: str,
    question: str,
    unit: str,
    queries: Mapping[str, str],
    *,
    stacked: bool = False,
    at_least: str | None = None,
) -> timeseries.Panel:
    """Lines over time; `queries` by their legend. `at_least` is the shortest step, where events are rare."""
    panel = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
        .draw_style(GraphDrawStyle.LINE)
        .fill_opacity(25 if stacked else 8)
        .show_points(VisibilityMode.NEVER)
        .stacking(common.StackingConfig().mode(StackingMode.NORMAL if stacked else StackingMode.NONE))
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(show_legend=True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    for number, (legend, query) in enumerate(queries.items()):
        panel.with_target(_target(query, number).legend_format(legend).range())
    return _titled(panel if at_least is None else panel.interval(at_least), title, question)


def number(
    title: str, question: str, unit: str, query: str, colours: Thresholds, *, decimals: int | None = None
) -> stat.Panel:
    """The value now, with its course behind it. The first colour is that of all smaller values too."""
    panel = (
        stat.Panel()
        .unit(unit)
        .no_value("–")
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(colours))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(values=False))
        .with_target(_target(query).range())
    )
    return _titled(panel if decimals is None else panel.decimals(decimals), title, question, STAT_HEIGHT)


def buckets(title: str, question: str, unit: str, query: str, *, at_least: str | None = None) -> heatmap.Panel:
    """A histogram over time: a column a step, a row a bucket, the colour is how many came into it a second."""
    panel = (
        heatmap.Panel()
        .calculate(calculate=False)  # the buckets are Prometheus', which Grafana takes apart
        .color(
            heatmap.HeatmapColorOptions()
            .mode(HeatmapColorMode.SCHEME)
            .scheme("Blues")
            .steps(64)
            .scale(HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .reverse(reverse=True)
        )
        .filter_values(heatmap.FilterValueRange().le(1e-9))
        .cell_gap(1)
        .cell_values(heatmap.CellValues().unit(unit))
        .y_axis(heatmap.YAxisConfig().axis_placement(AxisPlacement.LEFT).unit(Short))
        .show_legend()
        .with_target(_target(query).legend_format("{{le}}").format(PromQueryFormat.HEATMAP).range())
    )
    return _titled(panel if at_least is None else panel.interval(at_least), title, question)


def rows(title: str, question: str, query: str, columns: list[str]) -> table.Panel:
    """A table of a series' labels, without its value."""
    hidden = {name: True for name in ("Time", "Value", "__name__", "job") if name not in columns}
    order = {name: place for place, name in enumerate(columns)}
    panel = (
        table.Panel()
        .with_target(_target(query).format(PromQueryFormat.TABLE).instant())
        .with_transformation(
            DataTransformerConfig(id_val="organize", options={"excludeByName": hidden, "indexByName": order})
        )
    )
    return _titled(panel, title, question)


def states(
    title: str, question: str, query: str, legend: str, words: Mapping[str, str], colours: Thresholds
) -> statetimeline.Panel:
    """A bar for each series, whose colour is its state."""
    panel = (
        statetimeline.Panel()
        .mappings([ValueMap(options={value: ValueMappingResult(text=word) for value, word in words.items()})])
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .thresholds(_thresholds(colours))
        .show_value(VisibilityMode.AUTO)
        .merge_values(merge_values=True)
        .fill_opacity(70)
        .line_width(0)
        .legend(common.VizLegendOptions().show_legend(show_legend=False))
        .with_target(_target(query).legend_format(legend).range())
    )
    return _titled(panel, title, question)


def _target(query: str, number: int = 0) -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(chr(ord("A") + number)).datasource(SOURCE).expr(query)


def _thresholds(colours: Thresholds) -> dashboard.ThresholdsConfig:
    (_, lowest), *others = colours
    steps = [Threshold(color=lowest, value=None), *(Threshold(color=colour, value=value) for value, colour in others)]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _titled(panel: P, title: str, question: str, height: int = HEIGHT) -> P:
    return panel.title(title).description(question).datasource(SOURCE).height(height)
