"""The audit finds numbers that are another distribution's, and passes those that are the policy's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.gather.audit import LEAST_AUDITED, drift_of, is_audited, refuse_drifted
from grape_service.rows.ragged import TokenBatch, offsets_from_lengths
from tests import tiny_models
from tests.workers.engines import sampler_checks as checks
from workers.engines.transformers.engine import TransformersEngine
from workers.engines.transformers.sampler import TransformersSampler


def test_drift_is_that_of_a_plain_loop() -> None:
    random = np.random.default_rng(0)
    rows = [random.normal(size=(length, 2)) for length in (3, 1, 7)]
    recorded, scored = np.concatenate(rows).T
    found = drift_of(recorded, scored, offsets_from_lengths([3, 1, 7]), "float32")
    differences = [abs(a - b) for row in rows for a, b in row]
    means = [abs(sum(a - b for a, b in row) / len(row)) for row in rows]
    assert (found.samples, found.tokens) == (3, 11)
    assert found.mean == pytest.approx(sum(differences) / 11)
    assert found.largest == pytest.approx(max(differences))
    assert found.sequence_mean == pytest.approx(sum(means) / 3)
    assert found.sequence_largest == pytest.approx(max(means))
    assert found.is_too_large
    assert drift_of(np.zeros(0), np.zeros(0), np.zeros(1, np.int64), "float32").is_too_large is False
    assert drift_of(np.array([np.nan]), np.array([-1.0]), np.array([0, 1]), "float32").is_too_large


def test_numbers_that_an_audit_found_wrong_make_no_weights_in_a_later_run_either() -> None:
    wrong = drift_of(np.array([-3.0]), np.array([-1.0]), np.array([0, 1]), "float32")
    counts = {"gather": {"fine": {"samples": 1}, "x": {"samples": 1, "audit": wrong.to_json()}}}
    base = {"name": "n", "pool": {"path": "p"}, "output": {"path": "o"}, "target": {"model": "m"}}
    recorded, scored = {"column": "behavior_logprobs"}, {"sources": {"x": {"model": "m"}}}

    def config(**over: Any) -> Config:
        return Config.model_validate({**base, **over})

    refuse_drifted(config(), counts)
    refuse_drifted(config(behavior=recorded), counts)
    refuse_drifted(config(behavior=scored, weights={"method": "pear"}), counts)
    refuse_drifted(
        config(behavior=recorded, weights={"method": "pear"}), {"gather": {"fine": counts["gather"]["fine"]}}
    )
    for behavior in (recorded, {"sources": {"x": recorded}}):
        with pytest.raises(UserError, match=r"log-probabilities of gather\.policies\.x are not the policy's"):
            refuse_drifted(config(behavior=behavior, weights={"method": "pear"}), counts)


def test_about_one_in_a_hundred_is_audited_and_never_fewer_than_there_are() -> None:
    keys = [np.random.default_rng(n).bytes(16) for n in range(20_000)]
    assert all(is_audited(key, LEAST_AUDITED) for key in keys[:LEAST_AUDITED])
    assert 150 < sum(is_audited(key, len(keys)) for key in keys) < 250


def test_numbers_of_another_distribution_are_found(tmp_path: Path) -> None:
    folder, other = tiny_models.make_model(tmp_path / "a"), tiny_models.make_model(tmp_path / "b", seed=7)
    policy = PolicyConfig(model=folder, dtype="float32")
    sampler = TransformersSampler(policy, folder)
    asked = checks.requests(each=8)
    made = sampler.sample(asked, checks.settings(temperature=0.7))
    rows = [
        (
            [*request.prompt_ids.tolist(), *sample.ids.tolist()],
            [False] * len(request.prompt_ids) + [True] * len(sample.ids),
        )
        for request, sample in zip(asked, made, strict=True)
    ]
    batch = TokenBatch.from_rows(rows)
    offsets = offsets_from_lengths([len(sample.ids) for sample in made])
    recorded = np.concatenate([sample.logprobs for sample in made])
    engine = TransformersEngine(policy, folder)
    scored = engine.score(batch)
    assert not drift_of(recorded, scored, offsets, "float32").is_too_large
    processed = engine.score(batch, temperature=0.7)  # taken after the temperature, where raw was said
    warmer = engine.score(batch, temperature=1.3)  # of another temperature than the one that is told
    shifted = np.concatenate([np.roll(sample.logprobs, 1) for sample in made])
    foreign = TransformersEngine(PolicyConfig(model=other, dtype="float32"), other).score(batch)  # another model
    for wrong in (processed, warmer, shifted, foreign):
        assert drift_of(wrong, scored, offsets, "float32").is_too_large
        assert drift_of(wrong, scored, offsets, "bfloat16").is_too_large


def make_adapter(base: str, folder: Path, seed: int) -> str:
    """A LoRA whose B matrices are random too, so that it changes the model a lot."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    )
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return str(folder)


def test_numbers_of_another_adapter_are_found(tmp_path: Path) -> None:
    folder = tiny_models.make_model(tmp_path / "model")
    adapters = [make_adapter(folder, tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    policies = [PolicyConfig(model=folder, adapter=adapter, dtype="float32") for adapter in adapters]
    asked = checks.requests(each=8)
    made = TransformersSampler(policies[0], folder).sample(asked, checks.settings())
    rows = [
        ([*one.prompt_ids.tolist(), *sample.ids.tolist()], [False] * len(one.prompt_ids) + [True] * len(sample.ids))
        for one, sample in zip(asked, made, strict=True)
    ]
    batch = TokenBatch.from_rows(rows)
    offsets = offsets_from_lengths([len(sample.ids) for sample in made])
    recorded = np.concatenate([sample.logprobs for sample in made])
    own, other = (TransformersEngine(policy, folder).score(batch) for policy in policies)
    assert not drift_of(recorded, own, offsets, "float32").is_too_large
    assert drift_of(recorded, other, offsets, "float32").is_too_large
    assert drift_of(recorded, other, offsets, "bfloat16").is_too_large
