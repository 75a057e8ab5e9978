"""Rows of a version, a page at a time: from one row group, or as many as a filter has to look through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.errors import UserError
from grape_service.release.load import Release
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
    "num_candidates",
    "truncated",
    "weight_source",
    "loss_mask",
    "loss_weights",
)


@dataclass(frozen=True)
class Filters:
    """What the rows of a page satisfy; None and "": whatever it is."""

    source: str = ""
    text: str = ""
    min_weight: float | None = None
    max_weight: float | None = None
    min_margin: float | None = None
    max_margin: float | None = None

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
            (_numbers(batch, "grape_margin"), self.min_margin, self.max_margin),
        ):
            found &= (values >= low) if low is not None else True
            found &= (values <= high) if high is not None else True
        if self.text and found.any():
            found &= _holds(batch, self.text)
        return found


@dataclass(frozen=True)
class Page:
    """Some rows, and where the next ones are."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    start: int = 0
    looked: int = 0  # rows that were looked at, from `start` on
    next: int | None = None  # the row at which the next page begins; None at the end
    timed_out: bool = False


def read_page(release: Release, filters: Filters, start: int = 0, limit: int = PAGE_ROWS) -> Page:
    """The rows from number `start` on that the filters let through, at most `limit`. Reads no more than it needs.

    Raises UserError where a data file is missing or damaged."""
    found: list[dict[str, Any]] = []
    deadline = time.monotonic() + LOOK_SECONDS
    place = start
    for number, batch in batches_from(release, start, _COLUMNS):
        mask = filters.mask(batch) if filters.any else np.ones(batch.num_rows, dtype=bool)
        places = np.flatnonzero(mask)
        room = limit - len(found)
        taken = places[:room]
        if len(taken):
            weights = mean_weights(batch)
            light = [name for name in batch.schema.names if name not in ("loss_mask", "loss_weights")]
            rows = batch.select(light).take(pa.array(taken)).to_pylist()
            for at, row in zip(taken, rows, strict=True):
                found.append({**row, "number": number + int(at), "weight": _known(weights[at])})
        if len(places) > room or (len(found) == limit and number + batch.num_rows < release.row_count):
            last = found[-1]["number"] + 1 if found else number
            return Page(found, start, last - start, last)
        place = number + batch.num_rows
        if time.monotonic() > deadline and place < release.row_count:
            return Page(found, start, place - start, place, timed_out=True)
    return Page(found, start, max(0, place - start), None)


def read_row(release: Release, number: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row with all its columns, and every row of its prompt, which stand next to it (itself among them).

    Raises UserError where there is no such row."""
    if not 0 <= number < release.row_count:
        raise UserError(f"{release.reference} has no row {number:,}: its rows are 0 to {release.row_count - 1:,}")
    wanted: dict[str, Any] | None = None
    siblings: list[dict[str, Any]] = []
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
    try:
        with release.open_file(path) as file:
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
