"""The page of `grape compare`."""

from __future__ import annotations

from typing import Any

from grape_service.report import plots
from grape_service.report.page import environment, plotly_packed, script_json


def render_comparison(found: dict[str, Any]) -> str:
    """What compare.compare found as one self-contained page."""
    figures: dict[str, plots.Figure] = {}
    names = list(found["sources"])[:12]
    if names:
        figures["sources"] = plots.side_by_side(names, [found["sources"][name] for name in names], "kept rows")
    if found["ranking"] and found["ranking"]["prompts"]:
        figures["ranks"] = plots.rank_histogram(found["ranking"]["histogram"])
    template = environment().get_template("comparison.html.j2")
    return template.render(
        found=found, figures=figures, figures_json=script_json(figures), plotly_packed=plotly_packed()
    )
