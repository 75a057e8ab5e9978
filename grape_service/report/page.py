"""report.html: one file with everything in it, from a manifest's statistics and a few examples."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import orjson

from grape_service.config.methods import SelectConfig
from grape_service.display import cut, in_order, short, visible
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.prepare.reduce import shard_paths
from grape_service.release.candidates import open_scored_pool
from grape_service.release.changes import since_of
from grape_service.release.load import Release
from grape_service.release.rounds import Rounds, all_rounds, job_of_version
from grape_service.report import plots
from grape_service.report.examples import (
    MAX_CANDIDATES,
    MAX_TEXT,
    MODES,
    ExampleContext,
    ExamplePartition,
    PromptExample,
    ShownCandidate,
    TokenBytes,
    chosen_by_partition,
    examples_of_kinds,
    read_examples,
    reason_of,
    release_rows,
)
from grape_service.report.facts import ExampleChoice, Facts, SelectReport, WeightsReport, facts_of_manifest
from grape_service.report.misled import not_compared, overlaps
from grape_service.report.notices import warnings_of
from grape_service.report.sums import MAX_SOURCES
from grape_service.report.warning import compared_prompts, share
from grape_service.weigh.totals import WeightFigures, WeightTotals

TEMPLATES = Path(__file__).resolve().parent / "templates"


def render_page(facts: Facts, examples: Sequence[PromptExample] = (), job: Rounds | None = None) -> str:
    """The whole page, with the rounds of `job`. All text from outside is escaped; nothing is loaded from elsewhere."""
    report = facts["statistics"].get("report") or {}
    figures: dict[str, plots.Figure] = {}
    selection = SelectConfig.model_validate(facts["config"].get("select") or {})
    if report.get("select"):
        figures.update(_select_figures(report["select"], selection))
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
            race=facts["statistics"].get("race"),
            since=since_of(facts["counts"]),
            job=job,
            select=report.get("select"),
            sources=source_rows(report.get("select")),
            weights=report.get("weights"),
            weigh=facts["counts"].get("weigh") or {},
            weight_rows=weight_rows(facts),
            noise=scoring_noise(facts),
            aligned=aligned_rows(facts),
            overlaps=overlaps(report["select"]) if report.get("select") else [],
            not_compared=not_compared(report["select"], selection.method) if report.get("select") else [],
            modes=shown_modes(examples),
            engines=engine_rows(facts),
            estimate=facts["statistics"].get("estimate"),
            figures=figures,
            figures_json=script_json(figures),
            checks=facts["statistics"].get("checks") or [],
            examples=[_shown(example, selection) for example in examples],
            config_text=orjson.dumps(facts["config"], option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS).decode(),
            seconds=in_order(facts["statistics"].get("stage_seconds") or {}),
            plotly_packed=plotly_packed(),
        )
    )


PLOTLY = "plotly-cartesian-4.1.1.min.js.gz"
"""plotly.js without maps and 3D, a quarter of the whole (MIT; npm pack plotly.js-cartesian-dist-min, then gzip -9n)."""


@cache
def plotly_packed() -> str:
    """The library that draws, as gzip in base64."""
    return base64.b64encode((TEMPLATES / PLOTLY).read_bytes()).decode()


@cache
def environment() -> jinja2.Environment:
    """The templates, which escape all that they are given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters.update(short=short, visible=visible, cut=cut, number=number, percent=percent, signed=signed)
    environment.filters["setting"] = lambda value: value if isinstance(value, str) else orjson.dumps(value).decode()
    environment.filters["moment"] = lambda created: created[:16].replace("T", " ") + " UTC"
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


def signed(value: float | None) -> str:
    """A correlation; a dash where there is none."""
    return "–" if value is None else f"{value:+.2f}"


def percent(value: float | None) -> str:
    """A share in percent."""
    return "–" if value is None or value != value else f"{value:.1%}"


def flow_of_rows(facts: Facts) -> list[tuple[str, int]]:
    """Rows after each stage."""
    pool, select = facts["counts"].get("pool") or {}, facts["counts"].get("select") or {}
    steps = [("in the pool", pool.get("rows_in")), ("usable", pool.get("rows")), ("kept", select.get("kept_rows"))]
    return [*((label, count) for label, count in steps if count is not None), ("released", facts["rows"])]


def reasons_of(facts: Facts) -> list[tuple[str, str, int]]:
    """Stage, reason and rows of everything that was left out."""
    counts = facts["counts"]
    pool, select, weigh = (counts.get(name) or {} for name in ("pool", "select", "weigh"))
    rows = [("prepare", "filtered by pool.where", pool.get("filtered", 0))]
    for reasons in ("rejected_by_reason", "left_out_by_reason"):
        rows += [("prepare", reason, count) for reason, count in (pool.get(reasons) or {}).items()]
    rows += [("select", reason, count) for reason, count in (select.get("rows_left_out") or {}).items()]
    rows += [("weigh", reason, count) for reason, count in (weigh.get("failed_rows") or {}).items()]
    rows.append(("weigh", "no behavior policy", weigh.get("dropped_rows", 0)))
    return [row for row in rows if row[2]]


class SourceRow(TypedDict):
    """A line of the table of sources."""

    name: str
    candidates: int
    kept: int
    present: int  # prompts with a choice of which a candidate is of the source
    win_share: float | None  # of those
    score: float | None  # mean


def source_rows(select: SelectReport | None) -> list[SourceRow]:
    """A line for each source."""
    if not select:
        return []
    return [
        {
            "name": name,
            "candidates": select["candidates"][place],
            "kept": select["kept"][place],
            "present": select["prompts_with"][place],
            "win_share": wins / present if (present := select["prompts_with"][place]) else None,
            "score": select["score_mean"][place] if sum(select["scores"][place]) else None,
        }
        for place, (name, wins) in enumerate(zip(select["names"], select["wins"], strict=True))
    ]


class WeightRow(WeightFigures):
    """A line of the table of weights."""

    name: str
    tokens: int | None


def weight_rows(facts: Facts) -> list[WeightRow]:
    """The weights, all and by source, and those that the target against itself would get."""
    weigh = facts["counts"].get("weigh") or {}
    figures: WeightFigures | None = facts["statistics"].get("weights")
    if not figures:
        return []
    sources = sorted((weigh.get("sources") or {}).items(), key=lambda item: (-item[1]["tokens"], item[0]))
    rows: list[WeightRow] = [
        {"name": "all of these weights", "tokens": sum(sums["tokens"] for _, sums in sources) or None, **figures}
    ]
    parts = [(f"source {name}", sums) for name, sums in sources[:MAX_SOURCES]]
    compared = (facts["config"].get("weights") or {}).get("method", "pear") == "pear"
    first, second = ("target against itself, exact", "target against itself, scored again")
    if not compared:
        first, second = ("rows that were scored again, at first", "rows that were scored again, the second time")
    parts.append((first, weigh.get("self_weights") or weigh.get("control") or {}))
    parts.append((second, weigh.get("self_weights_repeat") or weigh.get("control_twice") or {}))
    for name, sums in parts:
        if sums.get("tokens"):
            rows.append({"name": name, "tokens": sums["tokens"], **WeightTotals.from_json(sums).figures()})
    return rows


def aligned_rows(facts: Facts) -> list[JsonObject]:
    """A line for each source whose behavior policy has another tokenizer: how much of its rows is compared."""
    from grape_service.weigh.counts import AlignedCounts

    aligned = (facts["counts"].get("weigh") or {}).get("aligned") or {}
    found = ((name, AlignedCounts.from_json(counts)) for name, counts in sorted(aligned.items()))
    return [{"name": name, **vars(counts), **counts.figures()} for name, counts in found][:MAX_SOURCES]


def scoring_noise(facts: Facts) -> float | None:
    """Root mean square difference per token between two scorings by the target; None where it scored nothing again."""
    weigh = facts["counts"].get("weigh") or {}
    tokens = (weigh.get("self_weights_repeat") or weigh.get("control_twice") or {}).get("tokens")
    return (weigh["noise_squares"] / tokens) ** 0.5 if tokens else None


@dataclass
class EngineRow:
    """What scoring took of one model on one engine."""

    model: str
    engine: str
    replicas: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return share(self.tokens, self.seconds)


def engine_rows(facts: Facts) -> list[EngineRow]:
    """What scoring took, by model and engine."""
    found: dict[tuple[str, ...], EngineRow] = {}
    for engine in facts["statistics"].get("engines") or []:
        name = f"{engine['engine']} {engine['version']} on {engine['device']}, {engine['dtype']}"
        row = found.setdefault((engine["policy_id"], name), EngineRow(engine["model"], name))
        row.replicas += 1
        row.tokens += int(engine["stats"].get("tokens", 0))
        row.seconds += engine["stats"].get("seconds", 0.0)
    return list(found.values())


def _select_figures(select: SelectReport, config: SelectConfig) -> dict[str, plots.Figure]:
    names = select["names"]
    figures = {"lengths": plots.lengths(select["lengths"], select["kept_lengths"])}
    if not select["contested"]:
        return figures
    rates = [share(wins, present) for wins, present in zip(select["wins"], select["prompts_with"], strict=True)]
    agree = sorted(select["agree"].items(), key=lambda item: -item[1])
    words = {TURN_END: "turn end not counted" if config.count_turn_end else "turn end counted"}
    labels = [*(words.get(name, name) for name, _ in agree), "random (expected)"]
    shares = [*(share(count, compared_prompts(select, name)) for name, count in agree), select["chance"]]
    rules = {f"this selection, {select['winner_tokens']:.0f} tokens": select["wins"]}
    for name, _ in agree:
        tokens = share(select["picked_tokens"][name], compared_prompts(select, name))
        rules[f"{words.get(name, name)}, {tokens:.0f} tokens"] = select["picked"][name]
    figures |= {
        "scores": plots.scores(names, select["scores"]),
        "margins": plots.margins(names, select["margins"]),
        "wins": plots.bars(names, [round(rate, 4) for rate in rates], "prompts won of those it is in", percent=True),
        "length_scores": plots.length_scores(select["length_scores"]),
        "agree": plots.bars(labels, [round(value, 4) for value in shares], "same choice", percent=True),
        "picked": plots.picked(rules, names),
    }
    if len(names) > 1:
        figures["matrix"] = plots.win_matrix(names, select["beats"])
    return figures


def _weight_figures(weights: WeightsReport, clip: list[float] | None) -> dict[str, plots.Figure]:
    if not any(map(sum, weights["weights"])):
        return {}
    return {
        "weights": plots.weights(weights["names"], weights["weights"]),
        **({"ratios": plots.ratios(weights["ratios"], clip)} if any(weights["ratios"]) else {}),
        "positions": plots.positions(weights),
    }


TURN_END = "turn end the other way"
KIND_NAMES = {"closest": "Closest choice", "clearest": "Clearest choice", "random": "Random prompt"}


def shown_modes(examples: Sequence[PromptExample]) -> list[tuple[int, str]]:
    """What tokens can be shaded by, of which any candidate has values; the page's script knows them by their place."""
    there = [candidate for example in examples for candidate in example["candidates"]]
    return [(n, name) for n, (key, name) in enumerate(MODES.items()) if any(c.get(key) is not None for c in there)]


def _shown(example: PromptExample, select: SelectConfig) -> JsonObject:
    """An example cut to what a page shows."""
    candidates = example["candidates"]
    kept = [c for c in candidates if c["kept"]]
    others = [c for c in candidates if not c["kept"]]
    shown = [*kept, *others][:MAX_CANDIDATES]
    return {
        "kind": KIND_NAMES[example["kind"]],
        "prompt_id": example["prompt_id"],
        "prompt": cut(example["prompt"], MAX_TEXT),
        "more": len(candidates) - len(shown),
        "candidates": [{**c, "tokens": list(_tokens(c)), "reason": reason_of(c, candidates, select)} for c in shown],
    }


def _tokens(candidate: ShownCandidate) -> Iterator[JsonObject]:
    values = [candidate.get(key) for key in MODES]
    for place, text in enumerate(candidate["texts"]):
        numbers = [row[place] if row is not None and place < len(row) else None for row in values]
        yield {"text": cut(text, 200), "numbers": numbers}


def report_page(release: Release, regenerate: bool = False) -> str:
    """The page that a version was published with; where it has none, or to `regenerate` it, one from its manifest, with
    examples where the workspace still has the candidates."""
    if not regenerate:
        try:
            return release.storage.read(f"{release.folder}/report.html").decode()
        except FileNotFoundError:
            pass
    job = job_of_version(all_rounds(release.storage, release.name), release.version)
    return render_page(facts_of_manifest(release.manifest), examples_of(release), job)


def examples_of(release: Release) -> list[PromptExample]:
    """The report's examples read again; none where the workspace or the statistics lack them, or where the method needs
    the target's tokenizer, which is gone."""
    select = (release.manifest.statistics.get("report") or {}).get("select")
    pool = open_scored_pool(release)
    if not select or pool is None:
        return []
    chosen: ExampleChoice = select["examples"]
    context = ExampleContext(pool.workspace, pool.store, pool.select, pool.tokenizer)
    prompts: dict[str, PromptExample] = {}
    for partition, ids in chosen_by_partition(chosen, pool.num_partitions).items():
        shards, final = shard_paths(pool.prepared, partition), release_rows(release, ids)
        try:
            prompts |= read_examples(context, ExamplePartition(partition, shards, ids, final))
        except UserError:
            return []
    try:
        token_bytes: TokenBytes | None = pool.renderer().token_bytes
    except UserError:
        token_bytes = None
    return examples_of_kinds(prompts, chosen, token_bytes)


def render_comparison(found: JsonObject) -> str:
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
