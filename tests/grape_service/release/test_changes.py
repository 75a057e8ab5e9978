"""changes.parquet, against what plain dictionaries find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from grape_service.errors import StageError, UserError
from grape_service.release.changes import (
    changes_between,
    count_changes,
    parts_of,
    read_after,
    read_before,
    sentence_of,
    since_of,
    version_before,
    write_part_changes,
)
from grape_service.release.load import load
from grape_service.release.manifest import FileEntry
from grape_service.rows.columns import CHANGE_SIDE
from grape_service.rows.keys import partition_of
from grape_service.storage.parquet import read_row_groups, write_parquet
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows

Row = tuple[float | None, int | None, float]


@st.composite
def a_side(draw: st.DrawFn) -> dict[tuple[str, str], Row]:
    """Some rows of a version: (prompt_id, candidate_id) -> score, rank, weight."""
    keys = draw(st.sets(st.tuples(st.sampled_from("pqrs"), st.sampled_from("abc")), max_size=12))
    numbers = st.sampled_from([-1.0, -0.5, None])
    ranks, weights = st.sampled_from([1, 2, None]), st.sampled_from([1.0, 0.5])
    return {key: (draw(numbers), draw(ranks), draw(weights)) for key in keys}


def as_side(found: dict[tuple[str, str], Row]) -> pa.Table:
    values = [
        {"prompt_id": p, "candidate_id": c, "source": None, "score": s, "rank": r, "weight": w, "row": i}
        for i, ((p, c), (s, r, w)) in enumerate(found.items())
    ]
    return pa.Table.from_pylist(values, CHANGE_SIDE)


def slow_changes(before: dict[tuple[str, str], Row], after: dict[tuple[str, str], Row]) -> list[dict[str, Any]]:
    found = []
    entered, left = after.keys() - before.keys(), before.keys() - after.keys()
    for key in sorted(before.keys() | after.keys()):
        prompt = key[0]
        was, now = (any(other[0] == prompt for other in side) for side in (before, after))
        came, went = (any(other[0] == prompt for other in side) for side in (entered, left))
        if key in entered:
            change = "entered"
            reason = "the prompt is new" if not was else "kept in the place of another" if went else "more are kept"
        elif key in left:
            change = "left"
            reason = "the prompt is gone" if not now else "another was kept in its place" if came else "fewer are kept"
        elif before[key][2] != after[key][2]:
            change, reason = "weight", "kept with other weights"
        else:
            change, reason = "stayed", "kept as before"
        row: dict[str, Any] = {"prompt_id": prompt, "candidate_id": key[1], "change": change, "reason": reason}
        for side, values in (("before", before.get(key)), ("after", after.get(key))):
            row |= dict(zip((f"score_{side}", f"rank_{side}", f"weight_{side}"), values or [None] * 3, strict=True))
        found.append(row)
    return found


@given(a_side(), a_side())
@settings(max_examples=150, deadline=None)
def test_changes_are_those_of_a_plain_loop(
    before: dict[tuple[str, str], Row], after: dict[tuple[str, str], Row]
) -> None:
    found = changes_between(as_side(before), as_side(after))
    assert found.drop_columns(["source"]).to_pylist() == [
        {name: row[name] for name in found.schema.names if name != "source"} for row in slow_changes(before, after)
    ]
    counts = count_changes(found)
    assert sum(counts.changes.values()) == len(before.keys() | after.keys()) == sum(counts.reasons.values())
    assert counts.sources == ({"(none)": [len(before), len(after)]} if before or after else {})


def entry(number: int, partition: str | None) -> FileEntry:
    known = {} if partition is None else {"partition": partition}
    return FileEntry(
        path=f"data/part-{number:05d}.parquet", size=0, sha256="0" * 64, rows=0, tokens=0, loss_tokens=0, **known
    )


def test_files_of_the_same_prompts_stand_together_however_many_partitions_there_are() -> None:
    coarse, fine = [entry(0, "b0"), entry(1, "b1")], [entry(i, f"b{i:02b}") for i in range(4)]
    parts = parts_of(coarse, "x", fine, "y")
    assert [(part.name, len(part.before), len(part.after)) for part in parts] == [("b0", 1, 2), ("b1", 1, 2)]
    assert parts[1].after == ("y/data/part-00002.parquet", "y/data/part-00003.parquet")
    parts = parts_of([entry(0, None)], "x", fine[2:], "y")  # a version of which nobody says what its files hold
    assert [(part.name, len(part.before), len(part.after)) for part in parts] == [("b", 1, 2)]
    gone = parts_of(fine, "x", fine[:1], "y")  # prompts that the new version has no file for
    assert [(part.name, len(part.before), len(part.after)) for part in gone] == [
        ("b00", 1, 1),
        ("b01", 1, 0),
        ("b10", 1, 0),
        ("b11", 1, 0),
    ]
    for prompt in map(str, range(50)):
        assert partition_of(prompt, 4).startswith(partition_of(prompt, 2))


def test_a_version_is_compared_with_the_one_before_it(any_storage: Storage) -> None:
    a = rows(0, 100)
    publish_version(any_storage, parts=[a.slice(0, 60)])
    publish_version(any_storage, parts=[a.slice(20)])
    name = "math-sft"
    assert version_before(any_storage, name, "v0001", None) is None
    assert version_before(any_storage, name, "v0009", None) == "v0002"
    assert version_before(any_storage, name, "v0003", f"{any_storage.root}/{name}@v0001") == "v0001"
    assert version_before(any_storage, name, "v0003", f"{any_storage.root}/other@v0001") == "v0002"
    old, new = (load(f"{any_storage.root}/{name}@{version}") for version in ("v0001", "v0002"))
    (part,) = parts_of(old.manifest.files, old.folder, new.manifest.files, new.folder)
    counts = write_part_changes(any_storage, any_storage, part, "changes/b.parquet")
    assert counts.changes == {"entered": 40, "left": 20, "stayed": 40, "weight": 0}
    assert counts.churn == 0.5
    assert sentence_of(counts) == sentence_of(counts.to_json())
    since = since_of({"changes": {"since": "v0001", **counts.to_json()}})
    assert since is not None
    assert since.sentence == sentence_of(counts)
    assert since_of({}) is since_of({"changes": {"since": "v1", "reasons": 3}}) is None
    assert sentence_of(counts) == "40 rows entered, 20 left, 40 stayed, 0 of them with other weights"
    found = pa.concat_tables(read_row_groups(any_storage, "changes/b.parquet"))
    assert found.num_rows == 100
    weights = {row["candidate_id"]: row for row in new.dataset.to_table().to_pylist()}
    for row in found.filter(pa.compute.equal(found["change"], "entered")).to_pylist():
        kept = weights[row["candidate_id"]]
        of_loss = [w for w, has_loss in zip(kept["loss_weights"], kept["loss_mask"], strict=True) if has_loss]
        assert row["weight_after"] == sum(of_loss) / len(of_loss)
        assert row["score_after"] == kept["grape_score"]
    assert read_after(any_storage, []).num_rows == 0
    old_file = (f"{old.folder}/{old.manifest.files[0].path}", old.manifest.files[0].sha256)
    assert read_before(any_storage, [old_file]).equals(read_after(any_storage, [old_file[0]]))


def test_a_damaged_file_of_the_version_before_is_not_compared_with(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    a = rows(0, 100)
    publish_version(storage, parts=[a.slice(0, 60)])
    publish_version(storage, parts=[a.slice(20)])
    old, new = (load(f"{storage.root}/math-sft@{version}") for version in ("v0001", "v0002"))
    (part,) = parts_of(old.manifest.files, old.folder, new.manifest.files, new.folder)
    path, _ = part.before[0]
    whole = storage.read(path)
    damaged = {
        "not the file that its manifest names": storage.read(part.after[0]),  # readable, with other rows
        "is missing": None,
    }
    for reason, data in damaged.items():
        if data is None:
            storage.delete(path)
        else:
            storage.write(path, data)
        with pytest.raises(UserError, match=reason):
            write_part_changes(storage, storage, part, "changes/b.parquet")
    storage.write(path, whole)
    storage.write(part.after[0], b"PAR1")  # of the version that is being written: nothing may be published
    with pytest.raises(StageError, match="cannot be read"):
        write_part_changes(storage, storage, part, "changes/b.parquet")


def test_a_version_before_that_lacks_a_column_is_not_compared_with(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    write_parquet(storage, "a.parquet", pa.schema([("prompt_id", pa.string())]), [])
    with pytest.raises(UserError, match="has no column candidate_id"):
        read_before(storage, [("a.parquet", storage.sha256("a.parquet"))])


def test_why_nothing_is_said_of_the_changes_is_told_where_they_would_be() -> None:
    since = since_of({"changes": {"since": "v0001", "unreadable": "x.parquet is missing"}})
    assert since is not None
    assert not since.is_known
    assert since.sentence == "changes are not known, as x.parquet is missing"


@pytest.mark.parametrize("partition", ["", "c", "b2", "../b", "b0/1", "b0\n"])
def test_a_file_of_no_partition_is_refused(partition: str) -> None:
    with pytest.raises(ValidationError, match="partition"):
        entry(0, partition)
    assert entry(0, None).partition == "b"
