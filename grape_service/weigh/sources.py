"""Whether each source of a pool has a behavior, known before anything is scored."""

from __future__ import annotations

from grape_service.config.schema import Config
from grape_service.errors import UserError
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
        "add them, filter them with pool.where, or set behavior.missing to uniform or drop"
    )
