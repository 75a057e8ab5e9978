"""report.html: one file with everything in it, from a manifest's statistics and a few examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import orjson

from grape_service.report import plots
from grape_service.report.examples import MAX_CANDIDATES, MAX_TEXT
from grape_service.report.text import cut, short, visible
from grape_service.report.warnings import share, warnings_of

TEMPLATES = Path(__file__).resolve().parent / "templates"


def facts_of_manifest(manifest: Any) -> dict[str, Any]:
    """What the page tells, from a published manifest."""
    fields = manifest.model_dump(mode="json")
    return _facts(fields, manifest.name, manifest.version, manifest.files, manifest.created)


def facts_of_fields(fields: Any, name: str, version: str, files: Sequence[Any]) -> dict[str, Any]:
    """The same before the manifest is published."""
    return _facts(fields.model_dump(mode="json"), name, version, files, None)


def _facts(
    fields: dict[str, Any], name: str, version: str, files: Sequence[Any], created: str | None
) -> dict[str, Any]:
    from grape_service.releases.manifest import without_secrets

    return {
        "name": name,
        "version": version,
        "created": created,
        "rows": sum(file.rows for file in files),
        "tokens": sum(file.tokens for file in files),
        "loss_tokens": sum(file.loss_tokens for file in files),
        "bytes": sum(file.size for file in files),
        "counts": fields["counts"],
        "config": without_secrets(fields["config"]),
        "parents": fields["parents"],
        "statistics": fields["statistics"],
    }


def render_page(facts: dict[str, Any], examples: Sequence[dict[str, Any]] = ()) -> str:
    """The whole page. All text from outside is escaped; nothing is loaded from elsewhere."""
    report = facts["statistics"].get("report") or {}
    figures: dict[str, plots.Figure] = {}
    if report.get("select"):
        figures.update(_select_figures(report["select"]))
    if report.get("weights"):
        clip = (facts["config"].get("weights") or {}).get("ratio_clip")
        figures.update(_weight_figures(report["weights"], clip))
    flow = flow_of_rows(facts)
    figures["flow"] = plots.bars([label for label, _ in flow], [count for _, count in flow], "rows")
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            facts=facts,
            title=f"{facts['name']} {facts['version']}",
            warnings=warnings_of(facts),
            reasons=reasons_of(facts),
            select=report.get("select"),
            sources=source_rows(report.get("select"), facts),
            weights=report.get("weights"),
            weigh=facts["counts"].get("weigh") or {},
            weight_figures=facts["statistics"].get("weights") or {},
            control=control_rows(facts),
            figures=figures,
            figures_json=script_json(figures),
            checks=facts["statistics"].get("checks") or [],
            examples=[_shown(example) for example in examples],
            config_text=orjson.dumps(facts["config"], option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode(),
            seconds=facts["statistics"].get("stage_seconds") or {},
            plotly_js=plotly_js(),
        )
    )


@cache
def plotly_js() -> str:
    """The library that draws, as text."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


@cache
def environment() -> jinja2.Environment:
    """The templates, which escape all that they are given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(short=short, visible=visible, cut=cut, number=number, percent=percent)
    return environment


def script_json(value: Any) -> str:
    """JSON that may stand inside of a script element."""
    text = orjson.dumps(value).decode()
    for character, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028")):
        text = text.replace(character, code)
    return text


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None or value != value else f"{value:.1%}"


def flow_of_rows(facts: dict[str, Any]) -> list[tuple[str, int]]:
    """Rows after each stage."""
    pool, select = facts["counts"].get("pool") or {}, facts["counts"].get("select") or {}
    steps = [("in the pool", pool.get("rows_in")), ("usable", pool.get("rows")), ("kept", select.get("kept_rows"))]
    return [*((label, count) for label, count in steps if count is not None), ("released", facts["rows"])]


def reasons_of(facts: dict[str, Any]) -> list[tuple[str, str, int]]:
    """Stage, reason and rows of everything that was left out."""
    counts = facts["counts"]
    pool, select, weigh = (counts.get(name) or {} for name in ("pool", "select", "weigh"))
    rows = [("prepare", "filtered by pool.where", pool.get("filtered", 0))]
    rows += [("prepare", reason, count) for reason, count in (pool.get("rejected_by_reason") or {}).items()]
    rows += [("select", reason, count) for reason, count in (select.get("rows_left_out") or {}).items()]
    rows += [("weigh", reason, count) for reason, count in (weigh.get("failed_rows") or {}).items()]
    rows.append(("weigh", "no behavior policy", weigh.get("dropped_rows", 0)))
    return [row for row in rows if row[2]]


def source_rows(select: dict[str, Any] | None, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A line a source: candidates, kept, share of contested prompts won, mean score, effective share."""
    if not select:
        return []
    by_source = (facts["counts"].get("weigh") or {}).get("sources") or {}
    found = []
    for place, name in enumerate(select["names"]):
        sums = by_source.get(name)
        squares = sums["tokens"] * sums["sum_squares"] if sums else 0
        found.append(
            {
                "name": name,
                "candidates": select["candidates"][place],
                "kept": select["kept"][place],
                "win_share": share(select["wins"][place], select["prompts_with"][place]),
                "score": select["score_mean"][place] if sum(select["scores"][place]) else None,
                "effective": sums["sum"] ** 2 / squares if sums and squares else None,
            }
        )
    return found


def control_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The weights beside those that the target against itself would get."""
    from grape_service.pear import WeightTotals

    weigh = facts["counts"].get("weigh") or {}
    figures = facts["statistics"].get("weights")
    if not figures:
        return []
    rows = [{"name": "these weights", **figures}]
    names = {"control": "target against itself, exact", "control_noisy": "target against itself, scored twice"}
    for key, name in names.items():
        if weigh.get(key, {}).get("tokens"):
            rows.append({"name": name, **WeightTotals.from_json(weigh[key]).figures()})
    return rows


def _select_figures(select: dict[str, Any]) -> dict[str, plots.Figure]:
    names = select["names"]
    figures = {"lengths": plots.lengths(select["lengths"], select["kept_lengths"])}
    if not select["contested"]:
        return figures
    rates = [share(wins, present) for wins, present in zip(select["wins"], select["prompts_with"], strict=True)]
    agree = sorted(select["agree"].items(), key=lambda item: -item[1])
    labels = [*(name for name, _ in agree), "a random choice (expected)"]
    shares = [*(count / select["contested"] for _, count in agree), select["chance"]]
    figures |= {
        "scores": plots.scores(names, select["scores"]),
        "margins": plots.margins(names, select["margins"]),
        "wins": plots.bars(names, [round(rate, 4) for rate in rates], "prompts won of those it is in", percent=True),
        "length_scores": plots.length_scores(select["length_scores"]),
        "agree": plots.bars(labels, [round(value, 4) for value in shares], "same choice", percent=True),
    }
    if len(names) > 1:
        figures["matrix"] = plots.win_matrix(names, select["beats"])
    return figures


def _weight_figures(weights: dict[str, Any], clip: list[float] | None) -> dict[str, plots.Figure]:
    if not any(map(sum, weights["weights"])):
        return {}
    return {
        "weights": plots.weights(weights["names"], weights["weights"]),
        "ratios": plots.ratios(weights["ratios"], clip),
        "positions": plots.positions(weights),
    }


KIND_NAMES = {"closest": "Closest choice", "clearest": "Clearest choice", "random": "Random choice"}


def _shown(example: dict[str, Any]) -> dict[str, Any]:
    """An example cut to what a page shows."""
    candidates = example["candidates"]
    kept = [c for c in candidates if c["kept"]]
    others = [c for c in candidates if not c["kept"]]
    shown = [*kept, *others][:MAX_CANDIDATES]
    return {
        "kind": KIND_NAMES.get(example.get("kind", ""), "Choice"),
        "prompt_id": example["prompt_id"],
        "prompt": cut(example["prompt"], MAX_TEXT),
        "more": len(candidates) - len(shown),
        "candidates": [{**c, "tokens": list(_tokens(c))} for c in shown],
    }


def _tokens(candidate: dict[str, Any]) -> Any:
    values = [candidate.get(key) for key in ("logprobs", "ratios", "weights")]
    for place, text in enumerate(candidate["texts"]):
        numbers = [row[place] if row is not None and place < len(row) else None for row in values]
        yield {"text": cut(text, 200), "numbers": numbers}
