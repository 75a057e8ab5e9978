"""What prepare finds in each group of files, and whether the config's columns are there: in a sample, and in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from grape_service.config.pool import POOL_COLUMNS, PoolGroup
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.pool.candidates import Normaliser
from grape_service.pool.column_names import PROMPTS
from grape_service.pool.contract import group_contracts
from grape_service.pool.filters import nearest
from grape_service.pool.layout import RESPONSE_COLUMN
from grape_service.pool.listing import list_pool
from grape_service.pool.meanings import refusal

MAX_COLUMNS_NAMED = 12
MAX_COLUMNS_KEPT = 1000


def add_counts(into: dict[str, int], counts: dict[str, int]) -> None:
    """Key by key sum."""
    for name, number in counts.items():
        into[name] = into.get(name, 0) + number


@dataclass
class GroupCounts:
    """What was found in the files of one group of the pool."""

    files: int = 0
    rows_in: int = 0
    """Candidates, and rows that are unusable as a whole."""
    filtered: int = 0
    num_parsed: int = 0
    """Rows that could be read, before anything is asked of them."""
    shapes: dict[str, int] = field(default_factory=dict)
    """Files by what a row of them is, in words."""
    missing: dict[str, int] = field(default_factory=dict)
    """Files in which no column holds a prompt or a response, by which."""
    columns: list[str] = field(default_factory=list)
    """Names of columns and of fields of responses, the first some hundred of each file."""
    unread: dict[str, int] = field(default_factory=dict)
    """Rows that have a column which means something and is not read, by the column."""
    filter_columns: dict[str, int] = field(default_factory=dict)
    """Candidates that have the column, for each that pool.where names."""

    def add_file(self, is_begin: bool, num_parsed: int, columns: Iterable[str], normaliser: Normaliser) -> None:
        """Count what was read of a file; its shape is counted where its beginning is read."""
        self.num_parsed += num_parsed
        self.columns = sorted({*self.columns, *columns, *normaliser.element_names, *normaliser.folders})
        add_counts(self.filter_columns, normaliser.filter_columns_seen)
        add_counts(self.unread, normaliser.unread.counts)
        if is_begin:
            self.files += 1
            if num_parsed:
                add_counts(self.shapes, {normaliser.layout.describe(): 1})
                if normaliser.layout.missing is not None:
                    add_counts(self.missing, {normaliser.layout.missing: 1})

    def add(self, other: GroupCounts) -> None:
        """Count another piece's files of the group too."""
        for name in ("files", "rows_in", "filtered", "num_parsed"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("shapes", "missing", "filter_columns", "unread"):
            add_counts(getattr(self, name), getattr(other, name))
        self.columns = sorted({*self.columns, *other.columns})[:MAX_COLUMNS_KEPT]


def check_columns(config: Config, found: list[GroupCounts]) -> None:
    """Raises UserError where the config names a column that no row has, no column holds prompts or responses, or one
    that means something is not read."""
    groups = config.pool.groups
    refuse_unread(config, found)
    read = [(group, counts) for group, counts in zip(groups, found, strict=True) if counts.num_parsed]
    for group, counts in read:
        for column, rows in counts.filter_columns.items():
            if rows == 0:
                raise UserError(
                    f"pool.where names the column '{column}', which {_no_row_has(column, [counts], group, config)}"
                )
    everywhere = config.pool.columns.items()
    for ours, theirs in everywhere:
        _check_mapped(ours, theirs, read, "pool.columns", config)
    if not isinstance(config.pool.path, str):
        for index, own in enumerate(config.pool.path):
            of_group = [(group, counts) for group, counts in read if group is groups[index]]
            for ours, theirs in own.columns.items():
                _check_mapped(ours, theirs, of_group, f"pool.path.{index}.columns", config)
    for group, counts in read:
        for ours in ("prompt",) if group.shape == "prompts" else ("prompt", "response"):
            name = group.columns.get(ours, ours)
            if counts.missing.get(ours, 0) == sum(counts.shapes.values()) > 0 and name not in counts.columns:
                raise UserError(_missing_column(ours, str(name), counts.columns, group, config))


def refuse_unread(config: Config, found: list[GroupCounts]) -> None:
    """Raises UserError where rows have a column that means something and nothing reads it."""
    for group, counts in zip(config.pool.groups, found, strict=True):
        if counts.unread:
            name = max(sorted(counts.unread), key=lambda name: counts.unread[name])
            of = f"'{group.path}'" if len(config.pool.groups) > 1 else "the pool"
            raise UserError(refusal(name, counts.unread[name], of))


def _check_mapped(
    ours: str, theirs: str | list[str], read: list[tuple[PoolGroup, GroupCounts]], where: str, config: Config
) -> None:
    for name in [theirs] if isinstance(theirs, str) else theirs:
        found = [counts for _, counts in read]
        if found and not any({name, name.split(".")[0]} & set(counts.columns) for counts in found):
            raise UserError(
                f"{where}.{ours} names the column '{name}', which {_no_row_has(name, found, read[0][0], config)}"
            )


def _no_row_has(name: str, found: list[GroupCounts], group: PoolGroup, config: Config) -> str:
    columns = {column for counts in found for column in counts.columns}
    near = nearest(name, columns, 0.6)
    hint = f"; did you mean '{near}'?" if near else ""
    of = f" of '{group.path}'" if len(config.pool.groups) > 1 and len(found) == 1 else ""
    return f"no row{of} has{hint} (columns: {', '.join(sorted(columns)[:MAX_COLUMNS_NAMED])})"


def _missing_column(ours: str, theirs: str, columns: Iterable[str], group: PoolGroup, config: Config) -> str:
    other = (*PROMPTS, group.columns.get("prompt")) if ours == "response" else (group.columns.get("response"),)
    near = nearest(theirs, set(columns) - set(other))
    hint = f", such as '{near}'" if near else ""
    known = ", ".join(sorted(columns)[:MAX_COLUMNS_NAMED])
    of = f"'{group.path}'" if len(config.pool.groups) > 1 else "the pool"
    return (
        f"no row of {of} has the column '{theirs}' (columns: {known}): "
        f"say under pool.columns.{ours} which one holds the {ours}{hint}"
    )


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
