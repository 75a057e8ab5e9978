"""The vLLM sampler, held to the same as the embedded one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from grape_service.config.policy import PolicyConfig
from tests.workers.engines import sampler_checks as checks
from tests.workers.engines.vllm.reference import tiny_model
from workers.engines.vllm.sampler import VllmSampler

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sampler(folder: str) -> Iterator[VllmSampler]:
    sampler = VllmSampler(PolicyConfig(model=folder, dtype="float32"), folder)
    yield sampler
    sampler.close()


def test_vllm_samples_the_model(sampler: VllmSampler, folder: str) -> None:
    model = checks.PlainModel(folder)
    for over in ({}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.0}):
        checks.check_logprobs(sampler, model, checks.settings(**over))
    for temperature in (1.0, 0.7):
        checks.check_distribution(sampler, model, checks.settings(temperature=temperature, max_tokens=1))
    checks.check_seeds(sampler)
    checks.check_stop_texts(sampler, AutoTokenizer.from_pretrained(folder))


def test_a_long_response_is_seen_to_go_on(sampler: VllmSampler) -> None:
    """Responses are told of once, when they end; what says before that the engine is at work are its steps."""
    before = sampler.stats()
    samples = sampler.sample(checks.requests(), checks.settings())
    after = sampler.stats()
    assert after["sampled_tokens"] - before["sampled_tokens"] == sum(len(sample.ids) for sample in samples)
    assert after["steps"] - before["steps"] >= max(len(sample.ids) for sample in samples) > 1


def test_two_callers_share_the_engine(sampler: VllmSampler) -> None:
    alone = sampler.sample(checks.requests(), checks.settings())
    found: list[list[bytes]] = []

    def ask() -> None:
        found.append([sample.ids.tobytes() for sample in sampler.sample(checks.requests(), checks.settings())])

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [[sample.ids.tobytes() for sample in alone]] * 2


def test_a_step_that_fails_leaves_nobody_waiting(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = VllmSampler(PolicyConfig(model=folder, dtype="float32"), folder)
    taken = sampler._take

    def other_tokens(output: Any) -> None:
        output.outputs[0].token_ids[0] += 1
        taken(output)

    monkeypatch.setattr(sampler, "_take", other_tokens)
    with pytest.raises(RuntimeError, match="other tokens than it sampled"):
        sampler.sample(checks.requests()[:1], checks.settings())
    with pytest.raises(RuntimeError, match="the vLLM engine stopped: vLLM gave log-probabilities of other"):
        sampler.sample(checks.requests(), checks.settings())
    assert not sampler.is_usable
    sampler.close()
    sampler.close()
