"""The page of `grape compare`."""

from __future__ import annotations

from typing import Any

from grape_service.compare import BINS
from grape_service.report import plots
from grape_service.report.page import environment, plotly_js, script_json


def render_comparison(found: dict[str, Any]) -> str:
    """What compare.compare found as one self-contained page."""
    figures: dict[str, plots.Figure] = {}
    names = list(found["sources"])[:12]
    if names:
        traces = []
        for place, label in enumerate(("A", "B")):
            values = [found["sources"][name][place] for name in names]
            traces.append({"type": "bar", "name": label, "x": [plots.plot_label(name) for name in names], "y": values})
        figures["sources"] = {"data": traces, "layout": plots.layout("source", "kept rows", barmode="group")}
    if found["ranking"] and found["ranking"]["prompts"]:
        middles = [round(-1 + (place + 0.5) * 2 / BINS, 3) for place in range(BINS)]
        trace = {"type": "bar", "x": middles, "y": found["ranking"]["histogram"]}
        figures["ranks"] = {"data": [trace], "layout": plots.layout("rank correlation within a prompt", "prompts")}
    template = environment().get_template("comparison.html.j2")
    return template.render(found=found, figures=figures, figures_json=script_json(figures), plotly_js=plotly_js())
