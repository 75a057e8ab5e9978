"""What `grape check` says of a pool, from a look into it: all that a run would refuse, and what it would leave out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pyarrow as pa

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate.finding import Finding, Table, look
from grape_service.estimate.look import GroupLook, PoolLook, repeated
from grape_service.pool.listing import passed_over_text
from grape_service.prepare.counts import INTENDED
from grape_service.prepare.groups import check_columns
from grape_service.rows.candidate import Rejection, Rendered
from grape_service.rows.columns import NO_SOURCE, OUR_COLUMNS
from grape_service.select.limits import check_keep_column, keep_column, kept_of_prompts
from grape_service.weigh.sources import missing_sources, refuse_missing_sources

SHOWN_SIZES = 8


def pool_findings(config: Config, found: PoolLook) -> Iterator[Finding | Table]:
    """Files, shapes, columns, filters, candidates for each prompt, sources, and what repeats."""
    yield look("pool", lambda: _pool(found))
    for group in found.groups:
        shapes = [f"{shape}{f' ({n} files)' * (n > 1)}" for shape, n in sorted(group.counts.shapes.items())]
        where = f"shape of {group.group.path}" if len(found.groups) > 1 else "shape"
        yield Finding(where, "warning" if group.counts.missing else "ok", "; ".join(shapes) or "no rows")
    yield Table("groups", [_group_row(group) for group in found.groups])
    yield look("columns", lambda: _columns(config, found))
    yield look("prompts", lambda: _prompts(config, found))
    yield Table("sources", _source_rows(config, found))
    if config.weights is not None and config.behavior is not None and config.behavior.sources is not None:
        yield look("sources", lambda: _sources(config, found))


def dry_run(config: Config, found: PoolLook, rendered: list[Rendered | Rejection]) -> Finding:
    """Why rows cannot be used: all that was read, and the first rows of each group rendered."""
    first = [item for group in found.groups for item in group.first]
    reasons: Counter[str] = sum((group.rejects for group in found.groups), Counter())
    examples = {reason: text for group in reversed(found.groups) for reason, text in group.examples.items()}
    usable = []
    for item, result in zip(first, rendered, strict=True):
        if isinstance(result, Rejection):
            reasons[result.reason] += 1
            examples.setdefault(result.reason, result.detail or "")
        else:
            usable.append((item, result))
    reasons += repeated(usable)
    rows = sum(group.counts.rows_in for group in found.groups)
    damaged = sum(count for reason, count in reasons.items() if reason not in INTENDED)
    what = f"of {rows:,} rows read, {len(first):,} of them rendered"
    if not reasons:
        return Finding("rejects", "ok", f"none {what}")
    texts = [
        f"{reason} ({count}{', first ' + examples[reason] if examples.get(reason) else ''})"
        for reason, count in reasons.most_common()
    ]
    detail = f"{'; '.join(texts)}; {what}"
    if damaged > config.pool.max_reject_share * max(1, rows):
        return Finding("rejects", "error", f"more than pool.max_reject_share cannot be used: {detail}")
    return Finding("rejects", "warning", detail)


def _extent(found: PoolLook) -> str:
    return "all rows read" if found.is_whole else "the first rows read"


def _pool(found: PoolLook) -> tuple[str, str]:
    files = sum(group.files for group in found.groups)
    detail = f"{files:,} file{'s' * (files != 1)}, {found.candidates:,} candidates ({_extent(found)})"
    if found.listing.passed_over:
        detail += f"; passed over: {passed_over_text(found.listing.passed_over)}"
    rows = sum(group.counts.rows_in for group in found.groups)
    filtered = sum(group.counts.filtered for group in found.groups)
    if rows == 0:
        return "error", f"{detail}: the pool has no rows"
    if found.candidates == 0 and filtered == rows:
        return ("error" if found.is_whole else "warning"), f"pool.where leaves none of the {rows:,} rows: loosen it"
    if found.candidates == 0:
        reasons = sum((group.rejects for group in found.groups), Counter()).most_common(3)
        texts = ", ".join(f"{reason} ({count})" for reason, count in reasons)
        return "error", f"{detail}: none of the rows can be used: {texts}"
    return "ok", detail


def _group_row(group: GroupLook) -> dict[str, object]:
    return {
        "path": group.group.path,
        "files": group.files,
        "rows": f"{group.counts.rows_in:,}{'' if group.is_whole else ' and more'}",
        "shapes": group.counts.shapes,
        "prompts": len(group.prompts),
        "candidates": group.candidates,
        "filtered": group.counts.filtered,
        "rejected": sum(group.rejects.values()),
    }


def _columns(config: Config, found: PoolLook) -> tuple[str, str]:
    """The columns that the config names; one that rows further on may have is a warning."""
    certain = found.is_whole
    try:
        check_columns(config, [group.counts for group in found.groups])
        _check_keep(config, found)
    except UserError as error:
        return ("error" if certain else "warning"), str(error)
    names = sorted({column for group in found.groups for column in group.counts.columns})
    return "ok", ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def _check_keep(config: Config, found: PoolLook) -> None:
    name = keep_column(config.select)
    first = [item.candidate for group in found.groups for item in group.first]
    if name is None or not first:
        return
    theirs = {f"pool_{other}" if other in OUR_COLUMNS else other for group in found.groups for other in group.other}
    check_keep_column(config.select, sorted(theirs))
    names = list(dict.fromkeys(candidate.prompt_id for candidate in first))
    table = pa.table(
        {
            "prompt_id": [candidate.prompt_id for candidate in first],
            name: [candidate.other.get(name.removeprefix("pool_"), candidate.other.get(name)) for candidate in first],
        }
    )
    places = {prompt_id: place for place, prompt_id in enumerate(names)}
    kept_of_prompts(
        table, pa.array([places[c.prompt_id] for c in first], pa.int64()).to_numpy(), len(names), config.select
    )


def _prompts(config: Config, found: PoolLook) -> tuple[str, str]:
    sizes = found.sizes()
    prompts = sum(sizes.values())
    shown = ", ".join(f"{size}: {count:,}" for size, count in list(sizes.items())[:SHOWN_SIZES])
    more = ", …" if len(sizes) > SHOWN_SIZES else ""
    detail = f"{prompts:,} ({_extent(found)}); prompts by their number of distinct responses: {shown}{more}"
    warnings = []
    few = sizes.get(1, 0)
    if few:
        warnings.append(f"{few:,} of {prompts:,} prompts have one response: there is nothing to choose")
    twins = found.twins()
    if twins:
        warnings.append(
            f"{twins:,} prompts differ from another only in white space or in a system turn, and compete apart: "
            "make them equal, or give them one prompt_id"
        )
    least = config.select.min_candidates
    if least is not None and found.is_whole and all(size < least for size in sizes):
        return "error", f"{detail}; select.min_candidates {least} leaves none of them"
    return ("warning" if warnings else "ok"), "; ".join([detail, *warnings])


def _source_rows(config: Config, found: PoolLook) -> list[dict[str, object]]:
    """Sources of the pool and of behavior.sources side by side, with candidates."""
    behavior = config.behavior
    known = (behavior.sources if behavior is not None else None) or {}
    names = sorted({*found.sources, *known}, key=lambda name: (name == NO_SOURCE, name))
    rows: list[dict[str, object]] = []
    for name in names:
        own = None if behavior is None else behavior.of_source(None if name == NO_SOURCE else name)
        policy = getattr(own, "model", None) or (f"column {column}" if (column := getattr(own, "column", None)) else "")
        rows.append({"source": name, "candidates": found.sources.get(name, 0), "behavior": policy or "none"})
    return rows


def _sources(config: Config, found: PoolLook) -> tuple[str, str]:
    sources = dict(found.sources)
    without = sources.pop(NO_SOURCE, 0)
    refuse_missing_sources(config, sources, without)
    behavior = config.behavior
    assert behavior is not None
    unused = sorted(set(behavior.sources or {}) - set(sources))
    if unused and found.is_whole:
        return "warning", f"behavior.sources names {', '.join(unused)}, which no row of the pool has as its source"
    missing = missing_sources(config, sources, without)
    if missing:
        return "warning", f"without a behavior: {', '.join(missing)}; behavior.missing is {behavior.missing}"
    return "ok", "every source of the pool has a behavior"
