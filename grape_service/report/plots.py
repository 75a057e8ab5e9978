"""The report's plots, as plotly figures in plain values; plotly.js in the page draws them."""

from __future__ import annotations

from typing import Any

import numpy as np

from grape_service.report.statistics import (
    LENGTH_EDGES,
    MARGIN_EDGES,
    NUM_POSITIONS,
    RATIO_EDGES,
    SCORE_EDGES,
    WEIGHT_EDGES,
)
from grape_service.report.text import plot_label

COLORS = ("#3d7dca", "#d9692b", "#2f9e6e", "#b0589f", "#a8871d", "#6a6fd4", "#c4505a", "#2a97a8", "#7d8a34", "#8c6d5a")
Figure = dict[str, Any]


def layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    """The layout that all plots share; the page's style sheet colours texts and lines."""
    axis = {"automargin": True, "gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.4)"}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": list(COLORS),
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 50, "r": 12, "t": 12, "b": 44},
        "height": 320,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#111820", "font": {"color": "#ffffff"}},
        "legend": {"orientation": "h", "y": -0.28},
        "xaxis": {**axis, "title": {"text": x}, **more.pop("xaxis", {})},
        "yaxis": {**axis, "title": {"text": y}, **more.pop("yaxis", {})},
        **more,
    }


def _trimmed(*tables: Any) -> tuple[int, int]:
    """The first and the end of the bins in which any table has something."""
    filled = np.flatnonzero(
        sum(np.asarray(table).reshape(-1, np.asarray(table).shape[-1]).sum(axis=0) for table in tables)
    )
    return (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)


def by_source(names: list[str], table: list[list[int]], edges: Any, x: str, log: bool = False) -> Figure:
    """Shares of each source's values by bin, as lines."""
    first, end = _trimmed(table)
    first, end = max(0, first - 1), min(len(edges) - 1, end + 1)
    middles = (edges[first:end] + edges[first + 1 : end + 1]) / 2
    traces = []
    for name, row in zip(names, table, strict=True):
        total = sum(row)
        if total:
            values = (np.array(row[first:end]) / total).round(5).tolist()
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "line": {"shape": "hvh", "width": 2},
                    "name": plot_label(name),
                    "x": [float(f"{value:.4g}") for value in middles],
                    "y": values,
                    "hovertemplate": "%{x}: %{y:.1%}<extra>%{fullData.name}</extra>",
                }
            )
    xaxis = {"type": "log"} if log else {}
    return {"data": traces, "layout": layout(x, "share", xaxis=xaxis, yaxis={"tickformat": ".0%"})}


def bars(
    labels: list[str], values: list[float], x: str, percent: bool = False, texts: list[str] | None = None
) -> Figure:
    """Horizontal bars, the first on top."""
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": values,
        "y": [plot_label(label, 48) for label in labels],
        "hovertemplate": f"%{{y}}: %{{x{':.1%' if percent else ':,'}}}<extra></extra>",
        **({"text": texts, "textposition": "auto"} if texts else {}),
    }
    xaxis = {"tickformat": ".0%", "range": [0, 1]} if percent else {}
    height = max(180, 40 * len(labels) + 80)
    return {"data": [trace], "layout": layout(x, "", xaxis=xaxis, yaxis={"autorange": "reversed"}, height=height)}


def win_matrix(names: list[str], beats: list[list[int]]) -> Figure:
    """How often a source's choice beat a candidate of another, against the opposite."""
    counts = np.array(beats, dtype=float)
    both = counts + counts.T
    shares = np.divide(counts, both, out=np.full_like(counts, np.nan), where=both > 0)
    np.fill_diagonal(shares, np.nan)
    labels = [plot_label(name) for name in names]
    trace = {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "z": [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in shares],
        "customdata": counts.astype(int).tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "#d9692b"], [0.5, "#b9bec6"], [1, "#3d7dca"]],
        "colorbar": {"tickformat": ".0%", "thickness": 12},
        "hovertemplate": "%{y} beats %{x}: %{z:.1%} (%{customdata:,} times)<extra></extra>",
    }
    return {"data": [trace], "layout": layout("loses", "wins", yaxis={"autorange": "reversed"}, height=340)}


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
    heat = {
        "type": "heatmap",
        "x": x,
        "y": [round(float(value), 3) for value in middles_y],
        "z": [[None if np.isnan(v) else round(float(v), 3) for v in row] for row in shown],
        "customdata": part.T.tolist(),
        "colorscale": [[0, "rgba(61,125,202,.15)"], [1, "rgba(61,125,202,1)"]],
        "showscale": False,
        "hovertemplate": "about %{x:.0f} tokens, score %{y}: %{customdata:,}<extra></extra>",
    }
    line = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "mean score",
        "x": [value for value, there in zip(x, filled, strict=True) if there],
        "y": [round(float(value), 4) for value in means[filled]],
        "line": {"color": "#d9692b", "width": 2},
        "hovertemplate": "about %{x:.0f} tokens: mean %{y}<extra></extra>",
    }
    return {"data": [heat, line], "layout": layout("response tokens", "score", xaxis={"type": "log"}, showlegend=False)}


def lengths(all_rows: list[int], kept: list[int]) -> Figure:
    """Lengths of all candidates and of the kept ones."""
    return by_source(["all candidates", "kept"], [all_rows, kept], LENGTH_EDGES, "response tokens", log=True)


def margins(names: list[str], table: list[list[int]]) -> Figure:
    """Margins of the first choices."""
    edges = MARGIN_EDGES.copy()
    edges[0] = edges[1] / 2
    return by_source(names, table, edges, "margin to the next best", log=True)


def scores(names: list[str], table: list[list[int]]) -> Figure:
    """Scores of all candidates."""
    return by_source(names, table, SCORE_EDGES, "score (mean log-probability a token)")


def weights(names: list[str], table: list[list[int]]) -> Figure:
    """Token weights."""
    return by_source(names, table, 10.0**WEIGHT_EDGES, "weight", log=True)


def ratios(row: list[int], clip: list[float] | None) -> Figure:
    """Log ratios before the clip, with its bounds."""
    figure = by_source(["log ratio"], [row], RATIO_EDGES, "log π_target − log π_behavior")
    if clip:
        line = {"type": "line", "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot", "color": "#d9692b"}}
        figure["layout"]["shapes"] = [{**line, "x0": bound, "x1": bound} for bound in clip]
    return figure


def positions(stats: dict[str, Any]) -> Figure:
    """Weights by relative position: mean, median, and the band from the 10% to the 90% quantile."""
    x = [round((place + 0.5) / NUM_POSITIONS, 4) for place in range(NUM_POSITIONS)]
    band = {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "hovertemplate": "%{x:.0%}: %{y:.3g}<extra>%{fullData.name}</extra>",
    }
    thin = {"width": 1, "color": "#8c97a5"}
    traces = [
        {**band, "name": "10%", "y": stats["position_q10"], "line": thin},
        {
            **band,
            "name": "90%",
            "y": stats["position_q90"],
            "line": thin,
            "fill": "tonexty",
            "fillcolor": "rgba(61,125,202,.18)",
        },
        {**band, "name": "median", "y": stats["position_q50"], "line": {"color": "#3d7dca", "width": 2}},
        {**band, "name": "mean", "y": stats["position_mean"], "line": {"color": "#d9692b", "width": 2, "dash": "dash"}},
    ]
    xaxis = {"tickformat": ".0%", "range": [0, 1]}
    return {"data": traces, "layout": layout("position in the response", "weight", xaxis=xaxis, yaxis={"type": "log"})}
