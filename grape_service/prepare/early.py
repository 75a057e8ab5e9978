"""What a look at a sample of the pool can refuse before anything is started: columns that the config mistypes."""

from __future__ import annotations

from grape_service.config.pool import POOL_COLUMNS, PoolGroup
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.pool.contract import group_contracts
from grape_service.pool.filters import nearest
from grape_service.pool.layout import RESPONSE_COLUMN
from grape_service.pool.listing import list_pool
from grape_service.prepare.groups import MAX_COLUMNS_NAMED

NEEDED = ("prompt", "response", "responses")
"""Columns of ours without which no row is a candidate."""


def refuse_mistyped(config: Config) -> None:
    """Raises UserError where the config names a column that no sampled row of its files has: one that every row needs
    or a filter looks at, or one that is nearly the name of a column that is there."""
    files = list_pool(config).files
    for group, contract in zip(config.pool.groups, group_contracts(files, config), strict=True):
        names = {name for layout in contract.layouts for name in layout.names}
        if not names:
            continue
        known = names | {RESPONSE_COLUMN, *POOL_COLUMNS, *(f"pool_{name}" for name in names)}
        for ours, theirs in group.columns.items():
            for name in [theirs] if isinstance(theirs, str) else theirs:
                if {name, name.split(".")[0]} & names:
                    continue
                if ours in NEEDED or nearest(name, names, 0.75):
                    raise _mistyped(f"pool.columns.{ours}", name, names, group, config)
        for condition in group.where:
            if not {condition.column, condition.column.split(".")[0]} & known:
                raise _mistyped("pool.where", condition.column, names, group, config)


def _mistyped(where: str, name: str, names: set[str], group: PoolGroup, config: Config) -> UserError:
    near = nearest(name, names)
    hint = f"; did you mean '{near}'?" if near else ""
    of = f" of '{group.path}'" if len(config.pool.groups) > 1 else ""
    return UserError(
        f"{where} names the column '{name}', which no row{of} of a sample has{hint} "
        f"(columns: {', '.join(sorted(names)[:MAX_COLUMNS_NAMED])})"
    )
