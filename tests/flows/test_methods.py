"""Every method over one workspace, as a user runs them: twelve rows, the papers' formulas by a plain script."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from transformers import AutoTokenizer

import grape_service
from grape_service.rows.columns import release_schema
from tests.jobs import ROOT, Job, pool_rows, tiny_job
from tests.tiny_models import make_model

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(600)]
EXAMPLE = ROOT / "examples" / "own_method"


def plain(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the plain script says of release rows."""
    lines = []
    tokenizer = AutoTokenizer.from_pretrained(model)
    for row in rows:
        counted = list(row["loss_mask"])
        counted[max(place for place, has_loss in enumerate(counted) if has_loss)] = False  # the turn end
        begin, starts = counted.index(True), [False] * len(counted)
        for place in range(begin, begin + sum(counted)):
            starts[place] = place == begin or tokenizer.decode(row["input_ids"][begin:place]).endswith(".")
        row = {"input_ids": row["input_ids"], "loss_mask": row["loss_mask"], "counted": counted, "starts": starts}
        lines.append(json.dumps(row))
    script = [sys.executable, str(ROOT / "tests" / "plain_formulas.py"), model]
    done = subprocess.run(script, input="\n".join(lines), capture_output=True, text=True, timeout=200, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def release(job: Job, answer: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
    """Rows of a run's version, and its manifest."""
    opened = grape_service.load(answer["reference"])
    return opened.dataset.to_table().to_pylist(), opened.manifest


def run(job: Job, **config: Any) -> dict[str, Any]:
    job.config = {**job.config, **config}
    return job.run()


def test_every_method_from_one_workspace(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    rows = pool_rows(4, candidates=3)
    with tiny_job(tmp_path / "job", model, rows, checks={"refusal": "off"}) as job:
        job.environment = {"PYTHONPATH": f"{ROOT}:{EXAMPLE}"}
        every = {"statistics": ["entropy", "rank", "top20_entropy"]}
        first = run(job, score=every, weights={"method": "probability"}, select={"method": "rsr", "keep": 3})
        assert (first["rows"], first["scored"]) == (12, 12)
        kept, manifest = release(job, first)
        expected = plain(model, kept)
        for row, numbers in zip(kept, expected, strict=True):
            mask = np.array(row["loss_mask"])
            for name in ("logprob", "entropy", "top20_entropy"):
                column = row["target_logprobs" if name == "logprob" else f"target_{name}"]
                assert np.array(column)[mask] == pytest.approx(np.array(numbers[name]), abs=1e-4)
                assert not np.array(column)[~mask].any()
            assert np.array(row["target_rank"])[mask].tolist() == numbers["rank"]
            assert np.array(row["loss_weights"])[mask] == pytest.approx(np.array(numbers["probability"]), rel=1e-4)
            assert row["weight_source"] == "probability"
            assert row["select_score"] == pytest.approx(numbers["rsr"], rel=1e-4)
            assert row["grape_score"] == pytest.approx(numbers["grape"], abs=1e-4)
        ranked = {(row["prompt_id"], row["select_rank"]): row for row in kept}
        for (prompt, rank), row in ranked.items():
            if rank < 3:
                lead = ranked[prompt, rank + 1]["select_score"] - row["select_score"]
                assert row["select_margin"] == pytest.approx(lead, abs=1e-12)
                assert lead >= 0
        assert set(manifest.statistics["report"]["select"]["agree"]) >= {"mean", "surprise", "steps"}
        best = {}
        for method, sign in (("grape", -1), ("rsr", 1), ("surprise", -1), ("steps", -1)):
            scored = sorted(
                (sign * numbers[method], row["candidate_id"], row["prompt_id"])
                for row, numbers in zip(kept, expected, strict=True)
            )
            best[method] = {prompt: candidate for _, candidate, prompt in reversed(scored)}

        auto = {"statistics": "auto"}
        references = [first["reference"]]
        for select, weights in (("surprise", "entropy"), ("steps", None), ("grape", None)):
            keys = {"method": select, **({"step_end": r"\."} if select == "steps" else {})}
            answer = run(job, score=auto, select=keys, weights=weights and {"method": weights})
            assert answer["scored"] == 0
            chosen, _ = release(job, answer)
            assert {row["prompt_id"]: row["candidate_id"] for row in chosen} == best[select]
            if weights == "entropy":
                for row, numbers in zip(chosen, plain(model, chosen), strict=True):
                    made = np.array(row["loss_weights"])[np.array(row["loss_mask"])]
                    assert made == pytest.approx(np.array(numbers["entropy_weights"]), rel=1e-3)
            if select == "steps":
                for row, numbers in zip(chosen, plain(model, chosen), strict=True):
                    assert row["select_score"] == pytest.approx(numbers["steps"], abs=1e-4)
                    assert row["select_score"] != pytest.approx(row["grape_score"], abs=1e-3)
                told = job.grape("explain", answer["reference"], chosen[0]["prompt_id"], "--json")
                assert told.returncode == 0, told.stderr
                (winner,) = [one for one in orjson.loads(told.stdout)["candidates"] if one["kept"]]
                assert (winner["rank"], winner["score"]) == (1, pytest.approx(chosen[0]["select_score"]))
            references.append(answer["reference"])
        grape = grape_service.load(references[-1])
        assert "select_score" not in grape.schema.names
        assert [name for name in grape.schema.names if name.startswith("target_")] == ["target_logprobs"]
        assert set(release_schema([], []).names) <= set(grape.schema.names)

        own = {"method": "own_method:first_guesses"}
        answer = run(job, select=own, weights={"method": "own_method:surprising_places", "normalize": "dataset"})
        assert answer["scored"] == 0
        chosen, manifest = release(job, answer)
        for row, numbers in zip(chosen, plain(model, chosen), strict=True):
            share = np.mean(np.array(numbers["rank"][:-1]) == 1)
            assert row["select_score"] == pytest.approx(share + row["correct"])
        tokens = np.concatenate([np.array(row["loss_weights"])[np.array(row["loss_mask"])] for row in chosen])
        assert tokens.mean() == pytest.approx(1.0, abs=1e-5)
        digest = hashlib.sha256((EXAMPLE / "own_method.py").read_bytes()).hexdigest()
        assert [(m["kind"], m["function"], m["source_digest"]) for m in manifest.parents.methods] == [
            ("select", "own_method:first_guesses", digest),
            ("weights", "own_method:surprising_places", digest),
        ]

        compared = job.grape("compare", first["reference"], answer["reference"], "--json")
        assert compared.returncode == 0, compared.stderr
        assert orjson.loads(compared.stdout)["ranking"]["score_difference"] is None
        told = job.grape("explain", first["reference"], kept[0]["prompt_id"], "--json")
        assert told.returncode == 0, told.stderr
        candidates = orjson.loads(told.stdout)["candidates"]
        assert [c["rank"] for c in candidates] == [1, 2, 3]
        assert [c["score"] for c in candidates] == sorted(c["score"] for c in candidates)
        assert all(c["kept"] for c in candidates)

        again = job.grape(
            "weigh",
            references[-1],
            "--config",
            str(job.config_path),
            "--json",
            "--set",
            "weights.method=entropy",
            "--set",
            "weights.normalize=none",
        )
        assert again.returncode == 0, again.stderr
        assert orjson.loads(again.stdout)["scored"] == 0

        (tmp_path / "job" / "broken.py").write_text("def score(batch):\n    return [float('nan')] * len(batch)\n")
        job.environment["PYTHONPATH"] += f":{tmp_path / 'job'}"
        job.config["select"] = {"method": "broken:score"}
        refused = job.grape("run", str(job.config_path))
        assert refused.returncode == 2, refused.stderr
        assert "select.method broken:score gave nan for candidate" in refused.stderr
        assert "of prompt" in refused.stderr
