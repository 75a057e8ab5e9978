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
from grape_service.select.limits import check_keep_column, check_source, keep_column, kept_of_prompts
from grape_service.weigh.behavior import missing_sources, refuse_missing_sources, refuse_unrecorded, unknown_sources

SHOWN_SIZES = 8


def pool_findings(config: Config, found: PoolLook) -> Iterator[Finding | Table]:
    """Files, shapes, columns, filters, candidates for each prompt, sources, and what repeats."""
    columns = look("columns", lambda: _columns(config, found))
    if columns.status != "ok":
        yield columns  # it says why there are no rows below
    yield look("pool", lambda: _pool(found))
    for group in found.groups:
        shapes = [f"{shape}{f' ({n} files)' * (n > 1)}" for shape, n in sorted(group.counts.shapes.items())]
        where = f"shape of {group.group.path}" if len(found.groups) > 1 else "shape"
        yield Finding(where, "warning" if group.counts.missing else "ok", "; ".join(shapes) or "no rows")
    yield Table("groups", [_group_row(group) for group in found.groups])
    if columns.status == "ok":
        yield columns
    yield look("prompts", lambda: _prompts(config, found))
    yield Table("sources", _source_rows(config, found))
    if config.behavior is not None and config.behavior.has_recorded and config.weights is not None and found.candidates:
        yield look("recorded", lambda: _recorded(config, found))
    if config.weights is not None and config.behavior is not None and config.behavior.sources is not None:
        yield look("sources", lambda: _sources(config, found))


def dry_run(config: Config, found: PoolLook, rendered: list[Rendered | Rejection]) -> Finding:
    """Why rows cannot be used: of all that were read what cannot be a candidate, and of those that were rendered what
    has no tokens. The share of rejects is estimated from both."""
    chosen = [item for group in found.groups for item in group.chosen]
    before: Counter[str] = sum((group.rejects for group in found.groups), Counter())
    examples = {reason: text for group in reversed(found.groups) for reason, text in group.examples.items()}
    after: Counter[str] = Counter()
    usable = []
    for item, result in zip(chosen, rendered, strict=True):
        if isinstance(result, Rejection):
            after[result.reason] += 1
            examples.setdefault(result.reason, result.detail or "")
        else:
            usable.append((item, result))
    after += repeated(usable)
    rows = sum(group.counts.rows_in for group in found.groups)
    what = f"of {rows:,} rows read, {len(chosen):,} of them rendered"
    reasons = before + after
    if not reasons:
        return Finding("rejects", "ok", f"none {what}")
    texts = [f"{reason} ({count}{_first(examples.get(reason))})" for reason, count in reasons.most_common()]
    detail = f"{'; '.join(texts)}; {what}"
    is_known = found.is_whole and len(chosen) == found.candidates
    share, least = _reject_share(_damaged(before), rows, _damaged(after), len(chosen), found.is_whole, is_known)
    most = config.pool.max_reject_share
    about = f"{'' if is_known else 'about '}{share:.1%} of the pool's rows"
    if least > most:
        return Finding(
            "rejects", "error", f"{about} cannot be used, more than pool.max_reject_share {most:g}: {detail}"
        )
    if share > most:
        detail = f"{about} may be unusable, and a run stops above pool.max_reject_share {most:g}: {detail}"
    return Finding("rejects", "warning", detail)


def _first(example: str | None) -> str:
    return f", first {example}" if example else ""


def _damaged(reasons: Counter[str]) -> int:
    return sum(count for reason, count in reasons.items() if reason not in INTENDED)


def _reject_share(
    before: int, rows: int, after: int, rendered: int, is_whole: bool, is_known: bool
) -> tuple[float, float]:
    """(estimated share of rejects, what it is at least): rejects before rendering are a share of the rows that were
    read (all of them, where `is_whole`), those of rendering a share of the rows that were rendered (of all candidates,
    where `is_known`)."""
    early = before / max(1, rows)
    late = after / max(1, rendered)
    share = (before + after) / max(1, rows) if is_known else early + (1 - early) * late
    sampled = [(early, rows)] * (not is_whole) + [(late, rendered)] * (not is_known)
    error = sum(value * (1 - value) / max(1, number) for value, number in sampled) ** 0.5
    return share, share - 2 * error


def _extent(found: PoolLook) -> str:
    return "all rows read" if found.is_whole else "some rows of head, middle and end read"


def _pool(found: PoolLook) -> tuple[str, str]:
    files = sum(group.files for group in found.groups)
    detail = f"{files:,} file{'s' * (files != 1)}, {found.candidates:,} candidates ({_extent(found)})"
    looked = sum(group.files_read for group in found.groups)
    detail += f", {looked:,} of the files looked into" if looked < files else ""
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
        examples = {reason: text for group in reversed(found.groups) for reason, text in group.examples.items()}
        texts = ", ".join(f"{reason} ({count}{_first(examples.get(reason))})" for reason, count in reasons)
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
        if found.candidates:
            check_source(config.select, found.sources)
    except UserError as error:
        return ("error" if certain else "warning"), str(error)
    names = sorted({column for group in found.groups for column in group.counts.columns})
    return "ok", ", ".join(names[:20]) + (", …" if len(names) > 20 else "")


def _check_keep(config: Config, found: PoolLook) -> None:
    name = keep_column(config.select)
    first = [item.candidate for group in found.groups for item in group.chosen]
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
    most = max(sizes, default=0)
    if isinstance(config.select.keep, int) and sizes and config.select.keep > most:
        warnings.append(f"select.keep {config.select.keep} is more than any prompt has, which is {most} at most")
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


def _recorded(config: Config, found: PoolLook) -> tuple[str, str]:
    recorded = sum(group.recorded for group in found.groups)
    columns = {column for group in found.groups for column in group.counts.columns}
    try:
        refuse_unrecorded(config, recorded, columns)
    except UserError as error:
        is_certain = found.is_whole or (config.behavior is not None and config.behavior.column not in columns)
        return ("error" if is_certain else "warning"), str(error)
    return "ok", f"{recorded:,} of {found.candidates:,} candidates bring log-probabilities"


def _sources(config: Config, found: PoolLook) -> tuple[str, str]:
    sources = dict(found.sources)
    without = sources.pop(NO_SOURCE, 0)
    refuse_missing_sources(config, sources, without)
    behavior = config.behavior
    assert behavior is not None
    unknown = unknown_sources(config, sources, without)
    if unknown is not None and found.is_whole:
        return "warning", unknown
    missing = missing_sources(config, sources, without)
    if missing:
        return "warning", f"without a behavior: {', '.join(missing)}; behavior.missing is {behavior.missing}"
    return "ok", "every source of the pool has a behavior"
