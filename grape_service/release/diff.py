"""Two versions side by side: rows, choices, scores and weights.

Rows are dealt by prompt to buckets on disk, and a bucket at a time is joined, so memory does not grow with the
versions; from the token columns only a hash and sums are kept.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.display import short
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.load import Release
from grape_service.rows.columns import COMPARED, NO_SOURCE

ROWS_PER_BUCKET = 250_000
MAX_BUCKETS = 512
_COLUMNS = ["prompt_id", "candidate_id", "source", "grape_score", "input_ids", "loss_mask", "loss_weights"]


@dataclass(frozen=True)
class Shift:
    """How a number of each row moved, over rows that both versions hold and have it."""

    rows: int = 0
    mean_a: float = 0.0
    mean_b: float = 0.0
    mean_difference: float = 0.0
    mean_absolute_difference: float = 0.0
    largest_absolute_difference: float = 0.0


@dataclass(frozen=True)
class ChangedChoice:
    """A prompt that kept another response in b than in a."""

    prompt_id: str
    candidate_a: str
    candidate_b: str
    source_a: str | None
    source_b: str | None


@dataclass(frozen=True)
class Diff:
    """From version a to version b."""

    a: str
    b: str
    rows_a: int
    rows_b: int
    rows_added: int  # in b only, by prompt_id and candidate_id
    rows_removed: int
    rows_common: int
    tokens_changed: int  # rows in both whose token ids differ
    prompts_a: int
    prompts_b: int
    prompts_added: int
    prompts_removed: int
    prompts_changed: int  # in both, where b keeps a candidate in the place of one of a
    prompts_more: int  # in both, where b keeps all of a's candidates and more
    prompts_fewer: int  # in both, where b keeps some of a's candidates and no other
    sources: dict[str, list[int]]  # rows of a and of b by source, most first
    source_changes: list[dict[str, Any]]  # {from, to, prompts}, most frequent first
    scores: Shift
    weights: Shift  # mean loss weight of a row, over tokens with loss
    examples: list[ChangedChoice] = field(default_factory=list)
    columns_added: list[str] = field(default_factory=list)
    columns_removed: list[str] = field(default_factory=list)

    @property
    def prompts_common(self) -> int:
        """Prompts in both."""
        return self.prompts_a - self.prompts_removed

    @property
    def same_choice(self) -> int:
        """Prompts in both where neither keeps a candidate in the place of another: a smaller `keep` is no other
        choice."""
        return self.prompts_common - self.prompts_changed

    def to_json(self) -> JsonObject:
        """For --json."""
        return asdict(self)


@dataclass
class _Totals:
    added: int = 0
    removed: int = 0
    common: int = 0
    tokens_changed: int = 0
    prompts_a: int = 0
    prompts_b: int = 0
    prompts_added: int = 0
    prompts_removed: int = 0
    prompts_changed: int = 0
    prompts_more: int = 0
    prompts_fewer: int = 0
    kept: dict[str, list[int]] = field(default_factory=dict)
    sources: Counter[tuple[str | None, str | None]] = field(default_factory=Counter)
    examples: list[ChangedChoice] = field(default_factory=list)
    scores: list[npt.NDArray[np.float64]] = field(default_factory=list)
    weights: list[npt.NDArray[np.float64]] = field(default_factory=list)


def diff(a: Release, b: Release, max_examples: int = 20) -> Diff:
    """Compare two versions, of one dataset or of two. Raises UserError if one lacks the columns of a release."""
    rows = a.row_count + b.row_count
    buckets = min(MAX_BUCKETS, max(1, -(-rows // ROWS_PER_BUCKET)))
    totals = _Totals()
    with tempfile.TemporaryDirectory(prefix="grape-diff-") as folder:
        for side, release in (("a", a), ("b", b)):
            _deal(release, Path(folder), side, buckets)
        for bucket in range(buckets):
            left, right = (_read_bucket(Path(folder), side, bucket) for side in ("a", "b"))
            _compare(left, right, totals, max_examples)
    sources = [
        {"from": source, "to": target, "prompts": count}
        for (source, target), count in sorted(totals.sources.items(), key=lambda item: (-item[1], str(item[0])))
    ]
    names_a, names_b = ([column.name for column in release.manifest.columns] for release in (a, b))
    return Diff(
        a=a.reference,
        b=b.reference,
        rows_a=a.row_count,
        rows_b=b.row_count,
        rows_added=totals.added,
        rows_removed=totals.removed,
        rows_common=totals.common,
        tokens_changed=totals.tokens_changed,
        prompts_a=totals.prompts_a,
        prompts_b=totals.prompts_b,
        prompts_added=totals.prompts_added,
        prompts_removed=totals.prompts_removed,
        prompts_changed=totals.prompts_changed,
        prompts_more=totals.prompts_more,
        prompts_fewer=totals.prompts_fewer,
        sources=dict(sorted(totals.kept.items(), key=lambda item: (-sum(item[1]), item[0]))),
        source_changes=sources,
        scores=_shift(totals.scores),
        weights=_shift(totals.weights),
        examples=sorted(totals.examples, key=lambda item: item.prompt_id),
        columns_added=[name for name in names_b if name not in names_a],
        columns_removed=[name for name in names_a if name not in names_b],
    )


def render_text(found: Diff, prompts: Mapping[str, str] | None = None) -> str:
    """A diff for people; `prompts`: what its examples ask, by their ids. Text from a pool is escaped."""
    lines = [
        f"a  {found.a}  {found.rows_a:,} rows",
        f"b  {found.b}  {found.rows_b:,} rows",
        "",
        f"rows     +{found.rows_added:,} added, -{found.rows_removed:,} removed, {found.rows_common:,} in both"
        + (f", {found.tokens_changed:,} of them with other tokens" if found.tokens_changed else ""),
        f"prompts  +{found.prompts_added:,} added, -{found.prompts_removed:,} removed, "
        f"{found.prompts_changed:,} with another choice, {found.same_choice:,} with the same",
    ]
    if found.prompts_more or found.prompts_fewer:
        lines.append(
            f"keep     {found.prompts_more:,} prompts keep more candidates in b, {found.prompts_fewer:,} fewer: "
            "no other choice"
        )
    if found.columns_added or found.columns_removed:
        names = [f"+{_shown(name)}" for name in found.columns_added] + [
            f"-{_shown(name)}" for name in found.columns_removed
        ]
        lines.append(f"columns  {', '.join(names)}")
    for title, shift in (("scores", found.scores), ("weights", found.weights)):
        if shift.rows:
            lines.append(
                f"{title:<8} mean {shift.mean_a:.4f} -> {shift.mean_b:.4f}, mean |change| "
                f"{shift.mean_absolute_difference:.4f}, largest {shift.largest_absolute_difference:.4f} "
                f"({shift.rows:,} rows)"
            )
    if found.source_changes:
        lines += ["", "source of the choice, from -> to"]
        width = max(len(f"{change['prompts']:,}") for change in found.source_changes)
        lines += [
            f"  {change['prompts']:>{width},}  {_shown(change['from'])} -> {_shown(change['to'])}"
            for change in found.source_changes[:20]
        ]
    if found.examples:
        lines += ["", "prompts with another choice"]
        lines += [
            f"  {_shown(item.prompt_id)}: {_shown(item.candidate_a)} ({_shown(item.source_a)}) -> "
            f"{_shown(item.candidate_b)} ({_shown(item.source_b)})"
            + (f"\n    {short(prompts[item.prompt_id], 72)}" if prompts and item.prompt_id in prompts else "")
            for item in found.examples
        ]
    return "\n".join(lines)


def _deal(release: Release, folder: Path, side: str, buckets: int) -> None:
    """Write what of each row is compared to its prompt's bucket."""
    if not release.manifest.files:
        return
    missing = [name for name in _COLUMNS if name not in release.schema.names]
    if missing:
        raise UserError(f"{release.reference} has no column '{missing[0]}', so its choices cannot be compared")
    with contextlib.ExitStack() as stack:
        writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        for batch in release.batches(_COLUMNS):
            digest = _digest(batch)
            bucket_of_row = ragged_hash(*_bytes_of(batch["prompt_id"])) % np.uint64(buckets)
            for bucket in np.unique(bucket_of_row):
                if bucket not in writers:
                    path = str(folder / f"{side}-{bucket}.arrow")
                    writers[bucket] = stack.enter_context(pa.ipc.new_stream(path, COMPARED))
                writers[bucket].write_batch(digest.filter(pa.array(bucket_of_row == bucket)))


def _digest(batch: pa.RecordBatch) -> pa.RecordBatch:
    lengths = np.asarray(pc.list_value_length(batch["input_ids"]), np.int64)
    mask = np.asarray(pc.fill_null(batch["loss_mask"].flatten(), False))
    weights = np.where(mask, np.asarray(batch["loss_weights"].flatten(), np.float64), 0.0)
    ids = np.asarray(batch["input_ids"].flatten()).astype(np.uint64)
    columns = [batch[name] for name in ("prompt_id", "candidate_id", "source", "grape_score")]
    sums = [_sums(weights, lengths), _sums(mask.astype(np.int64), lengths)]
    return pa.record_batch([*columns, pa.array(ragged_hash(ids, lengths)), *map(pa.array, sums)], schema=COMPARED)


def _sums(values: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    ends = np.cumsum(lengths)
    totals = np.concatenate([np.zeros(1, values.dtype), np.cumsum(values)])
    return totals[ends] - totals[ends - lengths]


def ragged_hash(values: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A 64-bit hash [N] of each row of a ragged array: the sum of its values times a pseudo-random odd number for
    their place, modulo 2^64. For telling rows apart, not against an adversary."""
    starts = np.cumsum(lengths) - lengths
    place = (np.arange(len(values)) - np.repeat(starts, lengths)).astype(np.uint64)
    mixed = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) | np.uint64(1)
    sums = _sums((values + np.uint64(1)) * mixed, lengths)
    return (sums ^ (sums >> np.uint64(32))) * np.uint64(0x94D049BB133111EB) >> np.uint64(3)


def hash_of_texts(texts: pa.StringArray) -> npt.NDArray[np.uint64]:
    """`ragged_hash` of each text [N]."""
    return ragged_hash(*_bytes_of(texts))


def _bytes_of(texts: pa.Array) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    lengths = np.asarray(pc.binary_length(texts), np.int64)
    offsets = np.frombuffer(texts.buffers()[1], np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(texts.buffers()[2] or b"", np.uint8)[offsets[0] : offsets[-1]]
    return data.astype(np.uint64), lengths


def _read_bucket(folder: Path, side: str, bucket: int) -> pa.Table:
    path = folder / f"{side}-{bucket}.arrow"
    if not path.exists():
        return COMPARED.empty_table()
    with pa.ipc.open_stream(str(path)) as reader:
        return reader.read_all()


def _compare(a: pa.Table, b: pa.Table, totals: _Totals, max_examples: int) -> None:
    keys = ["prompt_id", "candidate_id"]
    common = a.join(b, keys, join_type="inner", left_suffix="_a", right_suffix="_b")
    removed = a.join(b.select(keys), keys, join_type="left anti")
    added = b.join(a.select(keys), keys, join_type="left anti")
    totals.common += common.num_rows
    totals.removed += removed.num_rows
    totals.added += added.num_rows
    totals.tokens_changed += int(pc.sum(pc.not_equal(common["tokens_a"], common["tokens_b"])).as_py() or 0)
    totals.scores.append(_moves(common["grape_score_a"], common["grape_score_b"]))
    means = [pc.divide(common[f"weight_sum_{s}"], pc.cast(common[f"num_loss_{s}"], pa.float64())) for s in ("a", "b")]
    totals.weights.append(_moves(*means))

    prompts_a, prompts_b = (pc.unique(table["prompt_id"]) for table in (a, b))
    in_both = pc.is_in(prompts_a, value_set=prompts_b)
    num_both = int(pc.sum(in_both).as_py() or 0)
    totals.prompts_a += len(prompts_a)
    totals.prompts_b += len(prompts_b)
    totals.prompts_removed += len(prompts_a) - num_both
    totals.prompts_added += len(prompts_b) - num_both
    both = prompts_a.filter(in_both)
    lost, gained = (pc.unique(table["prompt_id"]) for table in (removed, added))
    lost, gained = (prompts.filter(pc.is_in(prompts, value_set=both)) for prompts in (lost, gained))
    num_changed = int(pc.sum(pc.is_in(lost, value_set=gained)).as_py() or 0)
    totals.prompts_changed += num_changed
    totals.prompts_more += len(gained) - num_changed
    totals.prompts_fewer += len(lost) - num_changed
    for side, table in enumerate((a, b)):
        for item in pc.value_counts(pc.fill_null(table["source"], NO_SOURCE)).to_pylist():
            totals.kept.setdefault(item["values"], [0, 0])[side] += item["counts"]
    _compare_choices(removed, added, totals, max_examples)


def _compare_choices(removed: pa.Table, added: pa.Table, totals: _Totals, max_examples: int) -> None:
    """The n-th row that a prompt lost against the n-th that it gained."""
    paired = _numbered(removed).join(
        _numbered(added), ["prompt_id", "place"], join_type="inner", left_suffix="_a", right_suffix="_b"
    )
    counted = paired.group_by(["source_a", "source_b"]).aggregate([([], "count_all")])
    for row in counted.to_pylist():
        totals.sources[(row["source_a"], row["source_b"])] += row["count_all"]
    room = max_examples - len(totals.examples)
    if room > 0 and paired.num_rows:
        names = ["prompt_id", "candidate_id_a", "candidate_id_b", "source_a", "source_b"]
        first = paired.select(names).take(pc.select_k_unstable(paired, room, [("prompt_id", "ascending")]))
        totals.examples += [
            ChangedChoice(
                row["prompt_id"], row["candidate_id_a"], row["candidate_id_b"], row["source_a"], row["source_b"]
            )
            for row in first.to_pylist()
        ]


def _numbered(table: pa.Table) -> pa.Table:
    """Rows of each prompt numbered 0, 1, … by candidate_id."""
    table = table.select(["prompt_id", "candidate_id", "source"]).sort_by(
        [("prompt_id", "ascending"), ("candidate_id", "ascending")]
    )
    codes = np.asarray(pc.dictionary_encode(table["prompt_id"].combine_chunks()).indices, np.int64)
    index = np.arange(table.num_rows)
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    lengths = np.diff(np.append(starts, table.num_rows))
    return table.append_column("place", pa.array(index - np.repeat(starts, lengths), pa.int64()))


def _moves(a: pa.ChunkedArray, b: pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """[rows, sum a, sum b, sum |b - a|, max |b - a|] over rows where both are finite numbers."""
    left, right = (np.asarray(pc.fill_null(column, float("nan")), np.float64) for column in (a, b))
    known = np.isfinite(left) & np.isfinite(right)
    left, right = left[known], right[known]
    change = np.abs(right - left)
    return np.array([len(left), left.sum(), right.sum(), change.sum(), change.max(initial=0.0)])


def _shift(moves: list[npt.NDArray[np.float64]]) -> Shift:
    table = np.array(moves)
    rows = int(table[:, 0].sum())
    if rows == 0:
        return Shift()
    mean_a, mean_b, mean_change = (float(table[:, i].sum() / rows) for i in (1, 2, 3))
    return Shift(rows, mean_a, mean_b, mean_b - mean_a, mean_change, float(table[:, 4].max()))


def _shown(value: str | None) -> str:
    """A name from a pool on one line, without control characters."""
    if value is None:
        return "(none)"
    text = value if len(value) <= 60 else value[:57] + "..."
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
