"""changes.parquet: what became of each row since the version before, with its scores, ranks and weights then and now.

Rows are compared by prompt_id and candidate_id, which hold across versions, a partition of prompts at a time: a data
file of a version holds one, and its name, a bit string after a 'b', says which prompts those are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.display import counted
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.release.catalog import read_catalog
from grape_service.release.manifest import FileEntry, read_manifest
from grape_service.release.reference import parse_reference, version_folder, version_number
from grape_service.rows.columns import CHANGE, CHANGE_SIDE, NO_SOURCE
from grape_service.rows.ragged import list_offsets_and_values, segment_sums
from grape_service.storage.parquet import array_of, open_checked, read_row_groups, write_parquet
from grape_service.storage.storage import Storage

ENTERED, LEFT, STAYED, WEIGHT = "entered", "left", "stayed", "weight"
WORDS = (ENTERED, LEFT, STAYED, WEIGHT)
NEW_PROMPT, OTHER_CHOICE, KEEPS_MORE = "the prompt is new", "kept in the place of another", "more are kept"
PROMPT_GONE, OUTDONE, KEEPS_FEWER = "the prompt is gone", "another was kept in its place", "fewer are kept"
SAME, OTHER_WEIGHTS = "kept as before", "kept with other weights"

KEYS = ("prompt_id", "candidate_id")
OF_OTHER_METHODS = ("select_score", "select_rank")  # where another method than GRAPE chose
READ = (*KEYS, "source", "loss_mask", "loss_weights", "grape_score", "grape_rank", *OF_OTHER_METHODS)


@dataclass(frozen=True)
class Part:
    """Data files of the same prompts, in two versions."""

    name: str
    before: tuple[tuple[str, str], ...]  # (path in the versions' storage, sha256 that the manifest names)
    after: tuple[str, ...]  # paths; written in this run


@dataclass
class ChangeCounts:
    """How a version differs from the one before it."""

    changes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WORDS, 0))
    reasons: dict[str, int] = field(default_factory=dict)
    sources: dict[str, list[int]] = field(default_factory=dict)  # rows before and after

    def __add__(self, other: ChangeCounts) -> ChangeCounts:
        sources = {name: list(rows) for name, rows in self.sources.items()}
        for name, (before, after) in other.sources.items():
            here = sources.setdefault(name, [0, 0])
            here[0] += before
            here[1] += after
        reasons = dict(Counter(self.reasons) + Counter(other.reasons))
        return ChangeCounts({word: self.changes[word] + other.changes[word] for word in WORDS}, reasons, sources)

    @property
    def churn(self) -> float:
        """Share of the rows now that were not there before, or of those before that are gone, whichever is more."""
        stayed = self.changes[STAYED] + self.changes[WEIGHT]
        return max(
            self.changes[ENTERED] / max(1, stayed + self.changes[ENTERED]),
            self.changes[LEFT] / max(1, stayed + self.changes[LEFT]),
        )

    def to_json(self) -> JsonObject:
        """For the manifest."""
        return {
            **self.changes,
            "churn": self.churn,
            "reasons": dict(sorted(self.reasons.items())),
            "sources": dict(sorted(self.sources.items())),
        }


def version_before(storage: Storage, name: str, version: str, parent: str | None) -> str | None:
    """What a version is compared with: the one that it was weighed from, if that has the same name, or the newest
    earlier one."""
    number = version_number(version)
    earlier = [one.version for one in read_catalog(storage, name) if version_number(one.version) < number]
    if parent is not None:
        reference = parse_reference(parent)
        if (reference.path, reference.name) == (storage.root, name) and reference.version_or_tag in earlier:
            return reference.version_or_tag
    return max(earlier, key=version_number, default=None)


def parts_of(
    before: Sequence[FileEntry], before_folder: str, after: Sequence[FileEntry], after_folder: str
) -> list[Part]:
    """The data files of two versions by the prompts that they hold, however many partitions each has."""
    sides = [(entry.partition, f"{before_folder}/{entry.path}", entry.sha256, False) for entry in before]
    sides += [(entry.partition, f"{after_folder}/{entry.path}", "", True) for entry in after]
    parts: dict[str, tuple[list[tuple[str, str]], list[str]]] = {}
    whole = ""
    for name, path, sha256, is_after in sorted(sides):
        if not parts or not name.startswith(whole):  # else it is a part of the one before
            whole = name
            parts[whole] = ([], [])
        if is_after:
            parts[whole][1].append(path)
        else:
            parts[whole][0].append((path, sha256))
    return [Part(name, tuple(left), tuple(right)) for name, (left, right) in parts.items()]


def read_before(storage: Storage, files: Iterable[tuple[str, str]]) -> pa.Table:
    """Rows of data files of the version before, (path, sha256) each, as CHANGE_SIDE.

    Raises UserError for a file that is missing, has other contents than its manifest names, or lacks a column."""
    return _as_side(table for path, sha256 in files for table in _groups_checked(storage, path, sha256))


def read_after(storage: Storage, paths: Iterable[str]) -> pa.Table:
    """Rows of data files that this run has written, as CHANGE_SIDE. Raises StageError if one cannot be read."""
    return _as_side(table for path in paths for table in read_row_groups(storage, path, [*READ]))


def _groups_checked(storage: Storage, path: str, sha256: str) -> Iterator[pa.Table]:
    with open_checked(storage, path, sha256) as file:
        missing = set(READ) - set(OF_OTHER_METHODS) - set(file.schema_arrow.names)
        if missing:
            raise UserError(f"{storage.url(path)} has no column {min(missing)}")
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[*READ], use_threads=False).combine_chunks()


def _as_side(groups: Iterable[pa.Table]) -> pa.Table:
    """Row groups as CHANGE_SIDE, without their tokens."""
    tables = [CHANGE_SIDE.empty_table()]
    number = 0
    for table in groups:
        tables.append(_side(table, number))
        number += table.num_rows
    return pa.concat_tables(tables).combine_chunks()


def _side(table: pa.Table, first: int) -> pa.Table:
    method = "select" if "select_score" in table.column_names else "grape"
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    _, weights = list_offsets_and_values(array_of(table, "loss_weights"))
    number = segment_sums(mask.astype(bool), offsets)
    sums = segment_sums(np.where(mask, weights.astype(np.float64), 0.0), offsets)
    columns = {
        **{name: table[name] for name in (*KEYS, "source")},
        "score": table[f"{method}_score"],
        "rank": table[f"{method}_rank"],
        "weight": pa.array(sums / np.maximum(number, 1)),
        "row": pa.array(np.arange(first, first + table.num_rows)),
    }
    return pa.table(columns).select(CHANGE_SIDE.names).cast(CHANGE_SIDE)


def changes_between(before: pa.Table, after: pa.Table) -> pa.Table:
    """Rows of CHANGE from two tables of CHANGE_SIDE that hold the same prompts, by prompt_id and candidate_id."""
    joined = after.join(before, list(KEYS), join_type="full outer", left_suffix="_after", right_suffix="_before")
    joined = joined.combine_chunks().sort_by([(name, "ascending") for name in KEYS])
    is_after, is_before = (np.asarray(pc.is_valid(joined[f"row_{side}"])).astype(bool) for side in ("after", "before"))
    prompts = joined["prompt_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    entered, left, both = is_after & ~is_before, is_before & ~is_after, is_after & is_before
    has = {
        name: np.bincount(prompts, weights=rows, minlength=int(prompts.max(initial=-1)) + 1)[prompts] > 0
        for name, rows in (("after", is_after), ("before", is_before), ("entered", entered), ("left", left))
    }
    weights = [joined[f"weight_{side}"].to_numpy() for side in ("before", "after")]
    reweighed = both & (weights[0] != weights[1])
    change = np.select([entered, left, reweighed], [ENTERED, LEFT, WEIGHT], STAYED)
    reason = np.select(
        [
            entered & ~has["before"],
            entered & has["left"],
            entered,
            left & ~has["after"],
            left & has["entered"],
            left,
            reweighed,
        ],
        [NEW_PROMPT, OTHER_CHOICE, KEEPS_MORE, PROMPT_GONE, OUTDONE, KEEPS_FEWER, OTHER_WEIGHTS],
        SAME,
    )
    columns = {name: joined[name] for name in KEYS}
    columns["source"] = pc.coalesce(joined["source_after"], joined["source_before"])
    columns |= {
        "change": pa.array(change.astype(object), pa.string()),
        "reason": pa.array(reason.astype(object), pa.string()),
    }
    for name in ("score", "rank", "weight"):
        columns |= {f"{name}_{side}": joined[f"{name}_{side}"] for side in ("before", "after")}
    return pa.table(columns).select(CHANGE.names).cast(CHANGE)


def count_changes(changes: pa.Table) -> ChangeCounts:
    """The counts of some rows of CHANGE."""
    counts = ChangeCounts()
    for word, number in _counted(changes["change"]).items():
        counts.changes[word] = number
    counts.reasons = _counted(changes["reason"])
    for side, word in ((0, ENTERED), (1, LEFT)):  # those before have not entered, those after have not left
        rows = changes.filter(pc.not_equal(changes["change"], word))
        for name, number in _counted(pc.fill_null(rows["source"], NO_SOURCE)).items():
            counts.sources.setdefault(name, [0, 0])[side] = number
    return counts


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in pc.value_counts(column).to_pylist()}


@dataclass(frozen=True)
class Since:
    """What a manifest says of the changes since the version before."""

    version: str
    sentence: str
    is_known: bool  # else the sentence says why not, and there is no changes.parquet
    reasons: list[tuple[str, int]]
    sources: list[tuple[str, int, int]]  # rows before and now; those that changed most come first


def since_of(manifest_counts: dict[str, Any]) -> Since | None:
    """The changes in a manifest's counts; None where there are none, or they are not what `to_json` wrote."""
    changes = manifest_counts.get("changes")
    try:
        if not isinstance(changes, dict):
            return None
        if "unreadable" in changes:
            return Since(str(changes["since"]), f"changes are not known, as {changes['unreadable']}", False, [], [])
        reasons = [(str(reason), int(number)) for reason, number in changes["reasons"].items()]
        sources = [(str(name), int(was), int(now)) for name, (was, now) in changes["sources"].items()]
        sources.sort(key=lambda item: (-abs(item[2] - item[1]), item[0]))
        return Since(str(changes["since"]), sentence_of(changes), True, reasons, sources)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def sentence_of(counts: ChangeCounts | dict[str, Any]) -> str:
    """'12 rows entered, 12 left, 76 stayed, 0 of them with other weights'; also of the manifest's counts."""
    found = counts.changes if isinstance(counts, ChangeCounts) else counts
    entered, left, stayed, weight = (int(found.get(word, 0)) for word in WORDS)
    return (
        f"{counted(entered, 'row')} entered, {left:,} left, {stayed + weight:,} stayed, {weight:,} of them with other "
        "weights"
    )


def changes_of_versions(storage: Storage, name: str, before: str, after: str) -> ChangeCounts:
    """How a version differs from another of its dataset, read again, some prompts at a time.

    Raises UserError for a version that cannot be read.
    """
    old, new = (read_manifest(storage, name, version) for version in (before, after))
    parts = parts_of(old.files, version_folder(name, before), new.files, version_folder(name, after))
    sides = ((read_before(storage, part.before), read_after(storage, part.after)) for part in parts)
    return sum((count_changes(changes_between(*both)) for both in sides), ChangeCounts())


def write_part_changes(storage: Storage, output: Storage, part: Part, out_path: str) -> ChangeCounts:
    """The changes of a part of the prompts, as a file in the workspace `storage` (a Ray task).

    Raises UserError where the version before cannot be read, StageError where this one cannot."""
    changes = changes_between(read_before(output, part.before), read_after(output, part.after))
    write_parquet(storage, out_path, CHANGE, [changes])
    return count_changes(changes)
