"""What `grape check` says of a pool before a run would refuse it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.estimate.finding import Finding, Table
from grape_service.estimate.look import chosen_candidates, look_into
from grape_service.estimate.pool_checks import dry_run, pool_findings
from grape_service.progress.reporter import Silent, set_reporter
from grape_service.storage.storage import Storage
from grape_service.weigh.behavior import missing_sources, refuse_missing_sources
from tests.prepared_pools import WordRenderer, make_config, prepare, write_jsonl

WEIGHED = {"weights": {"method": "pear"}}


def findings(config: Config) -> dict[str, Finding]:
    return {one.what: one for one in pool_findings(config, look_into(config)) if isinstance(one, Finding)}


def tables(config: Config) -> dict[str, list[dict]]:
    return {one.name: one.rows for one in pool_findings(config, look_into(config)) if isinstance(one, Table)}


def rows(number=6, **more):
    return [{"prompt": f"q {n // 2}", "response": f"a {n}", "source": "ab"[n % 2], **more} for n in range(number)]


def test_a_mapped_column_that_no_file_has_is_an_error(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", rows(model="m"))
    found = findings(make_config(pool, pool={"columns": {"source": "modle"}}))["columns"]
    assert found.status == "error"
    assert "pool.columns.source names the column 'modle', which no row has; did you mean 'model'?" in found.detail
    assert findings(make_config(pool))["columns"].status == "ok"


def test_filters_that_leave_nothing_are_an_error(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", rows(ok=False))
    where = [{"column": "ok", "equals": True}]
    assert "pool.where leaves none of the 6 rows" in findings(make_config(pool, pool={"where": where}))["pool"].detail
    where = [{"column": "okay", "equals": True}]
    found = findings(make_config(pool, pool={"where": where}))
    assert (found["pool"].status, found["columns"].status) == ("error", "error")
    assert "pool.where names the column 'okay', which no row has; did you mean 'ok'?" in found["columns"].detail


def test_what_explains_that_no_row_is_left_is_told_first(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", rows(ok=False))
    misspelt = make_config(pool, pool={"where": [{"column": "okay", "equals": True}]})
    assert next(one for one in findings(misspelt).values() if one.status == "error").what == "columns"
    assert next(iter(findings(make_config(pool)))) == "pool"
    assert "did you mean" not in findings(make_config(pool, pool={"columns": {"prompt": "question"}}))["columns"].detail
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"prompt": "q", "response": 3}])
    found = findings(make_config(numbers))["pool"].detail
    assert "response has the wrong type (1, first " in found
    assert "n.jsonl:1: " in found


def test_a_source_that_the_pool_lacks_cannot_be_kept_alone(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", rows())
    found = findings(make_config(pool, select={"method": "source:teacher"}))["columns"]
    assert found.status == "error"
    assert found.detail == "select.method keeps the source 'teacher', which no row of the pool has; there are: a, b"
    assert findings(make_config(pool, select={"method": "source:a"}))["columns"].status == "ok"


def test_sources_stand_side_by_side_and_all_that_are_missing_are_told(tmp_path):
    pool = write_jsonl(
        tmp_path / "p.jsonl",
        [*rows(), {"prompt": "x", "response": "y", "source": "c"}, {"prompt": "x", "response": "z"}],
    )
    behavior = {"sources": {"a": {"model": "m"}, "d": {"column": "lp"}}}
    config = make_config(pool, behavior=behavior, **WEIGHED)
    assert tables(config)["sources"] == [
        {"source": "a", "candidates": 3, "behavior": "m"},
        {"source": "b", "candidates": 3, "behavior": "none"},
        {"source": "c", "candidates": 1, "behavior": "none"},
        {"source": "d", "candidates": 0, "behavior": "column lp"},
        {"source": "(none)", "candidates": 1, "behavior": "none"},
    ]
    found = findings(config)["sources"]
    assert found.status == "error"
    assert "b (3 rows), c (1 rows), (none) (1 rows)" in found.detail
    with pytest.raises(UserError, match=r"b \(3 rows\), c \(1 rows\), \(none\) \(1 rows\)"):
        refuse_missing_sources(config, {"a": 3, "b": 3, "c": 1}, 1)
    lenient = make_config(pool, behavior={**behavior, "missing": "drop"}, **WEIGHED)
    assert findings(lenient)["sources"].status == "warning"
    refuse_missing_sources(lenient, {"b": 3}, 0)
    one = make_config(pool, behavior=behavior, select={"method": "source:a"}, **WEIGHED)
    assert missing_sources(one, {"a": 3, "b": 3}, 1) == {}
    assert missing_sources(make_config(pool), {"b": 3}, 1) == {}


def test_prompts_are_counted_by_their_distinct_responses(tmp_path):
    same = [{"prompt": "one", "response": "x", "source": source} for source in "ab"]
    pool = write_jsonl(tmp_path / "p.jsonl", [*rows(), *same])
    found = findings(make_config(pool))["prompts"]
    assert found.status == "warning"
    assert "4 (all rows read); prompts by their number of distinct responses: 1: 1, 2: 3" in found.detail
    assert "1 of 4 prompts have one response" in found.detail
    assert findings(make_config(pool, select={"min_candidates": 3}))["prompts"].status == "error"


def test_prompts_that_differ_in_white_space_or_a_system_turn_are_told(tmp_path):
    system = {"role": "system", "content": "Be brief."}
    twins = [
        {"prompt": "What is 1?", "response": "a"},
        {"prompt": "What  is 1?\n", "response": "b"},
        {"prompt": [system, {"role": "user", "content": "What is 1?"}], "response": "c"},
        {"prompt": "What is 2?", "response": "d"},
    ]
    found = findings(make_config(write_jsonl(tmp_path / "p.jsonl", twins)))["prompts"]
    assert "3 prompts differ from another only in white space or in a system turn" in found.detail


def test_the_column_that_select_keep_names_is_looked_at(tmp_path):
    pool = write_jsonl(tmp_path / "p.jsonl", rows(n=2))
    assert findings(make_config(pool, select={"keep": {"column": "n"}}))["columns"].status == "ok"
    assert (
        "select.keep names the column 'm'"
        in findings(make_config(pool, select={"keep": {"column": "m"}}))["columns"].detail
    )
    pool = write_jsonl(tmp_path / "p.jsonl", rows(n="two"))
    assert "not a whole number" in findings(make_config(pool, select={"keep": {"column": "n"}}))["columns"].detail


def test_a_dry_run_gives_the_reasons_that_the_run_gives(tmp_path):
    write_jsonl(
        tmp_path / "pool" / "a.jsonl",
        [
            *rows(),
            b"{",
            {"prompt": "q"},
            {"prompt": "long " * 30, "response": "b"},
            {"prompt": "q", "responses": ["x", "x", "y"], "finish_reason": ["stop", "stop", "length"]},
            {"prompt_id": "p", "prompt": "one", "response": "a"},
            {"prompt_id": "p", "prompt": "two", "response": "a"},
            {"prompt_id": "r", "candidate_id": "c", "prompt": "one", "response": "a"},
            {"prompt_id": "r", "candidate_id": "c", "prompt": "one", "response": "b"},
        ],
    )
    config = make_config(tmp_path / "pool", pool={"max_reject_share": 1})
    renderer = WordRenderer(max_tokens=20)
    _, prepared = prepare(config, Storage(str(tmp_path / "workspace")), renderer)
    look = look_into(config)
    found = dry_run(config, look, renderer.render(chosen_candidates(look)))
    for reason, count in {**prepared.rejects.by_reason, **prepared.left_out.by_reason}.items():
        assert f"{reason} ({count}" in found.detail
    assert found.status == "warning"
    strict = config.model_copy(update={"pool": config.pool.model_copy(update={"max_reject_share": 0.1})})
    assert dry_run(strict, look, renderer.render(chosen_candidates(look))).status == "error"


def test_every_group_is_looked_into_and_a_large_one_only_in_part(tmp_path):
    for number in range(20):
        write_jsonl(
            tmp_path / "a" / f"{number:02d}.jsonl", [{"prompt": f"q {number}", "response": f"a {n}"} for n in range(9)]
        )
    write_jsonl(
        tmp_path / "b.jsonl", [{"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]}]
    )
    groups = [{"path": f"{tmp_path}/a"}, {"path": f"{tmp_path}/b.jsonl", "source": "gen"}]
    config = make_config("", pool={"path": groups})
    look = look_into(config)
    assert [group.is_whole for group in look.groups] == [True, True]
    assert [(group.files, group.files_read) for group in look.groups] == [(20, 20), (1, 1)]
    first, second = tables(config)["groups"]
    assert (first["rows"], first["prompts"], first["candidates"]) == ("180", 20, 180)
    assert (second["rows"], second["prompts"]) == ("1", 1)
    assert "messages that end with the response" in findings(config)[f"shape of {tmp_path}/b.jsonl"].detail
    assert look.sources == {"(none)": 180, "gen": 1}
    assert len(chosen_candidates(look)) == 65
    late = look_into(config, seconds=0)
    assert [(group.files_read, group.is_whole) for group in late.groups] == [(1, False), (1, True)]


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def event(self, text: str) -> None:
        self.events.append(text)


def test_a_look_that_takes_long_says_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one row of gigabytes makes it; here so often that any look is long."""
    monkeypatch.setattr("grape_service.estimate.look.TELL_SECONDS", 0.001)
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "x" * 2**25}) + "\n")
    told = Told()
    set_reporter(told)
    try:
        look_into(make_config(path))
    finally:
        set_reporter(Silent())
    assert any(f"reading {path}, {path.stat().st_size:,} bytes; " in event for event in told.events), told.events[-5:]
