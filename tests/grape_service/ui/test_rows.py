"""Rows of a version: filtered, sorted, in pages, with their prompt and why they were kept."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from grape_service.release.load import load
from grape_service.rows.columns import MARGIN_AT_LEAST
from grape_service.storage.storage import Storage
from grape_service.ui import rows as rows_module
from grape_service.ui.folder import Folder
from grape_service.ui.rows import Filters, read_page, read_row, read_sorted
from tests.grape_service.release.made_up import publish_version, rows
from tests.grape_service.ui.made_folder import POOL, client_of
from tests.grape_service.ui.seen import text_of


def test_a_row_shows_why_it_won(client: TestClient) -> None:
    page = text_of(client, f"{POOL}/rows/4")
    assert "kept: number 1 by score" in page
    assert page.count("its score is lower by") == 2
    assert 'data-0="-1.04"' in client.get(f"{POOL}/rows/4").text
    answer = client.get(f"{POOL}/prompt?id=p004", follow_redirects=False)
    assert answer.headers["location"] == f"{POOL}/rows/4"
    assert "has no prompt 'nothing'" in text_of(client, f"{POOL}/prompt?id=nothing", 404)
    assert "has no row 30" in text_of(client, f"{POOL}/rows/30", 404)


def test_without_its_workspace_a_row_is_still_shown(datasets: Path) -> None:
    page = text_of(client_of(Folder(str(datasets))), f"{POOL}/rows/4")
    assert "start `grape ui` with --workspace" in page
    assert "kept: number 1 by score" in page


def test_rows_are_filtered_and_paged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_version(Storage(str(tmp_path)), parts=[rows(0, 70), rows(70, 60), rows(130, 0), rows(130, 20)])
    release = load(f"{tmp_path}/math-sft")
    table = release.dataset.to_table().to_pylist()
    first = read_page(release, Filters(), 0)
    assert [row["number"] for row in first.rows] == list(range(50))
    assert [row["number"] for row in read_page(release, Filters(), 120).rows] == list(range(120, 150))
    assert read_page(release, Filters(), 120).next is None
    assert read_page(release, Filters(), 150).rows == []

    def weight(row: dict) -> float:
        kept = [w for w, on in zip(row["loss_weights"], row["loss_mask"], strict=True) if on]
        return sum(kept) / len(kept)

    for filters, keep in (
        (Filters(source="gen-a"), lambda row: row["source"] == "gen-a"),
        (Filters(text="QUESTION P0000014"), lambda row: 140 <= int(row["prompt_id"][1:]) < 150),
        (Filters(text="p00000003"), lambda row: row["prompt_id"] == "p00000003"),
        (Filters(min_weight=1.0, max_weight=1.05), lambda row: 1.0 <= weight(row) <= 1.05),
        (Filters(min_margin=0.1, source="gen-b"), lambda row: row["grape_margin"] >= 0.1 and row["source"] == "gen-b"),
        (Filters(source="nobody"), lambda row: False),
    ):
        expected = [number for number, row in enumerate(table) if keep(row)]
        found, start = [], 0
        while start is not None:
            page = read_page(release, filters, start, limit=7)
            assert len(page.rows) <= 7
            found += [row["number"] for row in page.rows]
            start = page.next
        assert found == expected
    assert first.rows[3]["weight"] == pytest.approx(weight(table[3]))
    wanted, siblings = read_row(release, 75)
    assert wanted["prompt_id"] == table[75]["prompt_id"]
    assert len(siblings) == 1
    monkeypatch.setattr(rows_module, "LOOK_SECONDS", -1.0)
    stopped = read_page(release, Filters(source="nobody"))
    assert (stopped.timed_out, stopped.next) == (True, 70)


def test_a_margin_to_a_stopped_response_is_a_lower_bound(tmp_path: Path) -> None:
    table = rows(0, 30)
    is_least = pa.array([place % 2 == 0 for place in range(30)])
    publish_version(Storage(str(tmp_path)), parts=[table.append_column(MARGIN_AT_LEAST, is_least)])
    release = load(f"{tmp_path}/math-sft")
    margins = table["grape_margin"].to_pylist()
    assert {row["number"] for row in read_page(release, Filters(max_margin=1e9)).rows} == {
        number for number in range(1, 30, 2) if margins[number] is not None
    }
    assert {row["number"] for row in read_page(release, Filters(min_margin=0.0)).rows} == {
        number for number in range(30) if margins[number] is not None
    }
    client = client_of(Folder(str(tmp_path)))
    number = next(place for place in range(0, 30, 2) if margins[place] is not None)
    bounds = sum(margins[place] is not None for place in range(0, 30, 2))
    assert client.get("/datasets/math-sft/v0001/rows").text.count(">≥ ") == bounds
    told = f"margin ≥ {margins[number]:.4f} (to one that was stopped)"
    assert told in text_of(client, f"/datasets/math-sft/v0001/rows/{number}")
    assert "≥" not in text_of(client, "/datasets/math-sft/v0001/rows/1")


def test_rows_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_version(Storage(str(tmp_path)), parts=[rows(0, 70), rows(70, 60)])
    release = load(f"{tmp_path}/math-sft")
    table = release.dataset.to_table().to_pylist()
    for sort, value in (("score", lambda row: row["grape_score"]), ("margin", lambda row: row["grape_margin"])):
        for down in (True, False):
            known = [place for place in range(130) if value(table[place]) is not None]
            unknown = [place for place in range(130) if value(table[place]) is None]
            wanted = sorted(known, key=lambda place: value(table[place]), reverse=down) + unknown
            found: list[int] = []
            start: int | None = 0
            while start is not None:
                page = read_sorted(release, Filters(), sort, down, start)
                found += [row["number"] for row in page.rows]
                start = page.next
            assert found == wanted
    source = table[3]["source"]
    few = read_sorted(release, Filters(source=source), "weight", down=False, limit=5)
    fitting = [row for row in read_page(release, Filters(source=source), limit=130).rows if row["weight"] is not None]
    assert [row["weight"] for row in few.rows] == sorted(row["weight"] for row in fitting)[:5]
    page = text_of(client_of(Folder(str(tmp_path))), "/datasets/math-sft/v0001/rows?sort=score&order=up&start=50")
    assert "50 rows by score, smallest first, from place 51 on, of 130 rows" in page
    monkeypatch.setattr(rows_module, "LOOK_SECONDS", -1.0)
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 7)
    page = text_of(client_of(Folder(str(tmp_path))), "/datasets/math-sft/v0001/rows?sort=weight")
    assert "7 rows by weight, largest first, from place 1 on, of 7 rows" in page
    assert "rows behind these were not looked at" in page


def test_rows_of_one_prompt_are_found_across_files(tmp_path: Path) -> None:
    parts = [pa.concat_tables([rows(0, 3), rows(9, 1)]), pa.concat_tables([rows(9, 1, seed=1), rows(20, 2)])]
    publish_version(Storage(str(tmp_path)), parts=parts)
    wanted, siblings = read_row(load(f"{tmp_path}/math-sft"), 4)
    assert wanted["number"] == 4
    assert [row["number"] for row in siblings] == [3, 4]
