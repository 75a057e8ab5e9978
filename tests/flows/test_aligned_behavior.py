"""behavior.align: bytes from pool to release: PEAR against a policy with another tokenizer, by a plain script."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grape_service
from tests.jobs import pool_rows, tiny_job
from tests.tiny_models import make_model

pytestmark = [pytest.mark.long, pytest.mark.alone, pytest.mark.timeout(600)]

GAMMA, LOW, HIGH = 0.999, -0.08, 0.3


def scores(model: str, context: str, response: str, end: str) -> tuple[list[bytes], list[float]]:
    """The bytes of each token of a response, and log p of each, its turn end last: a float32 forward."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    prompt = tokenizer(context, add_special_tokens=False)["input_ids"]
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    ended = [*ids, tokenizer.convert_tokens_to_ids(end)]
    with torch.no_grad():
        logits = network(torch.tensor([prompt + ended])).logits[0].double().log_softmax(-1)
    pieces = tokenizer.backend_tokenizer.decode_batch([[id_] for id_ in ids])
    return [piece.encode() for piece in pieces], [
        float(logits[len(prompt) - 1 + place, id_]) for place, id_ in enumerate(ended)
    ]


def deltas(target: tuple[list[bytes], list[float]], own: tuple[list[bytes], list[float]]) -> tuple[list[float], float]:
    """delta of each of the target's tokens, and its share of tokens that stand one with one; turn ends are the same."""

    def ends(pieces: list[bytes]) -> list[int]:
        return [sum(map(len, pieces[: place + 1])) for place in range(len(pieces))]

    ours, theirs = ends(target[0]), ends(own[0])
    found, before, single = [], 0, 1
    for cut in sorted(set(ours) & set(theirs)):
        one = [value for value, end in zip(target[1], ours, strict=False) if before < end <= cut]
        other = [value for value, end in zip(own[1], theirs, strict=False) if before < end <= cut]
        found += [(math.fsum(one) - math.fsum(other)) / len(one)] * len(one)
        single += len(one) == len(other) == 1
        before = cut
    return [*found, target[1][-1] - own[1][-1]], single / (len(ours) + 1)


def test_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    target, teacher = make_model(tmp_path / "target", vocab=320), make_model(tmp_path / "teacher", vocab=480, seed=1)
    rows = pool_rows(6, candidates=2)
    behavior = {"model": teacher, "dtype": "float32", "engine": "transformers", "align": "bytes"}
    settings: dict[str, Any] = {"weights": {"method": "pear"}, "checks": {"refusal": "off"}}
    with tiny_job(tmp_path / "job", target, rows, behavior={**behavior, "min_coverage": 0.0}, **settings) as job:
        answer = job.run()
        opened = grape_service.load(answer["reference"])
        released = opened.dataset.to_table().to_pylist()
        assert len(released) == 6
        coverages, spans = [], 0
        for row in released:
            prompt, response = (message["content"] for message in row["messages"])
            context = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            ours, theirs = (scores(model, context, response, "<|im_end|>") for model in (target, teacher))
            expected, coverage = deltas(ours, theirs)
            coverages.append((coverage, len(expected)))
            spans += len(expected)
            mask = np.array(row["loss_mask"])
            ratios = (np.array(row["target_logprobs"]) - np.array(row["behavior_logprobs"]))[mask]
            assert ratios == pytest.approx(expected, abs=1e-4)
            clipped = [min(max(value, LOW), HIGH) for value in expected]
            last = len(clipped) - 1
            logs = [(last - t) * math.log(GAMMA) + math.fsum(clipped[t + 1 :]) for t in range(len(clipped))]
            weights = [math.exp(min(max(value, -10.0), 5.0)) for value in logs]
            assert np.array(row["loss_weights"])[mask] == pytest.approx(weights, rel=1e-3)
        aligned = opened.manifest.counts["weigh"]["aligned"].values()
        assert sum(one["tokens"] for one in aligned) == spans
        single = sum(one["single"] for one in aligned)
        assert single == round(sum(share * tokens for share, tokens in coverages))
        assert 0 < single < spans
        assert "compared one with one" in (Path(answer["report"]).read_text())

        # Weighed again from the release the weights are the same, bit for bit, and nothing is scored.
        again = job.grape("weigh", answer["reference"], "--config", str(job.config_path), "--json", "--force")
        assert again.returncode == 0, again.stderr
        told = orjson.loads(again.stdout)
        assert told["scored"] == 0
        columns = ["prompt_id", "loss_weights", "behavior_logprobs"]
        second = grape_service.load(told["reference"]).dataset.to_table(columns=columns)
        assert second.equals(opened.dataset.to_table(columns=columns))

        # Below the coverage that is asked for rows have no behavior.
        job.config["behavior"] = {**behavior, "min_coverage": 0.99, "missing": "uniform"}
        alone = job.run()
        assert alone["scored"] == 0
        manifest = grape_service.load(alone["reference"]).manifest
        assert manifest.counts["weigh"]["uniform_rows"] == 6
        checked = job.grape("check", str(job.config_path), "--json")
        assert "compared one with one, and behavior.min_coverage is 0.99" in checked.stdout
