"""Rows of a version, a page at a time: from one row group, or as many as a filter has to look through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from grape_service.errors import UserError
from grape_service.release.load import Release
from grape_service.rows.candidate import Row
from grape_service.rows.columns import NO_SOURCE

PAGE_ROWS = 50
LOOK_SECONDS = 4.0
"""How long a page looks for rows that a filter lets through, before it says how far it came."""
BATCH_ROWS = 512
_COLUMNS = (
    "prompt_id",
    "candidate_id",
    "source",
    "messages",
    "grape_score",
    "grape_margin",
    "select_score",
    "select_margin",
    "margin_at_least",
    "num_candidates",
    "truncated",
    "weight_source",
    "loss_mask",
    "loss_weights",
)


_MARGIN = ("select_margin", "grape_margin")
_FILTERED = (
    *("prompt_id", "candidate_id", "source", "messages"),
    *(*_MARGIN, "margin_at_least"),
    *("loss_mask", "loss_weights"),
)
SORTS = {
    "score": ("select_score", "grape_score"),
    "margin": _MARGIN,
    "weight": ("loss_mask", "loss_weights"),
}
"""What rows are sorted by, with the columns that it is read from."""


@dataclass(frozen=True)
class Filters:
    """What the rows of a page satisfy; None and "": whatever it is."""

    source: str = ""
    text: str = ""
    min_weight: float | None = None
    max_weight: float | None = None
    min_margin: float | None = None
    max_margin: float | None = None  # a margin that is only known to be at least so much is not let through

    @property
    def any(self) -> bool:
        """Whether anything is filtered."""
        return self != Filters()

    def mask(self, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Which rows of a batch are let through [N]."""
        found = np.ones(batch.num_rows, dtype=bool)
        if self.source:
            wanted = pc.fill_null(batch["source"], NO_SOURCE)
            found &= np.asarray(pc.equal(wanted, self.source))
        for values, low, high in (
            (mean_weights(batch), self.min_weight, self.max_weight),
            (_first_number(batch, _MARGIN), self.min_margin, self.max_margin),
        ):
            found &= (values >= low) if low is not None else True
            found &= (values <= high) if high is not None else True
        if self.max_margin is not None and "margin_at_least" in batch.schema.names:
            found &= ~np.asarray(pc.fill_null(batch["margin_at_least"], False))
        if self.text and found.any():
            found &= _holds(batch, self.text)
        return found


@dataclass(frozen=True)
class Page:
    """Some rows, and where the next ones are."""

    rows: list[Row] = field(default_factory=list)
    start: int = 0
    looked: int = 0  # rows that were looked at, from `start` on
    next: int | None = None  # the row at which the next page begins; None at the end
    timed_out: bool = False


def read_page(release: Release, filters: Filters, start: int = 0, limit: int = PAGE_ROWS) -> Page:
    """The rows from number `start` on that the filters let through, at most `limit`. Reads no more than it needs.

    Raises UserError where a data file is missing or damaged."""
    found: list[Row] = []
    deadline = time.monotonic() + LOOK_SECONDS
    place = start
    for number, batch in batches_from(release, start, _COLUMNS):
        mask = filters.mask(batch) if filters.any else np.ones(batch.num_rows, dtype=bool)
        places = np.flatnonzero(mask)
        room = limit - len(found)
        taken = places[:room]
        if len(taken):
            found += _shown(batch.take(pa.array(taken)), number + taken)
        if len(places) > room or (len(found) == limit and number + batch.num_rows < release.row_count):
            last = found[-1]["number"] + 1 if found else number
            return Page(found, start, last - start, last)
        place = number + batch.num_rows
        if time.monotonic() > deadline and place < release.row_count:
            return Page(found, start, place - start, place, timed_out=True)
    return Page(found, start, max(0, place - start), None)


def read_sorted(
    release: Release, filters: Filters, sort: str, down: bool, start: int = 0, limit: int = PAGE_ROWS
) -> Page:
    """Places `start` on of the rows that the filters let through, by one of SORTS; rows without the number come last,
    equal ones as they stand. Every row's number is looked at, for LOOK_SECONDS at most, and the page's rows are read.

    Raises UserError where a data file is missing or damaged."""
    deadline = time.monotonic() + LOOK_SECONDS
    wanted = start + limit + 1
    keys, numbers, looked = np.empty(0), np.empty(0, dtype=np.int64), 0
    columns = tuple(dict.fromkeys([*SORTS[sort], *(_FILTERED if filters.any else ())]))
    size = BATCH_ROWS if filters.any or "loss_weights" in columns else 65_536
    for number, batch in batches_from(release, 0, columns, size):
        values = _sort_values(batch, sort)
        places = np.flatnonzero(filters.mask(batch)) if filters.any else np.arange(batch.num_rows)
        keys = np.concatenate([keys, -values[places] if down else values[places]])
        numbers = np.concatenate([numbers, number + places])
        best = np.lexsort((numbers, keys))[:wanted]  # NaN is last
        keys, numbers = keys[best], numbers[best]
        looked = number + batch.num_rows
        if time.monotonic() > deadline:
            break
    taken = numbers[start : start + limit]
    by_number = {row["number"]: row for row in _rows_at(release, np.sort(taken))}
    rows = [by_number[int(number)] for number in taken]
    following = start + limit if len(numbers) == wanted else None
    return Page(rows, start, looked, following, timed_out=looked < release.row_count)


def _sort_values(batch: pa.RecordBatch, sort: str) -> npt.NDArray[np.float64]:
    if sort == "weight":
        return mean_weights(batch)
    return _first_number(batch, SORTS[sort])


def _rows_at(release: Release, numbers: npt.NDArray[np.int64]) -> Iterator[Row]:
    """The rows of a page with these numbers, which ascend. A row group is read once, where it holds one of them."""
    first = 0
    for entry in release.manifest.files:
        inside = numbers[(numbers >= first) & (numbers < first + entry.rows)]
        if len(inside):
            yield from _rows_of_file(release, entry.path, first, inside)
        first += entry.rows


def _rows_of_file(release: Release, path: str, first: int, numbers: npt.NDArray[np.int64]) -> Iterator[Row]:
    with _opened(release, path) as file:
        there = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            inside = numbers[(numbers >= first) & (numbers < first + rows)]
            if len(inside):
                table = file.read_row_group(group, columns=there, use_threads=False).take(pa.array(inside - first))
                for batch in table.combine_chunks().to_batches():
                    yield from _shown(batch, inside)
            first += rows


def _shown(batch: pa.RecordBatch, numbers: npt.NDArray[np.int64]) -> Iterator[Row]:
    """Rows of a batch as a page shows them, with their numbers and their mean weights in place of those of tokens."""
    light = batch.select([name for name in batch.schema.names if name not in ("loss_mask", "loss_weights")])
    for row, number, weight in zip(light.to_pylist(), numbers, mean_weights(batch), strict=True):
        yield {**row, "number": int(number), "weight": _known(weight)}


def read_row(release: Release, number: int) -> tuple[Row, list[Row]]:
    """A row with all its columns, and every row of its prompt, which stand next to it (itself among them).

    Raises UserError where there is no such row."""
    if not 0 <= number < release.row_count:
        raise UserError(f"{release.reference} has no row {number:,}: its rows are 0 to {release.row_count - 1:,}")
    wanted: Row | None = None
    siblings: list[Row] = []
    first = max(0, number - MAX_KEPT)
    for start, batch in batches_from(release, first, tuple(release.schema.names), size=16):
        for at, row in enumerate(batch.to_pylist()):
            row["number"] = start + at
            if row["number"] == number:
                wanted = row
            if row["number"] > number and (wanted is None or row["prompt_id"] != wanted["prompt_id"]):
                break
            siblings.append(row)
        else:
            continue
        break
    assert wanted is not None
    return wanted, [row for row in siblings if row["prompt_id"] == wanted["prompt_id"]]


MAX_KEPT = 16
"""Rows of one prompt that are looked for before a row."""


def find_prompt(release: Release, prompt_id: str) -> int | None:
    """The number of the first row of a prompt; None where the version has none. Reads the ids alone."""
    for number, batch in batches_from(release, 0, ("prompt_id",), size=65_536):
        places = np.flatnonzero(np.asarray(pc.equal(batch["prompt_id"], prompt_id)))
        if len(places):
            return number + int(places[0])
    return None


def batches_from(
    release: Release, start: int, columns: tuple[str, ...], size: int = BATCH_ROWS
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Batches of the rows from number `start` on, each with the number of its first row. Files and row groups before
    it are not read."""
    first = 0
    for entry in release.manifest.files:
        if first + entry.rows > start:
            yield from _batches_of_file(release, entry.path, first, start, columns, size)
        first += entry.rows


def _batches_of_file(
    release: Release, path: str, first: int, start: int, columns: tuple[str, ...], size: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    with _opened(release, path) as file:
        there = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if first + rows > start:
                number = first
                for batch in file.iter_batches(size, row_groups=[group], columns=there, use_threads=False):
                    skip = max(0, min(batch.num_rows, start - number))
                    if skip < batch.num_rows:
                        yield number + skip, batch.slice(skip)
                    number += batch.num_rows
            first += rows


@contextmanager
def _opened(release: Release, path: str) -> Iterator[pq.ParquetFile]:
    """A data file, of which whatever cannot be read is a UserError."""
    try:
        with release.open_file(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{release.path}/{path} cannot be read ({' '.join(str(error).split())[:200]}): "
            f"see `grape datasets verify {release.reference}`"
        ) from error


def mean_weights(batch: pa.RecordBatch) -> npt.NDArray[np.float64]:
    """The mean loss weight of each row over its tokens with loss [N]; NaN where it has none."""
    if not {"loss_mask", "loss_weights"} <= set(batch.schema.names):
        return np.full(batch.num_rows, np.nan)
    sums = []
    for name in ("loss_weights", "loss_mask"):
        lengths = np.asarray(pc.fill_null(pc.list_value_length(batch[name]), 0), np.int64)
        totals = np.concatenate([[0.0], np.cumsum(np.asarray(batch[name].flatten(), np.float64))])
        ends = np.cumsum(lengths)
        sums.append(totals[ends] - totals[ends - lengths])
    return np.divide(sums[0], sums[1], out=np.full(batch.num_rows, np.nan), where=sums[1] > 0)


def _numbers(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.float64]:
    if name not in batch.schema.names:
        return np.full(batch.num_rows, np.nan)
    return np.asarray(pc.fill_null(pc.cast(batch[name], pa.float64()), float("nan")))


def _first_number(batch: pa.RecordBatch, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
    """Of each row the number in the first of these columns that has one [N]: another method's before GRAPE's."""
    first, *others = (_numbers(batch, name) for name in names)
    for values in others:
        first = np.where(np.isnan(first), values, first)
    return first


def _holds(batch: pa.RecordBatch, text: str) -> npt.NDArray[np.bool_]:
    """Which rows have this text in a message or begin their ids with it, whatever the case [N]."""
    found = np.asarray(pc.starts_with(batch["prompt_id"], text)) | np.asarray(
        pc.starts_with(batch["candidate_id"], text)
    )
    messages = batch["messages"]
    contents = pc.struct_field(pc.list_flatten(messages), "content")
    hits = np.asarray(pc.fill_null(pc.match_substring(contents, text, ignore_case=True), False))
    found[np.asarray(pc.list_parent_indices(messages))[hits]] = True
    return found


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
