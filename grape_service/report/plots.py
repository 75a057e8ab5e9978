"""The report's plots, as plotly figures in plain values; plotly.js in the page draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from grape_service.display import plot_labels
from grape_service.json_types import JsonObject
from grape_service.report.facts import WeightsReport
from grape_service.report.statistics import (
    LENGTH_EDGES,
    MARGIN_EDGES,
    NUM_POSITIONS,
    RATIO_EDGES,
    SCORE_EDGES,
    WEIGHT_EDGES,
    quantile,
)

COLORS = ("#3d7dca", "#d9692b", "#2f9e6e", "#b0589f", "#a8871d", "#6a6fd4", "#c4505a", "#2a97a8", "#7d8a34", "#8c6d5a")
BLUE, ORANGE, GREY = "#3d7dca", "#d9692b", "#8c97a5"
MOST_BINS = 80
"""More bins than this in a plot are put together."""
Figure = JsonObject


def layout(x: str, y: str, **more: Any) -> JsonObject:
    """The layout that all plots share; the page's style sheet colours texts and lines."""
    axis = {
        "automargin": True,
        "gridcolor": "rgba(128,128,128,.25)",
        "zerolinecolor": "rgba(128,128,128,.4)",
        "ticks": "outside",
        "ticklen": 5,
        "tickcolor": "rgba(0,0,0,0)",
    }
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(COLORS),
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 50, "r": 24, "t": 12, "b": 44},
        "height": 320,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#111820", "font": {"color": "#ffffff"}},
        "legend": {
            "orientation": "h",
            "x": 0,
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "traceorder": "normal",
        },
        "xaxis": {**axis, "title": {"text": x}, **more.pop("xaxis", {})},
        "yaxis": {**axis, "title": {"text": y}, **more.pop("yaxis", {})},
        **more,
    }


def log_axis(low: float, high: float) -> JsonObject:
    """A logarithmic axis with ticks at 1, 2 and 5 times powers of ten; of many decades at the powers alone."""
    steps = (1,) if high > 2000 * low else (1, 2, 5)
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    texts = [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks]
    return {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": texts}


def _trimmed(*tables: Any) -> tuple[int, int]:
    """The first and the end of the bins in which any table has something."""
    filled = np.flatnonzero(
        sum(np.asarray(table).reshape(-1, np.asarray(table).shape[-1]).sum(axis=0) for table in tables)
    )
    return (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)


def histograms(
    names: Sequence[str], table: Sequence[Sequence[int]], edges: Any, x: str, of: str, log: bool = False
) -> Figure:
    """Shares of each row's values by bin, as lines: `of` says of what."""
    first, end = _trimmed(table)
    first, end = max(0, first - 1), min(len(edges) - 1, end + 1)
    together = -(-(end - first) // MOST_BINS)
    starts = np.arange(first, end, together)
    bounds = edges[[*starts, end]]
    middles = np.sqrt(bounds[:-1] * bounds[1:]) if log else (bounds[:-1] + bounds[1:]) / 2
    traces: list[JsonObject] = []
    for label, row in zip(plot_labels(names), table, strict=True):
        total = sum(row)
        if total:
            values = (np.add.reduceat(np.array(row[first:end]), starts - first) / total).round(5).tolist()
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "line": {"shape": "hvh", "width": 2, "dash": "solid" if len(traces) < len(COLORS) else "dot"},
                    "name": label,
                    "x": [float(f"{value:.4g}") for value in middles],
                    "y": values,
                    "hovertemplate": "%{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
                }
            )
    xaxis = log_axis(bounds[0], bounds[-1]) if log else {}
    yaxis = {"tickformat": ".0%", "rangemode": "tozero"}
    more = {"xaxis": xaxis, "yaxis": yaxis, "showlegend": len(names) > 1}
    return {"data": traces, "layout": layout(x, f"share of {of}", **more)}


SPREAD = (0.1, 0.25, 0.5, 0.75, 0.9)


def spreads(names: Sequence[str], table: Sequence[Sequence[int]], edges: Any, x: str, log: bool = False) -> Figure:
    """Where each source's values are, a line per source: 10% to 90% thin, 25% to 75% thick, a mark at the median."""
    found = []
    for label, row in zip(plot_labels(names), table, strict=True):
        values = [quantile(row, edges, share) for share in SPREAD]
        if None not in values:
            found.append((label, sum(row), [round(float(value), 4) for value in values if value is not None]))
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [value for _, _, values in found for value in (values[low], values[high], None)],
            "y": [value for label, _, _ in found for value in (label, label, None)],
            "line": {"color": BLUE, "width": width},
            "opacity": opacity,
            "hoverinfo": "skip",
        }
        for low, high, width, opacity in ((0, 4, 2, 1), (1, 3, 12, 0.45))
    ]
    medians = {
        "type": "scatter",
        "mode": "markers",
        "x": [values[2] for _, _, values in found],
        "y": [label for label, _, _ in found],
        "customdata": [[f"{count:,}", *values] for _, count, values in found],
        "marker": {"color": ORANGE, "size": 11, "symbol": "diamond"},
        "hovertemplate": "%{y}: median %{x}<br>10% %{customdata[1]}, 25% %{customdata[2]}, "
        "75% %{customdata[4]}, 90% %{customdata[5]}<br>%{customdata[0]} values<extra></extra>",
    }
    ends = [value for _, _, values in found for value in values if value > 0]
    height = max(220, 34 * len(found) + 90)
    xaxis = log_axis(min(ends), max(ends)) if log and ends else {}
    yaxis = {"type": "category", "autorange": "reversed"}
    return {
        "data": [*lines, medians],
        "layout": layout(x, "", xaxis=xaxis, yaxis=yaxis, height=height, showlegend=False),
    }


def bars(labels: list[str], values: list[float], x: str, percent: bool = False) -> Figure:
    """Horizontal bars with their values on them, the first on top."""
    shown = ".1%" if percent else ","
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": plot_labels(labels, 40),
        "texttemplate": f"%{{x:{shown}}}",
        "textposition": "outside",
        "cliponaxis": False,
        "hovertemplate": f"%{{y}}: %{{x:{shown}}}<extra></extra>",
    }
    most = 1.0 if percent else max([*values, 1])
    xaxis = {"range": [0, most * 1.18]} | (
        {"tickformat": ".0%", "tickvals": [0, 0.5, 1.0]} if percent else {"nticks": 6}
    )
    height = max(180, 40 * len(labels) + 80)
    return {"data": [trace], "layout": layout(x, "", xaxis=xaxis, yaxis={"autorange": "reversed"}, height=height)}


def picked(rules: dict[str, list[int]], names: list[str]) -> Figure:
    """Whose candidate each rule takes, as one bar a rule, cut by source."""
    labels = plot_labels(list(rules), 40)
    traces = []
    for place, label in enumerate(plot_labels(names)):
        counts = [row[place] for row in rules.values()]
        if any(counts):
            shares = [count / max(1, sum(row)) for count, row in zip(counts, rules.values(), strict=True)]
            trace = {"type": "bar", "orientation": "h", "name": label, "x": [round(v, 4) for v in shares], "y": labels}
            marker = {"color": COLORS[place % len(COLORS)], "opacity": 1 if place < len(COLORS) else 0.5}
            hover = "%{y}: %{fullData.name} %{x:.1%} (%{customdata:,} prompts)<extra></extra>"
            traces.append({**trace, "marker": marker, "customdata": counts, "hovertemplate": hover})
    xaxis = {"tickformat": ".0%", "range": [0, 1], "tickvals": [0, 0.5, 1.0]}
    height = max(220, 36 * len(labels) + 140)
    more = {"barmode": "stack", "height": height, "yaxis": {"autorange": "reversed"}, "xaxis": xaxis}
    return {"data": traces, "layout": layout("share of the prompts", "", **more)}


def win_matrix(names: list[str], beats: list[list[int]]) -> Figure:
    """How often a source's choice beat a candidate of another, against the opposite."""
    counts = np.array(beats, dtype=float)
    both = counts + counts.T
    shares = np.divide(counts, both, out=np.full_like(counts, np.nan), where=both > 0)
    np.fill_diagonal(shares, np.nan)
    labels = plot_labels(names, 16)
    trace = {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "z": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in shares],
        "customdata": [
            [[f"{int(a):,}", f"{int(b):,}"] for a, b in zip(*rows, strict=True)]
            for rows in zip(counts, both, strict=True)
        ],
        "zmin": 0,
        "zmax": 1,
        "xgap": 2,
        "ygap": 2,
        "colorscale": [[0, "#f2b48f"], [0.5, "#e8eaed"], [1, "#9cc2ef"]],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "%{y} beats %{x} in %{z:.1%}: %{customdata[0]} of %{customdata[1]}<extra></extra>",
        **({"texttemplate": "%{z:.0%}", "textfont": {"color": "#10161d"}} if len(names) <= 8 else {}),
    }
    height = max(280, 34 * len(names) + 130)
    axes = {"xaxis": {"showgrid": False}, "yaxis": {"autorange": "reversed", "showgrid": False}}
    return {
        "data": [trace],
        "layout": layout("source of the loser", "source of the choice", height=height, **axes),
    }


def length_scores(table: list[list[int]]) -> Figure:
    """Candidates by length and score, and the mean score of each length."""
    counts = np.array(table)
    rows, columns = _trimmed(counts.T), _trimmed(counts)
    middles_x = np.sqrt(LENGTH_EDGES[:-1] * LENGTH_EDGES[1:])[slice(*rows)]
    middles_y = ((SCORE_EDGES[:-1] + SCORE_EDGES[1:]) / 2)[slice(*columns)]
    part = counts[slice(*rows), slice(*columns)]
    means = (part * middles_y).sum(axis=1) / np.maximum(1, part.sum(axis=1))
    filled = part.sum(axis=1) > 0
    shown = np.where(part > 0, np.log10(np.maximum(part, 1)), np.nan).T
    x = [round(float(value), 1) for value in middles_x]
    heatmap = {
        "type": "heatmap",
        "x": x,
        "y": [round(float(value), 3) for value in middles_y],
        "z": [[None if np.isnan(v) else round(float(v), 3) for v in row] for row in shown],
        "customdata": part.T.tolist(),
        "colorscale": [[0, "rgba(61,125,202,.15)"], [1, "rgba(61,125,202,1)"]],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "about %{x:.0f} tokens, score %{y}: %{customdata:,}<extra></extra>",
    }
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "mean score",
        "x": [value for value, there in zip(x, filled, strict=True) if there],
        "y": [round(float(value), 4) for value in means[filled]],
        "line": {"color": ORANGE, "width": 2},
        "hovertemplate": "about %{x:.0f} tokens: mean %{y:.3f}<extra></extra>",
    }
    xaxis = log_axis(middles_x[0], middles_x[-1])
    return {"data": [heatmap, line], "layout": layout("response tokens", "score", xaxis=xaxis, showlegend=False)}


def lengths(all_rows: list[int], kept: list[int]) -> Figure:
    """Lengths of all candidates and of the kept ones."""
    return histograms(["all candidates", "kept"], [all_rows, kept], LENGTH_EDGES, "response tokens", "rows", log=True)


def margins(names: list[str], table: list[list[int]]) -> Figure:
    """Margins of the first choices."""
    edges = MARGIN_EDGES.copy()
    edges[0] = edges[1] / 2
    return spreads(names, table, edges, "margin to the next best, in score", log=True)


def scores(names: list[str], table: list[list[int]]) -> Figure:
    """Scores of all candidates."""
    return spreads(names, table, SCORE_EDGES, "score (mean log-probability per token)")


def weights(names: list[str], table: list[list[int]]) -> Figure:
    """Token weights."""
    return histograms(names, table, 10.0**WEIGHT_EDGES, "weight", "tokens", log=True)


def ratios(row: list[int], clip: list[float] | None) -> Figure:
    """Log ratios before the clip, with its bounds; what is beyond 98% of them is a drag away."""
    low, high = (quantile(row, RATIO_EDGES, share) or 0.0 for share in (0.01, 0.99))
    bounds = clip or [low, high]
    window = [min(low, 2 * bounds[0]), max(high, 2 * bounds[1])]
    figure = histograms(["log ratio"], [row], RATIO_EDGES, "log π(target) − log π(behavior)", "tokens")
    figure["layout"]["xaxis"]["range"] = [round(value, 3) for value in window]
    if clip:
        line = {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot", "color": ORANGE}}
        figure["layout"]["shapes"] = [{**line, "x0": bound, "x1": bound} for bound in clip]
    return figure


def positions(stats: WeightsReport) -> Figure:
    """Weights by relative position: mean, median, and the band from the 10% to the 90% quantile."""
    x = [round((place + 0.5) / NUM_POSITIONS, 4) for place in range(NUM_POSITIONS)]
    hover = {"hovertemplate": "at %{x:.0%}: %{y:.3g}<extra>%{fullData.name}</extra>"}
    kinds: list[tuple[str, Sequence[float | None], JsonObject]] = [
        ("10%", stats["position_q10"], {"line": {"width": 1, "color": GREY}}),
        (
            "90%",
            stats["position_q90"],
            {"line": {"width": 1, "color": GREY}, "fill": "tonexty", "fillcolor": "rgba(61,125,202,.18)"},
        ),
        ("median", stats["position_q50"], {"line": {"color": BLUE, "width": 2}}),
        ("mean", stats["position_mean"], {"line": {"color": ORANGE, "width": 2, "dash": "dash"}}),
    ]
    traces = [
        {"type": "scatter", "mode": "lines", "x": x, **hover, "name": name, "y": list(heights), **more}
        for name, heights, more in kinds
    ]
    values = [value for _, heights, _ in kinds for value in heights if value]
    xaxis = {"tickformat": ".0%", "range": [0, 1], "tickvals": [0, 0.5, 1.0]}
    yaxis = log_axis(min(values), max(values)) if values else {}
    return {"data": traces, "layout": layout("position in the response", "weight", xaxis=xaxis, yaxis=yaxis)}


def side_by_side(names: list[str], pairs: list[list[int]], y: str) -> Figure:
    """Two numbers of each name, as bars of A and B."""
    labels = plot_labels(names)
    traces = [
        {"type": "bar", "name": side, "x": labels, "y": [pair[place] for pair in pairs]}
        for place, side in enumerate(("A", "B"))
    ]
    return {"data": traces, "layout": layout("", y, barmode="group")}


def rank_histogram(counts: list[int]) -> Figure:
    """Prompts by the rank correlation of their candidates, from -1 to 1."""
    middles = [round(-1 + (place + 0.5) * 2 / len(counts), 3) for place in range(len(counts))]
    hover = "about %{x}: %{y:,} prompts<extra></extra>"
    trace = {"type": "bar", "x": middles, "y": counts, "hovertemplate": hover}
    axis = {"range": [-1.02, 1.02]}
    return {"data": [trace], "layout": layout("rank correlation within a prompt", "prompts", xaxis=axis)}
