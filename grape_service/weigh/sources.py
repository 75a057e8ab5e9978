"""Whether each source of a pool has a behavior, known before anything is scored."""

from __future__ import annotations

from collections.abc import Iterable

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.prepare.counts import MAX_NAMED_SOURCES
from grape_service.rows.columns import NO_SOURCE

MAX_NAMED = 12


def missing_sources(config: Config, sources: dict[str, int], without_source: int) -> dict[str, int]:
    """Of the sources that may be kept, those without a behavior, with their rows; NO_SOURCE for rows without one."""
    behavior = config.behavior
    if config.weights is None or behavior is None or behavior.sources is None:
        return {}
    wanted = config.select.method.removeprefix("source:") if config.select.method.startswith("source:") else None
    rows = {**sources, **({NO_SOURCE: without_source} if without_source else {})}
    return {
        name: count
        for name, count in rows.items()
        if name not in behavior.sources and count and (wanted is None or name == wanted)
    }


def unknown_sources(config: Config, sources: dict[str, int], without_source: int) -> str | None:
    """A sentence on the names in behavior.sources that are no source of the pool; None where all of them are."""
    behavior = config.behavior
    if config.weights is None or behavior is None or behavior.sources is None:
        return None
    unknown = sorted(set(behavior.sources) - set(sources))
    if not unknown or len(sources) >= MAX_NAMED_SOURCES:  # others have no counts
        return None
    there = ", ".join([*list(sources)[:MAX_NAMED], *([NO_SOURCE] if without_source else [])])
    return f"behavior.sources names {', '.join(unknown)}, which no row of the pool has as its source: there are {there}"


def refuse_unrecorded(config: Config, recorded: int, columns: Iterable[str] = ()) -> None:
    """Raises UserError where the behavior of all rows is a column and `recorded`, the rows that have it, is 0."""
    if config.weights is None or config.behavior is None or config.behavior.column is None or recorded:
        return
    known = ", ".join(sorted(columns)[:MAX_NAMED])
    raise UserError(
        f"behavior.column names '{config.behavior.column}', which no row of the pool has beside response_ids"
        f"{f' (columns: {known})' if known else ''}: name the column with the log-probabilities that were recorded "
        "while sampling, or give another behavior"
    )


def refuse_missing_sources(config: Config, sources: dict[str, int], without_source: int) -> None:
    """Raises UserError that names every source of a pool without a behavior, where `behavior.missing` is error."""
    missing = missing_sources(config, sources, without_source)
    if not missing or config.behavior is None or config.behavior.missing != "error":
        return
    named = [f"{name} ({count:,} rows)" for name, count in list(missing.items())[:MAX_NAMED]]
    more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    known = ", ".join(list(config.behavior.sources or {})[:MAX_NAMED])
    raise UserError(
        f"behavior.sources has no behavior for these sources of the pool: {', '.join(named)}{more}; it has {known}: "
        "add them (none for a source without a policy), filter them with pool.where, or set behavior.missing to "
        "uniform or drop"
    )
