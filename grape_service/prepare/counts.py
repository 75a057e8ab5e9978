"""Counts of prepare: of a piece, of a partition, of the whole; JSON-able, and all the driver holds."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Self

import numpy as np
import numpy.typing as npt

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.pool.column_types import Kind, join_columns
from grape_service.pool.outcomes import TOO_LONG, TRUNCATED
from grape_service.prepare.deal import Dealt, bounds_array
from grape_service.prepare.groups import GroupCounts, check_columns
from grape_service.prepare.plan import PreparePlan, row_path
from grape_service.rows.columns import OUR_COLUMNS
from grape_service.rows.counts import check_sum
from grape_service.storage.slices import SliceFiles

MAX_NAMED_SOURCES = 4096
MAX_OTHER_COLUMNS = 1000
SAME_CONTENT = "duplicate candidate"
INTENDED = frozenset({SAME_CONTENT, TRUNCATED, TOO_LONG})
"""Reasons for which rows are left out on purpose: they say nothing against the pool."""


@dataclass
class Example:
    """The first row that was rejected for a reason."""

    file: str
    row: int
    detail: str | None = None


@dataclass
class Rejects:
    """Rows that cannot be used, by reason, with an example of each."""

    by_reason: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Example] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_reason.values())

    def count(self, reason: str, example: Example, rows: int = 1) -> None:
        """Count rows; of two examples the one of the first file and row stays."""
        self.by_reason[reason] = self.by_reason.get(reason, 0) + rows
        old = self.examples.get(reason)
        if old is None or (example.file, example.row) < (old.file, old.row):
            self.examples[reason] = example

    def add(self, other: Rejects) -> None:
        """Count another's rows too."""
        for reason, rows in other.by_reason.items():
            self.count(reason, other.examples[reason], rows)

    def of(self, reasons: Iterable[str]) -> Rejects:
        """Those with one of some reasons."""
        wanted = [reason for reason in self.by_reason if reason in set(reasons)]
        return Rejects(
            {reason: self.by_reason[reason] for reason in wanted}, {reason: self.examples[reason] for reason in wanted}
        )

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        return cls(value["by_reason"], {reason: Example(**example) for reason, example in value["examples"].items()})


@dataclass
class PieceCounts:
    """What a map task found in a piece; `dealt/piece-k.json`."""

    piece: int
    rows_in: int = 0
    """Candidates, and rows that are unusable as a whole."""
    filtered: int = 0
    rows: int = 0
    tokens: int = 0
    rejects: dict[str, int] = field(default_factory=dict)
    """By reason; what is wrong with each row is in the map's rejects."""
    bounds: list[list[int]] = field(default_factory=list)
    """Of the slices of each Arrow file of rows; see deal.py."""
    num_reject_files: int = 0
    segment_lines: list[int] = field(default_factory=list)
    """Places of each segment: lines of a .jsonl, rows of others."""
    groups: dict[int, GroupCounts] = field(default_factory=dict)
    """By index in the config's pool.groups."""
    other_columns: dict[str, Kind] = field(default_factory=dict)
    message_fields: list[str] = field(default_factory=list)

    @property
    def num_files(self) -> int:
        """Arrow files of rows."""
        return len(self.bounds)

    def to_json(self) -> JsonObject:
        return {**asdict(self), "groups": {str(index): asdict(group) for index, group in self.groups.items()}}

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        groups = {int(index): GroupCounts(**group) for index, group in value["groups"].items()}
        return cls(**{**value, "groups": groups})


@dataclass
class ShardCounts:
    """One shard of a partition."""

    rows: int
    tokens: int
    loss_tokens: int


@dataclass
class PartitionCounts:
    """What a reduce task wrote; `partitions/<partition>.json`."""

    partition: str
    shards: list[ShardCounts] = field(default_factory=list)
    rows: int = 0
    prompts: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    max_tokens: int = 0
    """Tokens of the longest row."""
    truncated: int = 0
    prompt_sizes: dict[str, int] = field(default_factory=dict)
    """Prompts by their number of candidates."""
    duplicates: Rejects = field(default_factory=Rejects)
    """Rows that reduce left out: duplicates, and ids that name two things."""
    piece_rejects: Rejects = field(default_factory=Rejects)
    """Rejects of the pieces whose reject tables this task wrote."""
    used_ids: str = ""
    """Token ids with loss, see `pack_ids`."""
    sources: dict[str, int] = field(default_factory=dict)
    without_source: int = 0
    recorded: int = 0
    """Rows with recorded log-probabilities."""
    sampling: dict[str, int] = field(default_factory=dict)
    """Rows with recorded log-probabilities, by their sampling settings as JSON; 'null' without any."""

    def to_json(self) -> JsonObject:
        return asdict(self)

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        value = dict(value)
        value["shards"] = [ShardCounts(**shard) for shard in value["shards"]]
        for name in ("duplicates", "piece_rejects"):
            value[name] = Rejects.from_json(value[name])
        return cls(**value)


def pack_ids(ids: npt.NDArray[np.integer]) -> str:
    """The set of some token ids, as base64 of a bitmap."""
    used = np.zeros(int(ids.max(initial=-1)) + 1, dtype=bool)
    used[ids] = True
    return base64.b64encode(np.packbits(used, bitorder="little").tobytes()).decode()


def unpack_ids(packed: str) -> npt.NDArray[np.int64]:
    """The token ids of a set from `pack_ids`, ascending."""
    bits = np.unpackbits(np.frombuffer(base64.b64decode(packed), dtype=np.uint8), bitorder="little")
    return np.flatnonzero(bits)


def union_of_ids(packed: Iterable[str]) -> str:
    """The union of sets from `pack_ids`."""
    union = np.zeros(0, dtype=np.uint8)
    for one in packed:
        bits = np.frombuffer(base64.b64decode(one), dtype=np.uint8)
        longer, shorter = (union, bits) if len(union) >= len(bits) else (bits.copy(), union)
        longer = longer.copy()
        longer[: len(shorter)] |= shorter
        union = longer
    return base64.b64encode(union.tobytes()).decode()


def largest(counts: dict[str, int], most: int = MAX_NAMED_SOURCES) -> dict[str, int]:
    """The `most` largest counts, by name."""
    names = sorted(counts, key=lambda name: (-counts[name], name))[:most]
    return {name: counts[name] for name in sorted(names)}


@dataclass
class MapSummary:
    """The pieces' counts in one."""

    rows_in: int = 0
    filtered: int = 0
    rows: int = 0
    tokens: int = 0
    rejected: int = 0
    dealt: Dealt = field(default_factory=lambda: Dealt(SliceFiles([], np.zeros((0, 2), np.int64)), 0, 0))
    """The pieces' rows, as the newest level has them."""
    num_reject_files: list[int] = field(default_factory=list)
    """Arrow files of each piece's rejects."""
    first_rows: list[list[int]] = field(default_factory=list)
    """[piece][segment]: the row of its file with which a segment begins."""
    other_columns: dict[str, Kind] = field(default_factory=dict)
    """Under the pool's names."""
    message_fields: list[str] = field(default_factory=list)
    groups: list[GroupCounts] = field(default_factory=list)
    """In the order of the config's pool.groups."""


def summarise_map(plan: PreparePlan, counts: Iterable[PieceCounts], config: Config) -> MapSummary:
    """Join the counts of all pieces, in their order, as they come.

    Raises UserError where no row has a column that pool.where or the config's names need, or all have too many.
    """
    summary = MapSummary(groups=[GroupCounts() for _ in config.pool.groups])
    fields: set[str] = set()
    lines_before = [0] * len(plan.files)
    paths: list[str] = []
    bounds: list[npt.NDArray[np.int64]] = []
    for piece, one in zip(plan.pieces, counts, strict=True):
        assert one.piece == piece.index, "every piece is counted once"
        check_sum(
            f"candidates of {piece.name}", one.rows_in, {"read": one.rows, "filtered": one.filtered, **one.rejects}
        )
        summary.rows_in += one.rows_in
        summary.filtered += one.filtered
        summary.rows += one.rows
        summary.tokens += one.tokens
        summary.rejected += sum(one.rejects.values())
        paths += [row_path(plan, piece, number) for number in range(one.num_files)]
        bounds += [np.array(of_file) for of_file in one.bounds]
        summary.num_reject_files.append(one.num_reject_files)
        fields.update(one.message_fields)
        for index, group in one.groups.items():
            summary.groups[index].add(group)
        join_columns(summary.other_columns, one.other_columns)
        refuse_too_many(summary.other_columns, plan.pool)
        first_rows = []
        for segment, lines in zip(piece.segments, one.segment_lines, strict=True):
            first_rows.append(lines_before[segment.file])
            lines_before[segment.file] += lines
        summary.first_rows.append(first_rows)
    bits = plan.level_bits[0]
    summary.dealt = Dealt(SliceFiles(paths, bounds_array(bounds, len(paths), bits)), 0, bits)
    summary.message_fields = sorted(fields)
    check_columns(config, summary.groups)
    return summary


def refuse_too_many(other_columns: dict[str, Kind], pool: str) -> None:
    """Raises UserError where a pool has more other columns than a table can have."""
    if len(other_columns) > MAX_OTHER_COLUMNS:
        raise UserError(f"the pool '{pool}' has more than {MAX_OTHER_COLUMNS} other columns: put them into one object")


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
