"""What reduce tasks and finish need to know of all pieces together; small, whatever the pool's size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from grape_service.config import Config
from grape_service.errors import UserError
from grape_service.pools.column_types import Kind, join_columns
from grape_service.pools.filters import nearest
from grape_service.prepare.counts import PieceCounts, add_counts
from grape_service.prepare.plan import PreparePlan
from grape_service.schemas import OUR_COLUMNS

MAX_COLUMNS_NAMED = 12


@dataclass
class MapSummary:
    """The pieces' counts in one."""

    rows_in: int = 0
    filtered: int = 0
    rows: int = 0
    tokens: int = 0
    rejected: int = 0
    num_files: list[int] = field(default_factory=list)
    """Arrow files of each piece's rows."""
    num_reject_files: list[int] = field(default_factory=list)
    """Arrow files of each piece's rejects."""
    first_rows: list[list[int]] = field(default_factory=list)
    """[piece][segment]: the row of its file with which a segment begins."""
    other_columns: dict[str, Kind] = field(default_factory=dict)
    """Under the pool's names."""
    message_fields: list[str] = field(default_factory=list)


def summarise_map(plan: PreparePlan, counts: Iterable[PieceCounts], config: Config) -> MapSummary:
    """Join the counts of all pieces, in any order.

    Raises UserError where no row has a column that pool.where or the config's names need.
    """
    summary = MapSummary()
    columns: set[str] = set()
    fields: set[str] = set()
    filter_columns: dict[str, int] = {}
    num_parsed = 0
    lines_before = [0] * len(plan.files)
    by_piece = sorted(counts, key=lambda piece: piece.piece)
    assert [one.piece for one in by_piece] == [piece.index for piece in plan.pieces], "every piece is counted once"
    for piece, one in zip(plan.pieces, by_piece, strict=True):
        assert one.rows_in == one.filtered + one.rows + sum(one.rejects.values()), "no row of a piece is lost"
        summary.rows_in += one.rows_in
        summary.filtered += one.filtered
        summary.rows += one.rows
        summary.tokens += one.tokens
        summary.rejected += sum(one.rejects.values())
        summary.num_files.append(one.num_files)
        summary.num_reject_files.append(one.num_reject_files)
        num_parsed += one.num_parsed
        columns.update(one.columns)
        fields.update(one.message_fields)
        add_counts(filter_columns, one.filter_columns)
        join_columns(summary.other_columns, one.other_columns)
        first_rows = []
        for segment, lines in zip(piece.segments, one.segment_lines, strict=True):
            first_rows.append(lines_before[segment.file])
            lines_before[segment.file] += lines
        summary.first_rows.append(first_rows)
    summary.message_fields = sorted(fields)
    if num_parsed:
        _check_columns(config, columns, filter_columns)
    return summary


def _check_columns(config: Config, columns: set[str], filter_columns: dict[str, int]) -> None:
    known = ", ".join(sorted(columns)[:MAX_COLUMNS_NAMED])
    for column, rows in filter_columns.items():
        if rows == 0:
            near = nearest(column, columns)
            hint = f"; did you mean '{near}'?" if near else ""
            raise UserError(f"pool.where names the column '{column}', which no row has{hint} (columns: {known})")
    theirs = config.pool.columns
    prompt = theirs.get("prompt", "prompt")
    if prompt not in columns:
        raise UserError(_missing_column("prompt", prompt, columns, known))
    responses = [theirs.get(name, name) for name in ("response", "responses")]
    if not columns & set(responses):
        raise UserError(_missing_column("response", responses[0], columns, known))


def _missing_column(ours: str, theirs: str, columns: set[str], known: str) -> str:
    near = nearest(theirs, columns)
    hint = f", such as '{near}'" if near else ""
    return (
        f"no row of the pool has the column '{theirs}' (columns: {known}): "
        f"say under pool.columns.{ours} which one holds the {ours}{hint}"
    )


def column_names(other_columns: Iterable[str]) -> dict[str, str]:
    """The pool's other columns to their names in shards: one that is ours gets the prefix pool_."""
    others = sorted(other_columns)
    taken = set(OUR_COLUMNS) | {name for name in others if name not in OUR_COLUMNS}
    names = {}
    for name in others:
        new = name
        if name in OUR_COLUMNS:
            new = f"pool_{name}"
            while new in taken:
                new = f"pool_{new}"
            taken.add(new)
        names[name] = new
    return names
