"""Scoring actors on a real Ray: pulled units, replicas that die, memory that runs out, shards that always fail."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.config.loading import parse_config
from grape_service.errors import StageError, UserError
from grape_service.gather.missing import Sampling
from grape_service.rows.columns import SHARD
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import write_parquet
from tests import tiny_models
from tests.drill_engines import DrillEngine
from tests.prepared_pools import write_jsonl
from tests.workers.scoring.replica_bench import Bench, assert_each_once, make_shards, stored_keys
from workers.cluster.ray import ray_for
from workers.run import Run, new_run
from workers.scoring import replicas as replicas_module
from workers.scoring.actor import ScoringActor, ScoringSpec
from workers.scoring.engines import engines_of
from workers.scoring.failures import failure_files, record_failed_unit
from workers.scoring.metrics import ScoringMetrics
from workers.scoring.queue import WorkQueue
from workers.scoring.replicas import Replicas
from workers.scoring.rows import COLUMNS, read_rows
from workers.scoring.unscored import plan_units
from workers.scoring.work import ScoreTotals, Unit, UnitResult, Work
from workers.stages.prepare import prepare
from workers.stages.score import Scoring, score, score_shards
from workers.stages.select import select

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("drill")
    bench = Bench(folder, tiny_models.make_model(folder / "model"))
    bench.drill()
    before = dict(os.environ)
    os.environ["GRAPE_ENGINE_CLASS"] = "tests.drill_engines:DrillEngine"
    os.environ["GRAPE_SAMPLER_CLASS"] = "tests.drill_samplers:SlowSampler"
    os.environ["DRILL_FILE"] = str(folder / "drill.json")
    try:
        with ray_for(bench.config(2).workers):
            yield bench
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_units_are_pulled_so_a_slow_replica_holds_nobody_up(bench: Bench) -> None:
    seconds, factor, num_shards = 0.3, 5, 100
    bench.drill(seconds=seconds, slow_factor=factor)
    with new_run(bench.config(2)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, num_shards)
        replicas = engines.of(run.config.target, num_shards)
        replicas.wait_ready(2)
        assert len(replicas.replicas) == 2
        store_id = run.policy_id(run.config.target)
        units = [unit for unscored in plan_units(run, store_id, shards) for unit in unscored.units()]
        started = time.monotonic()
        totals = replicas.score(WorkQueue([Work(unit, store_id) for unit in units], len(units)), lambda _: None)
        took = time.monotonic() - started
        ideal = num_shards * seconds / (1 + 1 / factor)
        print(f"{num_shards} shards, one replica {factor} times slower: {took:.1f} s, ideal {ideal:.1f} s")
        assert totals.rows == 4 * num_shards
        assert_each_once(run, 4 * num_shards)
        assert took < 1.25 * ideal


def test_a_replica_that_dies_is_replaced_and_nothing_is_scored_twice(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 12)
        engines.of(run.config.target, 12)
        bench.drill(die_once="one", seconds=0.05)
        totals = score_shards(run, engines, Scoring(run.config.target, "score"), shards)
        assert totals.failed == 0
        assert_each_once(run, 48)
        engines.close()
        assert any("died" in event["event"] for event in run.events.kept)


def test_a_unit_that_is_tried_again_is_the_same_work() -> None:
    unit = Unit("shards/b/shard-00000.parquet", "b", 10, 100, check=False, statistics=("rank", "entropy"))
    replicas, queue = object.__new__(Replicas), WorkQueue[Work]([], 0)
    replicas.metrics = ScoringMetrics("drill", "policy", gpus=0)
    replicas._again(Work(unit, "policy", temperature=0.7, attempts=1), "CUDA error", queue, ScoreTotals())
    again = queue.popleft()
    assert again.unit == replace(unit, check=True)
    assert (again.store_id, again.temperature, again.attempts) == ("policy", 0.7, 1)


def test_an_error_or_a_kill_leaves_the_same_statistics_of_every_row(bench: Bench) -> None:
    bench.drill()
    every = ("entropy", "rank", "top20_entropy")
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 3)
        keys = pa.concat_tables(read_rows(run.workspace, path) for path in shards[0].paths)["row_key"]
        found = {}
        for name, statistics in {"undisturbed": every, "fail_once": ("rank",), "die_once": every}.items():
            bench.drill(**({} if name == "undisturbed" else {name: "statistics"}))
            store_id = f"{run.policy_id(run.config.target)}-{name}"
            asked = Scoring(run.config.target, "score", statistics=statistics, store_id=store_id)
            totals = score_shards(run, engines, asked, shards)
            assert (totals.rows + totals.reused, totals.failed) == (12, 0)
            tables = ScoreStore(run.workspace, store_id).read_statistics("b", keys, statistics)
            assert all(table.found.all() for table in tables.values()), name
            found[name] = {name: table.take(np.arange(len(keys))).tolist() for name, table in tables.items()}
        assert found["die_once"] == found["undisturbed"]
        assert found["fail_once"] == {name: found["undisturbed"][name] for name in ("logprob", "rank")}
        engines.close()
        events = [event["event"] for event in run.events.kept]
        assert sum("this call failed" in text or "an engine died" in text for text in events) == 2


def actor_of(bench: Bench, run: Run) -> ScoringActor:
    """An actor in this process, with its engine."""
    policy = run.config.target
    actor = ScoringActor(ScoringSpec(policy, run.policy_id(policy), run.workspace, run.run_id, "compatible", {}))
    actor.engine = DrillEngine(policy, bench.model)
    return actor


def test_a_unit_that_is_looked_at_again_makes_what_its_rows_lack(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run:
        path = make_shards(run.workspace, 1)[0].paths[0]
        actor, store = actor_of(bench, run), ScoreStore(run.workspace, "policy")
        keys = read_rows(run.workspace, path)["row_key"]
        plain = Unit(path, "b", 4, 80, check=True)
        assert actor.score(1, plain, "policy") == replace(UnitResult(4, 0, 0, 80, 0.0), seconds=ANY)
        ranked = replace(plain, statistics=("rank",))
        assert actor.score(2, ranked, "policy") == replace(UnitResult(4, 0, 0, 80, 0.0), seconds=ANY)
        assert not store.missing("b", keys, ["rank"]).any()
        for unit in (plain, ranked):
            assert actor.score(3, unit, "policy") == replace(UnitResult(0, 0, 4, 0, 0.0), seconds=ANY)


def test_rows_with_the_same_tokens_fail_together(bench: Bench) -> None:
    bench.drill(missing_token=450)
    with new_run(bench.config(1)) as run:
        path = make_shards(run.workspace, 4)[0].paths[3]
        table = read_rows(run.workspace, path, [name for name in SHARD.names if name in COLUMNS or name == "source"])
        names = table.schema.field("candidate_id"), pa.array(["d0", "d1", "d2", "d3"])
        twice = pa.concat_tables([table, table.set_column(table.schema.get_field_index("candidate_id"), *names)])
        write_parquet(run.workspace, path, table.schema, [twice])
        unit = Unit(path, "b", 8, 160, check=False)
        assert actor_of(bench, run).score(1, unit, "policy") == replace(UnitResult(3, 2, 3, 80, 0.0), seconds=ANY)
        (path,) = failure_files(run.workspace, run.run_id, "policy")["b"]
        assert read_rows(run.workspace, path, ["candidate_id"])["candidate_id"].to_pylist() == ["c1", "d1"]
        assert record_failed_unit(run.workspace, run.run_id, "policy", unit, "its engine died") == (2, 6)
        ranked = replace(unit, statistics=("rank",))  # which no row has
        assert record_failed_unit(run.workspace, run.run_id, "policy", ranked, "its engine died") == (8, 0)


def test_a_statistic_that_went_missing_stops_the_run_and_is_made_by_the_next(bench: Bench) -> None:
    bench.drill()
    rows = [{"prompt": f"question {n // 2}", "response": f"answer {n}", "source": "ab"[n % 2]} for n in range(12)]
    pool = str(write_jsonl(bench.folder / "pool.jsonl", [*rows, b"{broken"]))
    settings = bench.config(1).model_dump(exclude={"behavior", "notify", "train"})
    config = parse_config({**settings, "pool": {"path": pool}, "select": {"method": "rsr"}})

    def kept() -> dict[str, str]:
        with new_run(config) as run, engines_of(run) as engines:
            prepared = prepare(run, engines)
            scored.append(score(run, engines, prepared).rows)
            return {name: run.workspace.sha256(path) for name, path in select(run, prepared).paths.items()}

    scored: list[int] = []
    first = kept()
    with new_run(config) as run:
        (path,) = ScoreStore(run.workspace, run.policy_id(config.target)).partition_files("b")
        with run.workspace.open(path) as file:
            table = pq.read_table(file)
        table = table.drop_columns(["rank"])
        write_parquet(run.workspace, path, table.schema, [table])
    with pytest.raises(StageError, match="12 rows lack a score or another statistic, and no failure was reported"):
        kept()
    assert kept() == first
    assert scored == [12, 0, 12]
    strict = parse_config({**settings, "pool": {"path": pool, "max_reject_share": 0}})
    with (
        new_run(strict) as run,
        engines_of(run) as engines,
        pytest.raises(UserError, match=r"1 of 13 rows .*more than pool\.max_reject_share 0"),
    ):
        prepare(run, engines)  # of a pool that was prepared for another share


def test_out_of_memory_halves_the_budget_and_goes_on(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 4)
        engines.of(run.config.target, 4)
        bench.drill(oom_above=1024)
        totals = score_shards(run, engines, Scoring(run.config.target, "score"), shards)
        assert (totals.rows, totals.failed) == (16, 0)
        engines.close()
        budgets = [event["event"] for event in run.events.kept if "halved" in event["event"]]
        assert [text.rsplit(" ", 1)[-1] for text in budgets] == ["2048", "1024"]


def test_a_row_that_always_fails_its_shard_is_found_and_recorded_alone(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 6)
        engines.of(run.config.target, 6)
        bench.drill(fail_token=450)
        totals = score_shards(run, engines, Scoring(run.config.target, "score"), shards)
        assert (totals.rows + totals.reused, totals.failed) == (23, 1)
        engines.close()
        # Its shard of four rows three times, then the half that has it, then itself.
        assert sum(" of 3: RuntimeError" in event["event"] for event in run.events.kept) == 5
        (table,) = [pq.read_table(run.workspace.full(i.path)) for i in run.workspace.list(f"{run.folder}/failures")]
        assert set(table["reason"].to_pylist()) == {"RuntimeError: this batch always fails"}
        assert table.select(["prompt_id", "candidate_id"]).to_pylist() == [
            {"prompt_id": "prompt-3", "candidate_id": "c1"}
        ]
        bench.drill()
        again = score_shards(run, engines, Scoring(run.config.target, "score again"), shards)
        assert (again.rows, again.reused, again.failed) == (1, 23, 0)
        assert_each_once(run, 24)


def test_an_engine_without_progress_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas_module, "STUCK_SECONDS", 3.0)
    monkeypatch.setattr(replicas_module, "STUCK_FACTOR", 0.0)
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 8)
        engines.of(run.config.target, 8)
        bench.drill(seconds=0.5, hang_token=450)
        started = time.monotonic()
        totals = score_shards(run, engines, Scoring(run.config.target, "score"), shards)
        assert time.monotonic() - started < 60
        assert (totals.rows + totals.reused, totals.failed) == (32, 0)
        assert_each_once(run, 32)
        engines.close()
        assert any("an engine made no progress for 3 seconds" in event["event"] for event in run.events.kept)


def test_a_sampler_in_its_first_long_unit_is_at_work(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.drill(step_seconds=1.0)
    sampling = Sampling("sampler", SamplingConfig(max_tokens=9), 2, (), VerifyConfig(), None)
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        make_shards(run.workspace, 1)
        replicas = engines.of(run.config.target, 1, sampling)
        replicas.wait_ready(1)
        monkeypatch.setattr(replicas_module, "START_SECONDS", 5)  # of one that has shown nothing yet
        work = Work(Unit("shards/shard-00000.parquet", "b", 8, 8, check=True), sampling.sampler)
        totals = replicas.score(WorkQueue([work], 1), lambda samples: None)
        assert (totals.rows, totals.tokens, totals.failed_units) == (8, 72, [])
        assert totals.engine_seconds > 9
        engines.close()
        assert not any("no progress" in event["event"] for event in run.events.kept)


def test_a_run_that_can_no_longer_succeed_stops_at_once(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 60)
        engines.of(run.config.target, 60)
        bench.drill(seconds=0.2, missing_token=450)
        with pytest.raises(StageError, match=r"more than workers\.max_failed_share 0 allows: the run stops"):
            score_shards(run, engines, Scoring(run.config.target, "score", max_failed_share=0), shards)
        assert len(stored_keys(run)) < 60


def test_a_row_without_a_score_goes_to_failures_alone(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        shards = make_shards(run.workspace, 6)
        engines.of(run.config.target, 6)
        bench.drill(missing_token=450)
        totals = score_shards(run, engines, Scoring(run.config.target, "score"), shards)
        assert (totals.rows, totals.failed) == (23, 1)
        (table,) = [pq.read_table(run.workspace.full(i.path)) for i in run.workspace.list(f"{run.folder}/failures")]
        assert table["reason"].to_pylist() == ["log-probability missing"]


def test_a_replica_with_other_scores_is_refused_by_its_canary(bench: Bench) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        engines.of(run.config.target, 1)
        engines.close()
        path = f"scores/{run.policy_id(run.config.target)}/canary.json"
        stored = run.workspace.read_json(path)
        stored["logprobs"] = [value - 0.5 for value in stored["logprobs"]]
        stored["dtype"] = "bfloat16"
        run.workspace.write_json(path, stored)
        with pytest.raises(StageError, match="dtype bfloat16 there, float32 here"):
            engines.of(run.config.target, 1)


def test_replicas_of_other_weights_or_another_template_are_refused(bench: Bench, tmp_path: Path) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        other = tiny_models.make_model(tmp_path / "other", seed=1)
        wrong = run.config.target.model_copy(update={"model": other})
        assert run.policy_id(wrong) != run.policy_id(run.config.target)
        engines.of(run.config.target, 1)
        spec = engines.replicas.spec  # type: ignore[union-attr]
        engines.close()
        with pytest.raises(StageError, match="are not those of the run"):
            Replicas(run.config, replace(spec, policy=wrong), 1).wait_ready(1)

        copied = Path(shutil.copytree(bench.model, tmp_path / "copied" / "model"))
        template = copied / "chat_template.jinja"
        template.write_text(template.read_text() + "{# changed #}")
        same_weights = run.config.target.model_copy(update={"model": str(copied)})
        with pytest.raises(StageError, match=r"is not that of the run: chat_template\.jinja differ"):
            Replicas(run.config, replace(spec, policy=same_weights), 1).wait_ready(1)


def test_policies_take_turns(bench: Bench, tmp_path: Path) -> None:
    bench.drill()
    with new_run(bench.config(1)) as run, engines_of(run) as engines:
        first = engines.of(run.config.target, 1)
        pid = first.descriptions()[0]["pid"]
        assert engines.of(run.config.target, 1) is first
        other = run.config.target.model_copy(update={"model": tiny_models.make_model(tmp_path / "other", seed=1)})
        second = engines.of(other, 1)
        assert second is not first
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists():
            assert time.monotonic() < deadline, "the first policy's engine is still there"
            time.sleep(0.1)
