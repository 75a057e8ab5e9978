"""The gather stage: prompts to a release, samples made once whatever dies, verdicts that stop, limits that end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import grape_service
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError
from grape_service.estimate.plan import make_plan
from grape_service.release.ancestry import Wanted, holders
from grape_service.release.load import load_training_set
from grape_service.release.verify import verify
from tests import tiny_models
from workers.pipeline import reweigh, run_pipeline

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make_model(tmp_path_factory.mktemp("model"))


def config_for(folder: Path, model: str, **gather: Any) -> dict[str, Any]:
    rows = [{"question": f"{n}+{n}?", "answer": str(2 * n), "topic": "sums"} for n in range(8)]
    (folder / "pool").mkdir(parents=True, exist_ok=True)
    (folder / "pool" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = {"model": model, "engine": "transformers", "dtype": "float32"}
    return {
        "name": "sampled",
        "pool": {"path": str(folder / "pool"), "max_reject_share": 1.0, "truncated": "keep"},
        "target": policy,
        "gather": {
            "policies": {"self": {**policy, "samples": 3}},
            "sampling": {"max_tokens": 8},
            "verify": {"method": "regex", "pattern": "[0-9]"},
            **gather,
        },
        "weights": {"method": "pear"},
        "output": {"path": str(folder / "out")},
        "workers": {"replicas": 1, "shard_tokens": 20},
    }


def kept_samples(folder: Path) -> list[dict[str, Any]]:
    """Every gathered candidate, in order."""
    files = sorted(folder.glob("out/.grape/gathered/pools/*/*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: (row["source"], row["prompt_id"], row["sample"]))


def test_prompts_become_a_release_and_nothing_is_sampled_twice(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = config_for(tmp_path / "calm", model)
    release = grape_service.run(calm)
    counts = release.manifest.counts["gather"]["self"]
    assert (counts["prompts"], counts["samples"], counts["sampled_now"]) == (8, 24, 24)
    assert counts["right"] + counts["wrong"] == 24
    assert counts["audit"]["samples"] == 24
    assert counts["audit"]["largest"] < 1e-4
    rows = release.dataset.to_table().to_pylist()
    assert {row["source"] for row in rows} == {"self"}
    assert {(row["messages"][0]["content"], row["answer"], row["topic"]) for row in rows} <= {
        (f"{n}+{n}?", str(2 * n), "sums") for n in range(8)
    }
    for row in rows:  # the target sampled them itself: recorded and scored are one number
        pairs = zip(row["target_logprobs"], row["behavior_logprobs"], row["loss_mask"], strict=True)
        assert all(abs(t - b) < 1e-4 for t, b, has_loss in pairs if has_loss)
    assert all(row["weight_source"] == "pear" for row in rows)

    # The same job with a sampler whose process dies and that fails: the same samples, each made once.
    rough = config_for(tmp_path / "rough", model)
    (tmp_path / "drill").mkdir()
    monkeypatch.setenv("GRAPE_SAMPLER_CLASS", "tests.drill_samplers:DiesOnce")
    monkeypatch.setenv("GRAPE_DRILL_FOLDER", str(tmp_path / "drill"))
    outcome = run_pipeline(Config.model_validate(rough), until="gather")
    assert (outcome.rows, outcome.scored) == (24, 24)
    assert kept_samples(tmp_path / "rough") == kept_samples(tmp_path / "calm")

    # More samples add to those that are there; a limit ends a run with what there is.
    monkeypatch.delenv("GRAPE_SAMPLER_CLASS")
    more = config_for(tmp_path / "calm", model)
    more["gather"]["policies"]["self"]["samples"] = 5
    more["gather"]["limit"] = {"tokens": 1}
    outcome = run_pipeline(Config.model_validate(more), until="gather")
    assert 24 < outcome.rows < 40
    assert outcome.rows == outcome.scored + 24

    # A plan counts what is left, at the length of what is there.
    sampled, scored = make_plan(Config.model_validate(more), tokens_per_second=1.0).policies
    assert (sampled.rows, sampled.reused_rows) == (40 - outcome.rows, outcome.rows)
    assert 0 < sampled.tokens <= 8 * sampled.rows
    assert scored.rows == 40
    del more["gather"]["limit"]
    assert run_pipeline(Config.model_validate(more), until="gather").scored == 40 - outcome.rows
    sampled, _ = make_plan(Config.model_validate(more), device="cpu", tokens_per_second=1.0).policies
    assert (sampled.rows, sampled.reused_rows, sampled.tokens) == (0, 40, 0)


@pytest.mark.long
def test_a_prompt_with_enough_right_samples_gets_no_more(tmp_path: Path, model: str) -> None:
    always = {"method": "regex", "pattern": ""}
    outcome = run_pipeline(
        Config.model_validate(config_for(tmp_path, model, verify=always, stop_after={"right": 1})), until="gather"
    )
    assert (outcome.rows, outcome.counts["gather"]["self"]["right"]) == (8, 8)
    never = {"method": "regex", "pattern": "never said"}
    outcome = run_pipeline(
        Config.model_validate(config_for(tmp_path, model, verify=never, stop_after={"right": 1})), until="gather"
    )
    assert (outcome.rows, outcome.counts["gather"]["self"]["wrong"], outcome.scored) == (24, 24, 16)


def test_prompts_that_cannot_be_sampled_are_bounded_and_on_record(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPE_SAMPLER_CLASS", "tests.drill_samplers:FailsOnText")
    monkeypatch.setenv("GRAPE_DRILL_TEXT", "3+3?")
    config = config_for(tmp_path, model)
    told = r"1 of 8 prompts could not be sampled from gather\.policies\.self, more than workers\.max_failed_share 0 "
    with pytest.raises(StageError, match=told):
        run_pipeline(Config.model_validate(config), until="gather")
    config["workers"]["max_failed_share"] = 0.2  # one of eight is less
    outcome = run_pipeline(Config.model_validate(config), until="gather")
    assert (outcome.rows, outcome.counts["gather"]["self"]["failed_prompts"]) == (21, 1)
    tables = [pq.read_table(file) for file in tmp_path.glob("out/.grape/runs/*/failures/**/*.parquet")]
    reasons = {row["reason"] for table in tables for row in table.to_pylist()}
    assert reasons == {"RuntimeError: this prompt always fails"}
    logs = [file.read_text() for file in tmp_path.glob("out/.grape/runs/*/logs/SamplingActor-*.log")]
    assert len(logs) == 2
    assert all("started: {" in log and "RuntimeError: this prompt always fails" in log for log in logs)


def test_candidates_are_released_and_are_the_pool_of_another_config(tmp_path: Path, model: str) -> None:
    gathering = config_for(tmp_path, model, release="sums")
    outcome = run_pipeline(Config.model_validate(gathering), until="gather")
    assert outcome.counts["candidates"] == f"{tmp_path}/out/sums@v0001"
    release = grape_service.load(f"{tmp_path}/out/sums@latest")
    assert (release.manifest.kind, release.row_count, verify(release)) == ("candidates", 24, [])
    rows = release.to_table().to_pylist()
    assert sorted(row["response"] for row in rows) == sorted(row["response"] for row in kept_samples(tmp_path))
    assert release.manifest.tokens == sum(len(row["response_ids"]) for row in rows)
    again = run_pipeline(Config.model_validate(gathering), until="gather")
    assert again.counts["candidates"] == outcome.counts["candidates"]

    policy = {"model": model, "engine": "transformers", "dtype": "float32"}
    pool = {"path": f"{tmp_path}/out/sums@latest", "truncated": "keep", "max_reject_share": 1.0}
    other = {
        "name": "theirs",
        "pool": pool,
        "target": policy,
        "behavior": {"column": "behavior_logprobs"},
        "weights": {"method": "pear"},
        "output": {"path": str(tmp_path / "theirs")},
    }
    made = grape_service.run(other)
    assert made.manifest.parents.candidates == {pool["path"]: release.reference}
    (prompts,) = release.manifest.parents.prompts
    assert prompts.path == f"{tmp_path}/pool/a.jsonl"
    for folder, version in (("out", release), ("theirs", made)):
        held = [one.reference for one in holders(f"{tmp_path}/{folder}", Wanted(file="pool/a.jsonl"), {})]
        assert held == [version.reference]
    (of_prompt,) = holders(f"{tmp_path}/out", Wanted(row=rows[0]["prompt_id"]), {})
    assert of_prompt.rows == sum(row["prompt_id"] == rows[0]["prompt_id"] for row in rows)
    assert made.row_count == 8
    for row in made.dataset.to_table().to_pylist():
        pairs = zip(row["target_logprobs"], row["behavior_logprobs"], row["loss_mask"], strict=True)
        assert all(abs(t - b) < 1e-4 for t, b, has_loss in pairs if has_loss)

    with pytest.raises(UserError, match="no training set"):
        load_training_set(release.reference)
    with pytest.raises(UserError, match="is a training set"):
        grape_service.run({**other, "pool": {**pool, "path": f"{tmp_path}/theirs/theirs@v0001"}})
    with pytest.raises(UserError, match="has no tag 'best'"):
        grape_service.run({**other, "pool": {**pool, "path": f"{tmp_path}/out/sums@best"}})
    part = Path(release.path) / release.manifest.files[0].path
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match="is not the file that its manifest names"):
        grape_service.run({**other, "name": "more"})


@pytest.mark.long
def test_a_judge_is_asked_once_and_its_words_are_kept(tmp_path: Path, model: str) -> None:
    judge = {"method": "judge", "model": model, "max_tokens": 4, "answer": "answer"}
    judge["policy"] = {"engine": "transformers", "dtype": "float32"}
    config = config_for(tmp_path, model, verify=judge)
    outcome = run_pipeline(Config.model_validate(config), until="gather")
    counts = outcome.counts["gather"]["self"]
    assert (counts["samples"], counts["right"] + counts["wrong"] + counts["unknown"]) == (24, 24)
    (folder,) = tmp_path.glob("out/.grape/gathered/pools/*-judged-????????????????")
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 24
    assert all(row["judge_text"] is not None and row["verifier"].startswith(f"judge ({model}, ") for row in rows)
    assert {row["verdict"] for row in rows} == {"unknown"}  # a random model says no verdict
    before = sorted(tmp_path.glob("out/.grape/gathered/*/b*/*.parquet"))
    again = run_pipeline(Config.model_validate(config), until="gather")
    assert again.scored == 0
    assert sorted(tmp_path.glob("out/.grape/gathered/*/b*/*.parquet")) == before
    config["gather"]["verify"] = {"method": "regex", "pattern": ""}  # another verifier, without sampling
    other = run_pipeline(Config.model_validate(config), until="gather")
    assert (other.scored, other.counts["gather"]["self"]["right"]) == (0, 24)


@pytest.mark.long
def test_what_a_judge_failed_at_is_asked_again(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = {
        "method": "judge",
        "model": model,
        "max_tokens": 2,
        "policy": {"engine": "transformers", "dtype": "float32"},
    }
    config = config_for(tmp_path, model, verify=judge)
    config["workers"]["max_failed_share"] = 0.5
    monkeypatch.setenv("GRAPE_SAMPLER_CLASS", "tests.drill_samplers:FailsOnText")
    monkeypatch.setenv("GRAPE_DRILL_TEXT", "Request:\n3+3?")
    release = grape_service.run(config)
    assert any("3 candidates could not be judged" in event["event"] for event in release.manifest.statistics["events"])
    monkeypatch.delenv("GRAPE_SAMPLER_CLASS")
    grape_service.run(config)
    (end,) = (
        file for file in tmp_path.glob("out/.grape/runs/*/end.json") if release.manifest.parents.run_id not in str(file)
    )
    events = [event["event"] for event in json.loads(end.read_text())["events"]]
    assert any("judge of self: 3 candidates judged now" in event for event in events)


@pytest.mark.long
def test_weights_are_refused_on_numbers_that_the_audit_finds_wrong(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPE_SAMPLER_CLASS", "tests.drill_samplers:ShiftsNumbers")
    config = config_for(tmp_path, model)
    told = r"log-probabilities of gather\.policies\.self are not the policy's.*score them again"
    with pytest.raises(UserError, match=told):
        run_pipeline(Config.model_validate(config), until="gather")
    config["weights"] = None  # without weights nobody uses them, and the manifest says how far they are off
    config["gather"]["release"] = "sums"
    outcome = run_pipeline(Config.model_validate(config))
    audit = outcome.counts["gather"]["self"]["audit"]
    assert audit["mean"] > audit["tolerance"]

    # Who makes weights of them later is told the same.
    del config["gather"]
    weighed = {**config, "behavior": {"column": "behavior_logprobs"}, "weights": {"method": "pear"}}
    assert outcome.reference is not None
    with pytest.raises(UserError, match=told):
        reweigh(outcome.reference, Config.model_validate(weighed))
    pool = {**config["pool"], "path": f"{tmp_path}/out/sums@latest"}
    plain = run_pipeline(Config.model_validate({**config, "name": "plain", "pool": pool}))
    assert plain.reference is not None
    with pytest.raises(UserError, match=told):
        reweigh(plain.reference, Config.model_validate(weighed))
    with pytest.raises(UserError, match=told):
        run_pipeline(Config.model_validate({**weighed, "name": "theirs", "pool": pool}))
