"""select: local from pool to release: each window as a plain forward has it, a killed run, windows that fail."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grape_service
from grape_service.score.store import ScoreStore
from grape_service.storage.storage import Storage
from tests.flows.test_kill_drill import stored_keys
from tests.jobs import Job, tiny_job
from tests.tiny_models import make_model

pytestmark = [pytest.mark.alone, pytest.mark.drill, pytest.mark.timeout(900)]

STEPS = ["We add 12 and 5.", "That is 17,\nor so.", "x", "Then we take 3 off it: 14.", "The answer is 14."]


def pool(num_prompts: int) -> list[dict[str, Any]]:
    """Three candidates a prompt, of one step to five."""
    return [
        {
            "prompt": f"What is {number} and 5 less 3?",
            "response": "\n\n".join([*STEPS[place : place + 1 + (number + 2 * place) % 5], f"So {number}."]),
            "source": f"s{place}",
        }
        for number in range(num_prompts)
        for place in range(3)
    ]


def by_hand(model: str, row: dict[str, Any], num_steps: int) -> float:
    """The paper's number of a release row: float32 forwards of single windows, Python sums."""
    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    ids, first = row["input_ids"], row["loss_mask"].index(True)
    prompt, response = ids[:first], ids[first:-1]  # without the turn end
    text = tokenizer.decode(response)
    ends = [match.end() for match in re.finditer("\n\n", text) if match.end() < len(text)]
    steps: list[list[int]] = [[]]
    written = ""
    for id_ in response:
        if len(steps) <= len(ends) and len(written) >= ends[len(steps) - 1]:
            steps.append([])
        steps[-1].append(id_)
        written += tokenizer.decode([id_])
    means = []
    for place, step in enumerate(steps):
        context = prompt + [id_ for one in steps[max(0, place - num_steps) : place] for id_ in one]
        with torch.no_grad():
            logits = network.float()(torch.tensor([context + step])).logits[0].double().log_softmax(-1)
        own = [float(logits[len(context) - 1 + t, id_]) for t, id_ in enumerate(step)]
        means.append(sum(own) / len(own))
    return sum(means) / len(means)


def released(answer: dict[str, Any]) -> dict[str, dict[str, Any]]:
    rows = grape_service.load(answer["reference"]).dataset.to_table().to_pylist()
    return {row["candidate_id"]: row for row in rows}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("models") / "model")


LOCAL = {"method": "local", "keep": 3}


@pytest.mark.long
def test_windows_are_scored_as_a_plain_forward_has_them(tmp_path: Path, model: str) -> None:
    with tiny_job(tmp_path, model, pool(6), select=LOCAL, checks={"refusal": "off"}) as job:
        first = job.run()
        rows = released(first)
        assert len(rows) == 18
        for row in rows.values():
            assert row["select_score"] == pytest.approx(by_hand(model, row, 1), abs=1e-4)
        assert max(abs(row["select_score"] - row["grape_score"]) for row in rows.values()) > 0.01
        ranked = sorted((row["prompt_id"], -row["select_score"], row["select_rank"]) for row in rows.values())
        assert [rank for _, _, rank in ranked] == [1, 2, 3] * 6

        # Another window scores its own windows, and those that it has in common not again.
        job.config["select"] = {**LOCAL, "window": {"steps": 2}}
        second = job.run()
        assert 0 < second["scored"] < first["scored"] - 18
        for row in released(second).values():
            assert row["select_score"] == pytest.approx(by_hand(model, row, 2), abs=1e-4)
        job.config["select"] = {**LOCAL, "window": {"tokens": 3}, "step_end": r"\n\n|\. "}
        assert job.run()["scored"] > 0

        # With what is stored nothing is scored, whatever else is asked.
        job.config["select"] = {"method": "local", "max_source_share": 0.6}
        again = job.run()
        assert again["scored"] == 0
        best = {row["prompt_id"]: row["candidate_id"] for row in rows.values() if row["select_rank"] == 1}
        chosen = {row["prompt_id"]: name for name, row in released(again).items()}
        assert sum(best[prompt] == name for prompt, name in chosen.items()) >= len(chosen) - 3
        assert len(stored_keys(job)) == len(set(stored_keys(job)))
        told = job.grape("explain", first["reference"], next(iter(best)), "--json")
        assert told.returncode == 0, told.stderr
        found = {one["candidate_id"]: one["score"] for one in orjson.loads(told.stdout)["candidates"]}
        assert found == {name: pytest.approx(rows[name]["select_score"]) for name in found}


@pytest.mark.long
def test_a_killed_run_goes_on_with_its_windows(tmp_path: Path, model: str) -> None:
    settings = {"select": LOCAL, "workers": {"shard_tokens": 300}, "checks": {"refusal": "off"}}
    with tiny_job(tmp_path / "whole", model, pool(8), **settings) as job:
        whole = released(job.run())
        num_scores = len(stored_keys(job))
    with tiny_job(tmp_path / "killed", model, pool(8), **settings) as job:
        job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "0.3"}
        process = job.start("run", str(job.config_path), "--json")
        deadline = time.monotonic() + 240
        while len(stored_keys(job)) < 24 + 8 and process.poll() is None:  # 24 rows, then windows
            assert time.monotonic() < deadline
            time.sleep(0.05)
        job.kill_all()
        process.wait()
        survived = len(stored_keys(job))
        assert 24 < survived < num_scores
        job.environment = {}
        outcome = job.run()
        keys = stored_keys(job)
        assert len(keys) == len(set(keys)) == num_scores
        assert outcome["scored"] == num_scores - survived
        for name, row in released(outcome).items():
            assert row["select_score"] == pytest.approx(whole[name]["select_score"], abs=1e-4)


@pytest.mark.long
def test_a_window_that_fails_leaves_out_its_prompt(tmp_path: Path, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = pool(6)
    rows[4]["response"] = "First.\n\nThen 東.\n\nThen.\n\nLast."
    (bad, *_) = tokenizer("東", add_special_tokens=False)["input_ids"]
    drill = tmp_path / "drill.json"
    settings = {"select": {"method": "local"}, "checks": {"refusal": "off"}, "workers": {"max_failed_share": 0.2}}
    with tiny_job(tmp_path / "job", model, rows, **settings) as job:
        job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:DrillEngine", "DRILL_FILE": str(drill)}
        drill.write_bytes(orjson.dumps({"missing_token": -1}))
        job.config["select"] = {"method": "grape"}
        job.run()  # the rows have scores: what fails now are windows
        job.config["select"] = {"method": "local"}
        drill.write_bytes(orjson.dumps({"missing_token": bad}))
        answer = job.run()
        counts = grape_service.load(answer["reference"]).manifest.counts
        assert answer["prompts"] == 5
        assert counts["select"]["prompts_left_out"] == {"failed candidate": 1}
        assert counts["select"]["failed_candidates"] == counts["score"]["failed"] == answer["failed"] == 1

        # The next run tries them again, and nothing else.
        drill.write_bytes(orjson.dumps({"missing_token": -1}))
        again = job.run()
        assert (again["prompts"], again["failed"]) == (6, 0)
        assert 0 < again["scored"] <= 3
        store = ScoreStore(Storage(str(job.folder / "datasets" / ".grape")), next(p.name for p in policies(job)))
        assert np.isfinite(store.read("b", all_keys(job)).values).all()


def policies(job: Job) -> list[Path]:
    return [path for path in (job.folder / "datasets" / ".grape" / "scores").iterdir() if "-repeat" not in path.name]


def all_keys(job: Job) -> Any:
    import pyarrow as pa

    return pa.array([key for _, key in stored_keys(job)], pa.binary(16))
