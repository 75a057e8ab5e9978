"""Two versions side by side, against what a plain loop over all rows finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from grape_service.errors import UserError
from grape_service.release import diff as diff_module
from grape_service.release.diff import diff, ragged_hash, render_text
from grape_service.release.load import Release, load
from grape_service.storage.storage import Storage, json_bytes
from tests.grape_service.release.made_up import SCHEMA, publish_version, rows


def changed(table: pa.Table, **columns: list[Any]) -> pa.Table:
    for name, values in columns.items():
        table = table.set_column(
            SCHEMA.get_field_index(name), SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
        )
    return table


def by_key(release: Release) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["prompt_id"], row["candidate_id"]): row for row in release.dataset.to_table().to_pylist()}


@pytest.fixture
def pair(any_storage: Storage) -> tuple[Release, Release]:
    """Version a; and b: 20 prompts fewer, 30 more, every 5th choice changed, other scores and weights."""
    a = rows(0, 200)
    b = changed(
        a.slice(20),
        candidate_id=[f"{c}-new" if i % 5 == 0 else c for i, c in enumerate(a.slice(20)["candidate_id"].to_pylist())],
        source=["gen-b" if i % 5 == 0 else s for i, s in enumerate(a.slice(20)["source"].to_pylist())],
        grape_score=[None if i == 1 else s + 0.25 for i, s in enumerate(a.slice(20)["grape_score"].to_pylist())],
        loss_weights=[[w * 2 for w in weights] for weights in a.slice(20)["loss_weights"].to_pylist()],
        input_ids=[[9, *ids[1:]] if i == 2 else ids for i, ids in enumerate(a.slice(20)["input_ids"].to_pylist())],
    )
    publish_version(any_storage, parts=[a.slice(0, 90), a.slice(90)])
    publish_version(any_storage, parts=[pa.concat_tables([b.slice(100), rows(500, 30)]), b.slice(0, 100)])
    return load(f"{any_storage.root}/math-sft@v0001"), load(f"{any_storage.root}/math-sft@v0002")


@pytest.mark.parametrize("rows_per_bucket", [30, 10**6])
def test_a_diff_finds_what_a_plain_loop_finds(
    pair: tuple[Release, Release], rows_per_bucket: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diff_module, "ROWS_PER_BUCKET", rows_per_bucket)
    found = diff(*pair)
    a, b = (by_key(release) for release in pair)
    common = a.keys() & b.keys()
    assert (found.rows_a, found.rows_b) == (len(a), len(b))
    assert (found.rows_added, found.rows_removed) == (len(b.keys() - a.keys()), len(a.keys() - b.keys()))
    assert found.rows_common == len(common)
    assert found.tokens_changed == sum(a[key]["input_ids"] != b[key]["input_ids"] for key in common) == 1
    assert (found.prompts_removed, found.prompts_added, found.prompts_changed) == (20, 30, 36)
    assert sum(change["prompts"] for change in found.source_changes) == 36
    assert {change["to"] for change in found.source_changes} == {"gen-b"}
    scored = [key for key in common if b[key]["grape_score"] is not None]
    assert found.scores.rows == len(scored)
    assert found.scores.mean_difference == pytest.approx(0.25)
    assert found.scores.mean_a == pytest.approx(np.mean([a[key]["grape_score"] for key in scored]))
    assert found.weights.mean_b == pytest.approx(2 * found.weights.mean_a, rel=1e-6)
    weights = [np.array(a[key]["loss_weights"])[a[key]["loss_mask"]].mean() for key in common]
    assert found.weights.mean_a == pytest.approx(np.mean(weights), rel=1e-6)
    assert len(found.examples) == 20
    assert all(f"{item.candidate_a}-new" == item.candidate_b for item in found.examples)
    assert b'"prompts_changed": 36' in json_bytes(found.to_json())
    text = render_text(found)
    assert "+66 added, -56 removed, 144 in both, 1 of them with other tokens" in text
    assert "36 with another choice" in text
    first = found.examples[0]
    told = render_text(found, {first.prompt_id: "What is\n 1 + 1?\x1b"})
    assert f"({first.source_b})\n    What is 1 + 1?<U+001B>\n" in told


def test_a_version_against_itself_and_against_nothing(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage)
    publish_version(storage, parts=[])
    one, none = load(f"{tmp_path}/math-sft@v0001"), load(f"{tmp_path}/math-sft@v0002")
    same = diff(one, one)
    assert (same.rows_common, same.rows_added, same.prompts_changed, same.tokens_changed) == (80, 0, 0, 0)
    assert same.scores.largest_absolute_difference == 0
    assert (diff(one, none).rows_removed, diff(none, one).rows_added) == (80, 80)


def test_another_keep_is_no_other_choice(tmp_path) -> None:
    """a keeps one candidate a prompt, b two: of 10 prompts 6 keep a's and one more, 4 two others."""
    storage = Storage(str(tmp_path))
    a = changed(rows(0, 10), candidate_id=["c0"] * 10)
    best = changed(rows(0, 10), candidate_id=["c0"] * 6 + ["c1"] * 4)
    second = changed(rows(0, 10), candidate_id=["c2"] * 10)
    publish_version(storage, parts=[a])
    publish_version(storage, parts=[best, second])
    one, two = load(f"{tmp_path}/math-sft@v0001"), load(f"{tmp_path}/math-sft@v0002")
    wider, narrower = diff(one, two), diff(two, one)
    assert (wider.prompts_changed, wider.prompts_more, wider.prompts_fewer, wider.same_choice) == (4, 6, 0, 6)
    assert (narrower.prompts_changed, narrower.prompts_more, narrower.prompts_fewer) == (4, 0, 6)
    assert (wider.rows_added, wider.rows_removed, wider.prompts_common) == (14, 4, 10)
    assert sum(change["prompts"] for change in wider.source_changes) == 4
    assert sum(count[1] for count in wider.sources.values()) == 20
    assert "4 with another choice, 6 with the same" in render_text(wider)
    assert "6 prompts keep more candidates in b, 0 fewer" in render_text(wider)


def test_hostile_names_are_shown_on_one_line(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    evil = "p\n\x1b[31mred" + "x" * 100
    a = changed(rows(0, 1), prompt_id=[evil], source=["a\rb"])
    publish_version(storage, parts=[a])
    publish_version(storage, parts=[changed(a, candidate_id=["other"], source=[None])])
    text = render_text(diff(load(f"{tmp_path}/math-sft@v0001"), load(f"{tmp_path}/math-sft@v0002")))
    assert "\x1b" not in text
    assert "\r" not in text
    assert "p\\n\\x1b[31mred" in text
    assert "(none)" in text


def test_a_version_without_our_columns_is_refused(tmp_path) -> None:
    from grape_service.release.claim import claim_version
    from grape_service.release.manifest import ManifestFields
    from grape_service.release.writer import publish, write_part

    storage = Storage(str(tmp_path))
    table = pa.table({"x": [1]})
    with claim_version(storage, "other") as claim:
        entry = write_part(storage, claim.folder, 0, table.schema, [table])
        publish(storage, claim, table.schema, [entry], ManifestFields(content_digest="a"))
    other = load(f"{tmp_path}/other@v0001")
    with pytest.raises(UserError, match="has no column 'prompt_id'"):
        diff(other, other)


def test_hashes_tell_rows_apart() -> None:
    values = np.array([1, 2, 2, 1, 1, 2, 0, 0, 0], np.uint64)
    lengths = np.array([2, 2, 2, 0, 1, 2])
    hashes = ragged_hash(values, lengths)
    assert hashes[0] == hashes[2]
    assert len(set(hashes.tolist())) == 5
    random = np.random.default_rng(0)
    many = ragged_hash(random.integers(0, 100, 300_000).astype(np.uint64), np.full(100_000, 3))
    assert len(np.unique(many)) > 94_000  # 10^6 possible rows: as many as there are distinct ones
    assert np.bincount((many % np.uint64(16)).astype(int)).min() > 5000
