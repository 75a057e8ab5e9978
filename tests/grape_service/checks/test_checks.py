"""A pool that is bad in one way triggers that check and names the rows; a clean one triggers none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from grape_service.checks.evaluation_sets import evaluation_items
from grape_service.checks.findings import CheckCounts, result_of
from grape_service.checks.prompt_shuffle import mean_scores, shuffled, trust
from grape_service.checks.run import CheckContext, CheckPartition, check_partition, gather_digests, shared_digests
from grape_service.checks.sources import check_sources
from grape_service.checks.texts import evaluation_grams, language_of
from grape_service.config.checks import ChecksConfig
from grape_service.config.loading import parse_config
from grape_service.errors import UserError
from grape_service.rows.columns import FINDING, SHARD
from grape_service.storage.parquet import read_tables, write_parquet
from grape_service.storage.slices import SliceFiles
from grape_service.storage.storage import Storage
from tests.grape_service.checks.made_checks import CLEAN, check_of, clean_rows, row, table

pytestmark = pytest.mark.quick

ITEM = "Natalia sold clips to forty eight of her friends in April and then half as many in May"
ROW_CHECKS = [name for name, field in ChecksConfig.model_fields.items() if field.default.scope.endswith("rows")]


def found_in(folder: Path, rows: list[dict[str, Any]], names: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results of the checks on rows that are all kept, and their findings."""
    storage = Storage(str(folder))
    settings = {"contamination": {"files": ["x.jsonl"]}}
    checks = [check_of(name, **settings.get(name, {})) for name in names]
    write_parquet(storage, "shard.parquet", SHARD, [table(rows)])
    grams = evaluation_grams([ITEM], 13)
    partition = CheckPartition(["shard.parquet"], "shard.parquet", "found.parquet", "digests.parquet")
    counts = check_partition(CheckContext(storage, checks, grams), partition)
    if "exact_duplicates" in names:
        bounds = gather_digests(storage, ["digests.parquet"], 2, "digests.arrow")
        files = SliceFiles(["digests.arrow"], np.array([bounds]))
        parts = [shared_digests(storage, files, n, f"dup-{n}.parquet") for n in range(2)]
        counts["exact_duplicates"] += sum(parts, CheckCounts())
    paths = [info.path for info in storage.list() if info.path.startswith(("found", "dup"))]
    findings = pa.concat_tables([FINDING.empty_table(), *read_tables(storage, paths)]).to_pylist()
    return {check.name: result_of(check, counts[check.name]) for check in checks}, findings


def test_a_clean_pool_triggers_nothing(tmp_path: Path) -> None:
    results, findings = found_in(tmp_path, clean_rows(), ROW_CHECKS)
    assert {name: result["warning"] for name, result in results.items()} == dict.fromkeys(ROW_CHECKS)
    assert findings == []
    assert all(result["rows"] > 0 for result in results.values())


ANSWER = "We begin with the first number and go on to the second one, and so the answer that we get to is {}. "
BAD = {
    "exact_duplicates": [CLEAN.format(n="x")] * 8,
    "contamination": [f"{ANSWER.format(n)} {ITEM.upper()}!" for n in range(8)],
    "language": [
        f"Das ist die Antwort auf die Frage {n}, und sie ist nicht mit der anderen zu verwechseln." for n in range(8)
    ],
    "refusal": [f"I{'’' if n % 2 else chr(39)}m sorry, but that is request number {n}." for n in range(8)],
    "boilerplate": [f"{ANSWER.format(n)} I hope this helps with the sums that you have to do." for n in range(8)],
    "truncation": [f"{ANSWER.format(n) * 2} And now to the last of the many steps that we" for n in range(8)],
    "repetition": [f"Number {n} " + "and again the same words " * 20 for n in range(8)],
}


@pytest.mark.parametrize("name", BAD)
def test_each_fault_has_its_own_check(tmp_path: Path, name: str) -> None:
    bad = [row(f"bad{n}", "c0", text) for n, text in enumerate(BAD[name])]
    results, findings = found_in(tmp_path, [*clean_rows(), *bad], ROW_CHECKS)
    assert results[name]["warning"]
    assert results[name]["found"] == 8
    assert {f["prompt_id"] for f in findings if f["check"] == name} == {f"bad{n}" for n in range(8)}
    others = [other for other, result in results.items() if result["warning"] and other != name]
    assert others == (["truncation"] if name == "repetition" else [])


def test_near_duplicates_within_a_prompt(tmp_path: Path) -> None:
    words = (CLEAN * 2).split()
    bad = []
    for n in range(20):
        changed = [*words[:-1], f"end{n}."]
        bad += [row(f"bad{n}", "c0", " ".join([*words, str(n)])), row(f"bad{n}", "c1", " ".join([*changed, str(n)]))]
    results, findings = found_in(tmp_path, [*clean_rows(), *bad], ["near_duplicates"])
    assert results["near_duplicates"]["found"] == 20
    assert "c0" in findings[0]["detail"]
    many = [row("many", f"c{n:03}", f"{CLEAN.format(n=n)} {n} " + f"word{n} " * 30) for n in range(140)]
    many.append(row("many", "copy", many[7]["messages"] and orjson.loads(many[7]["messages"])[1]["content"]))
    _, findings = found_in(tmp_path, many, ["near_duplicates"])
    assert "copy" in {finding["candidate_id"] for finding in findings}


def test_no_turn_end_is_truncation(tmp_path: Path) -> None:
    rows = [row(f"p{n}", "c0", CLEAN.format(n=n), turn_end=False) for n in range(5)]
    results, _ = found_in(tmp_path, rows, ["truncation"])
    assert results["truncation"]["reasons"] == {"no turn end": 5}


def test_sources_that_always_or_never_win() -> None:
    select = {"names": ["a", "b", "c"], "prompts_with": [100, 100, 10], "wins": [99, 0, 10]}
    result, findings = check_sources(check_of("sources"), select)
    assert result["found"] == 2
    assert result["reasons"] == {"always wins": 1, "never wins": 1}
    assert "a wins 99 of 100 prompts; b wins 0 of 100" in result["warning"]
    assert findings["detail"].to_pylist() == ["a wins 99 of 100 prompts", "b wins 0 of 100 prompts"]
    result, findings = check_sources(check_of("sources"), {**select, "wins": [60, 40, 10]})
    assert result["warning"] is None
    assert findings.num_rows == 0


def test_each_response_is_moved_to_the_next_prompt() -> None:
    rows = [row(f"p{n}", "c0", f"answer {n}") for n in range(3)]
    for n, made in enumerate(rows):
        made["input_ids"] = [10 + n, 20 + n, 30 + n, *made["input_ids"][3:]]
    moved = shuffled(table(rows))
    assert [ids[:3] for ids in moved["input_ids"].to_pylist()] == [[11, 21, 31], [12, 22, 32], [10, 20, 30]]
    assert [ids[3:] for ids in moved["input_ids"].to_pylist()] == [made["input_ids"][3:] for made in rows]
    assert len(set(moved["row_key"].to_pylist())) == 3

    settings = check_of("untrusted_target")
    real = mean_scores([[-1.0, -2.0]] * 30)
    assert real.tolist() == [-1.5] * 30
    assert trust(real, real - 1, settings)[1] is None
    flagged, warning = trust(real, real + np.linspace(-0.1, 0.1, 30), settings)
    assert "cannot be trusted" in (warning or "")
    assert flagged.rows == list(range(15, 30))
    assert flagged.details[-1] == "-1.5000 under its own prompt, -1.4000 there"


def test_evaluation_files_and_their_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(orjson.dumps({"question": ITEM, "more": ["x", {"y": "z"}]}) + b"\n")
    (tmp_path / "b.txt").write_text("one line\nanother")
    files = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt"]
    assert list(evaluation_items(files, {})) == [ITEM, "x", "z", "one line", "another"]
    with pytest.raises(UserError, match="does not exist"):
        list(evaluation_items([f"{tmp_path}/c.jsonl"], {}))
    with pytest.raises(UserError, match="is no evaluation set"):
        list(evaluation_items([f"{tmp_path}/b.txt", f"{tmp_path}/config.yaml"], {})) if (
            tmp_path / "config.yaml"
        ).write_text("x") else None


@pytest.mark.parametrize(
    ("checks", "sentence"),
    [
        ({"refusals": "warn"}, "did you mean 'refusal'"),
        ({"refusal": {"action": "fail", "max_shar": 0.1}}, "unknown key 'checks.refusal.max_shar'; did you mean"),
        ({"refusal": {"action": "fail", "max_share": "much"}}, "'checks.refusal.max_share': should be a number"),
        ({"refusal": "loud"}, "'checks.refusal.action': should be 'off', 'warn' or 'fail'"),
        ({"contamination": "warn"}, "needs files"),
    ],
)
def test_wrong_settings_are_named(checks: dict[str, Any], sentence: str) -> None:
    values = {"name": "a", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}, "checks": checks}
    with pytest.raises(UserError) as raised:
        parse_config(values)
    assert sentence in str(raised.value)


def test_a_check_that_is_off_does_not_run() -> None:
    assert ChecksConfig.model_validate({"refusal": "off", "language": False}).enabled() == []
    assert [check.name for check in ChecksConfig.model_validate({"refusal": "warn"}).enabled()] == ["refusal"]


def test_languages() -> None:
    assert language_of(CLEAN) == "en"
    assert language_of("Это ответ на вопрос") == "ru"
    assert language_of("x = 3 + 4") is None
