"""Racing on a real engine: the same rows are kept, nothing is scored twice, and a part of a score is never a score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.errors import UserError
from grape_service.estimate.racing import RaceSaving, race_saving
from grape_service.keys import complete_key
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.keys import row_keys
from grape_service.score.stopped import read_stopped, stopped_store
from grape_service.select.race_rows import Race
from tests.made_rows import Row
from tests.tiny_models import make_model
from tests.workers.scoring.race_bench import CANDIDATES, PROMPTS, STATISTICS, Bench, rows_of_pool
from workers.scoring.failures import failure_files


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"), "llama", initializer_range=0.5)


@pytest.fixture
def bench(tmp_path: Path, model: str) -> Bench:
    return Bench(tmp_path / "raced", model, rows_of_pool())


def assert_same_choice(raced: list[dict[str, Any]], whole: list[dict[str, Any]]) -> None:
    assert [(row["prompt_id"], row["candidate_id"]) for row in raced] == [
        (row["prompt_id"], row["candidate_id"]) for row in whole
    ]
    for one, other in zip(raced, whole, strict=True):
        assert one["grape_rank"] == other["grape_rank"]
        assert one["grape_score"] == pytest.approx(other["grape_score"], abs=1e-5)
        assert one["target_logprobs"] == pytest.approx(other["target_logprobs"], abs=1e-4)
        assert one["target_entropy"] == pytest.approx(other["target_entropy"], abs=1e-4)
        if one["margin_at_least"]:
            assert one["grape_margin"] <= other["grape_margin"] + 1e-5
        else:
            assert one["grape_margin"] == pytest.approx(other["grape_margin"], abs=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    "select",
    [{}, {"keep": 3}, {"count_turn_end": True}, {"min_margin": 0.4, "min_candidates": 2}, {"max_response_tokens": 40}],
    ids=str,
)
def test_a_race_keeps_what_scoring_every_token_keeps(tmp_path: Path, model: str, select: dict[str, Any]) -> None:
    raced, whole = (Bench(tmp_path / name, model, rows_of_pool()) for name in ("raced", "whole"))
    kept, counts = raced.run(raced.config("exact", **select))
    all_kept, all_counts = whole.run(whole.config("off", **select))
    assert_same_choice(kept, all_kept)
    assert counts.prompts_left_out == all_counts.prompts_left_out
    assert whole.asked.loss_tokens == whole.all_tokens
    assert raced.asked.loss_tokens < raced.all_tokens
    assert counts.stopped_candidates > 0
    assert counts.failed_candidates == counts.unexplained_failures == 0
    # Every token of every candidate is scored, or said to be left.
    distinct = {row["row_key"]: row for row in raced.rows}
    assert raced.done == whole.done == whole.through == sum(len(row["input_ids"]) for row in distinct.values())
    assert raced.through < raced.done
    twice = [row for row in raced.rows if distinct[row["row_key"]] is not row]
    assert counts.loss_tokens == raced.all_tokens + sum(sum(m > 0 for m in row["loss_mask"]) for row in twice)
    stopped = read_stopped(stopped_store(raced.store), "b", raced.keys, STATISTICS)
    assert (stopped.limits.bound >= stopped.limits.reach)[stopped.known > 0].all()
    assert (stopped.limits.risk == 0)[stopped.known > 0].all()
    if not select:
        assert any(row["margin_at_least"] for row in kept)


def test_a_plan_foretells_what_a_race_spares(tmp_path: Path, model: str) -> None:
    raced, whole = (Bench(tmp_path / name, model, rows_of_pool()) for name in ("raced", "whole"))
    config = raced.config("exact")
    assert race_saving(raced.config("off"), [raced.shards], raced.store) is None
    nothing = race_saving(config, [whole.shards], whole.store)
    assert nothing is not None
    assert (nothing.share, "is not known" in nothing.sentence()) == (None, True)
    raced.score(config)
    whole.score(whole.config("off"))
    foretold = race_saving(config, [whole.shards], whole.store)
    assert foretold is not None
    assert (foretold.prompts, foretold.loss_tokens) == (PROMPTS, whole.all_tokens)
    assert foretold.share == pytest.approx(1 - raced.asked.loss_tokens / raced.all_tokens, abs=0.05)
    assert foretold.spared > 0
    after = race_saving(config, [raced.shards], raced.store)  # what it did spare
    assert after == RaceSaving(PROMPTS, raced.all_tokens, raced.all_tokens - raced.asked.loss_tokens)
    audited = race_saving(raced.config({"risk": 0.01, "audit": 1.0}), [whole.shards], whole.store)
    assert audited is not None
    assert audited.share == 0.0


def test_a_part_of_a_score_is_the_beginning_of_the_whole_one_and_never_taken_for_it(bench: Bench) -> None:
    bench.run(bench.config("exact"))
    stopped = read_stopped(stopped_store(bench.store), "b", bench.keys, STATISTICS)
    there = stopped.known > 0
    assert there.any()
    assert bench.store.missing("b", bench.keys, STATISTICS)[there].all()
    assert not bench.store.read("b", bench.keys).found[there].any()
    lengths = [sum(m > 0 for m in row["loss_mask"]) for row in bench.rows]
    assert (stopped.known[there] < np.array(lengths)[there]).all()
    before = bench.asked.loss_tokens
    bench.score(bench.config("off"), "second")
    assert bench.asked.loss_tokens == bench.all_tokens, "the rest was scored, and nothing twice"
    assert before < bench.all_tokens
    assert not bench.store.missing("b", bench.keys, STATISTICS).any()
    whole = bench.store.read_statistics("b", bench.keys, STATISTICS)
    fresh = Bench(Path(bench.storage.root) / "fresh", bench.model, bench.rows)
    fresh.score(fresh.config("off"))
    reference = fresh.store.read_statistics("b", fresh.keys, STATISTICS)
    for row in range(len(bench.rows)):
        for name in ("logprob", "entropy"):
            values = whole[name].take(np.array([row]))
            assert values.tolist() == pytest.approx(reference[name].take(np.array([row])).tolist(), abs=1e-4)
            if there[row]:  # what was scored in the race stays as it was, bit for bit
                first = stopped.tables[name].take(np.array([row]))
                assert values[: len(first)].tolist() == first.tolist()
    assert bench.score(bench.config("off"), "third") == []


def test_another_keep_scores_on_from_where_the_race_had_stopped(bench: Bench, tmp_path: Path) -> None:
    bench.run(bench.config("exact"))
    first = bench.asked.loss_tokens
    assert bench.score(bench.config("exact"), "again") == [], "nothing is left to score"
    kept, counts = bench.run(bench.config("exact", keep=3))
    assert bench.asked.loss_tokens > first
    whole = Bench(tmp_path / "whole", bench.model, bench.rows)
    assert_same_choice(kept, whole.run(whole.config("off", keep=3))[0])
    tokens = bench.asked.loss_tokens
    fewer, _ = bench.run(bench.config("exact"))
    assert bench.asked.loss_tokens == tokens, "fewer need no more"
    assert_same_choice(fewer, whole.select(whole.config("off"))[0])
    bench.score(bench.config("off"), "off")
    assert bench.asked.loss_tokens == bench.all_tokens
    assert counts.stopped_tokens > 0


def test_a_race_that_ends_between_two_waves_and_runs_again_leaves_the_same_bytes(tmp_path: Path, model: str) -> None:
    config = Bench(tmp_path / "once", model, rows_of_pool()).config("exact")
    once = Bench(tmp_path / "once", model, rows_of_pool())
    once.run(config)
    assert once.asked.calls > 5
    for call in range(2, once.asked.calls + 1):
        killed = Bench(tmp_path / f"killed-{call}", model, rows_of_pool())
        killed.asked.fail_in_call = call
        with pytest.raises(KeyboardInterrupt):
            killed.score(config)
        killed.asked.fail_in_call = None
        killed.run(config)
        assert killed.storage.sha256("kept.parquet") == once.storage.sha256("kept.parquet"), call


def test_a_row_that_fails_takes_its_prompt_out_and_is_on_record(bench: Bench, tmp_path: Path) -> None:
    config = bench.config("exact")
    second = next(row for row in bench.rows if row["prompt_id"] == "p1")
    bench.asked.missing_token = second["input_ids"][second["prompt_len"] + 1]
    results = bench.score(config)
    assert sum(result.failed for result in results) > 0
    paths = failure_files(bench.storage, "run", "target")["b"]
    failed = pa.concat_tables([pq.read_table(bench.storage.full(path)) for path in paths])
    raced, counts = bench.select(config, pa.concat_arrays(failed["row_key"].chunks))
    left_out = set(failed["prompt_id"].to_pylist())
    assert counts.prompts_left_out["failed candidate"] == len(left_out) < PROMPTS
    whole, _ = Bench(tmp_path / "whole", bench.model, bench.rows).run(bench.config("off"))
    assert_same_choice(raced, [row for row in whole if row["prompt_id"] not in left_out])
    assert counts.unexplained_failures == 0
    bench.asked.missing_token = None
    kept, counts = bench.run(config)
    assert counts.failed_candidates == 0
    assert len({row["prompt_id"] for row in kept}) == PROMPTS


def test_a_selection_that_could_keep_a_stopped_row_finds_no_score(bench: Bench) -> None:
    bench.run(bench.config("exact"))
    _, counts = bench.select(bench.config("exact", keep=3))
    assert counts.unexplained_failures > 0, "the stage ends with an error, and the next run scores them"


@pytest.mark.parametrize(
    ("select", "sentence"),
    [
        ({"method": "rsr"}, r"score.race stops .* and select.method rsr says no such thing .* or use grape"),
        ({"method": "random"}, "select.method random scores nothing: set score.race to off"),
        ({"method": "grape", "max_source_share": 0.5}, "does not go with select.max_source_share"),
    ],
)
def test_what_cannot_be_raced_is_refused(bench: Bench, select: dict[str, Any], sentence: str) -> None:
    for race in ("exact", {"risk": 0.01}):
        with pytest.raises(UserError, match=sentence):
            bench.config(race, **select)
    bench.config(False, **select)
    bench.config("off", **select)


def test_a_race_that_has_ended_is_noted_under_its_own_name(bench: Bench) -> None:
    off, exact = bench.config("off"), bench.config("exact")
    names = {
        complete_key("p", [], config.score.race, config.select)
        for config in (off, exact, bench.config("exact", keep=2), bench.config({"risk": 0.01}))
    }
    assert len(names) == 4
    assert complete_key("p", [], "off", exact.select) == complete_key("p", [])


def long_rows(seed: int = 3) -> list[dict[str, Any]]:
    """Candidates of 60 to 200 tokens, as long as the model takes: enough to learn the pool's spread from."""
    random = np.random.default_rng(seed)
    rows = []
    for prompt in range(PROMPTS):
        question = random.integers(0, 500, size=10).tolist()
        for candidate in range(CANDIDATES):
            length = int(random.integers(60, 200))
            answer = random.integers(0, 500, size=length).tolist()
            for place in range(2, length):  # the more of it repeats, the easier it is
                if random.random() < candidate / CANDIDATES:
                    answer[place] = answer[place - 2]
            ids, mask = [*question, *answer], [0] * len(question) + [LOSS_TOKEN] * length
            row = Row(f"p{prompt}", f"c{candidate}", source="ab"[candidate % 2]).as_dict()
            key = row_keys(np.array(ids, np.int32), np.array(mask, np.uint8), np.array([0, len(ids)]))[0].as_py()
            rows.append({**row, "row_key": key, "input_ids": ids, "loss_mask": mask, "prompt_len": len(question)})
    return rows


def test_a_race_with_a_risk_saves_more_and_audits_some_prompts(tmp_path: Path, model: str) -> None:
    rows = long_rows()
    exact, risky, audited = (Bench(tmp_path / name, model, rows) for name in ("exact", "risky", "audited"))
    settings = {"risk": 0.05, "audit": 0}
    exact.run(exact.config("exact"))
    _, counts = risky.run(risky.config(settings))
    assert risky.asked.loss_tokens < exact.asked.loss_tokens
    assert counts.failed_candidates == counts.audited == 0
    assert risky.score(risky.config(settings), "again") == [], "what is stored settles them"
    stopped = read_stopped(stopped_store(risky.store), "b", risky.keys, STATISTICS)
    by_risk = stopped.limits.risk > 0
    assert by_risk.any()
    assert (stopped.limits.reach < stopped.limits.bound)[by_risk].all()
    assert set(stopped.limits.risk[by_risk].tolist()) == {0.05}
    # What was stopped at a risk is no more than a beginning where none, or less, is taken.
    for other in ("exact", {"risk": 0.01, "audit": 0}):
        _, counts = risky.select(risky.config(other))
        assert counts.unexplained_failures > 0
    everything = risky.config({"risk": 0.05, "audit": 1.0})
    _, counts = audited.run(everything)
    assert audited.asked.loss_tokens == audited.all_tokens, "all prompts are audited"
    assert counts.stopped_candidates == 0
    assert counts.audited == PROMPTS
    kept, _ = audited.select(audited.config("off"))
    raced = {row["candidate_id"] + row["prompt_id"] for row in risky.select(risky.config(settings))[0]}
    same = sum(row["candidate_id"] + row["prompt_id"] in raced for row in kept)
    assert counts.audited_same == same, "the audit says what the race without it comes to"
    kept, counts = risky.run(risky.config("exact"))
    assert_same_choice(kept, exact.select(exact.config("exact"))[0])


def test_the_same_prompts_are_audited_each_time(bench: Bench) -> None:
    race = Race.of(bench.config("exact").select, bench.config({"risk": 0.01, "audit": 0.1}).score)
    assert race is not None
    drawn = [number for number in range(5000) if race.audits(f"prompt {number}")]
    assert 400 < len(drawn) < 600
    assert drawn == [number for number in range(5000) if race.audits(f"prompt {number}")]
