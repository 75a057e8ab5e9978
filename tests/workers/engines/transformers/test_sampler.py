"""The embedded sampler: the model's distribution, its log-probabilities, and samples that follow from their seeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from tests import tiny_models
from tests.workers.engines import sampler_checks as checks
from workers.engines.sampler import SampleRequest
from workers.engines.transformers.sampler import TransformersSampler, drawn, probabilities


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny_models.make_model(tmp_path_factory.mktemp("model"))
    # What a model's files say of sampling is no part of its distribution.
    GenerationConfig(repetition_penalty=1.5, temperature=0.3, do_sample=True, top_k=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sampler(folder: str) -> Iterator[TransformersSampler]:
    sampler = TransformersSampler(PolicyConfig(model=folder, dtype="float32"), folder)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def model(folder: str) -> checks.PlainModel:
    return checks.PlainModel(folder)


@pytest.mark.parametrize("over", [{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}, {"temperature": 0.0}])
def test_recorded_numbers_are_the_models(
    sampler: TransformersSampler, model: checks.PlainModel, over: dict[str, float]
) -> None:
    checks.check_logprobs(sampler, model, checks.settings(**over))


def test_a_sample_follows_from_its_seed(sampler: TransformersSampler) -> None:
    checks.check_seeds(sampler)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_have_the_models_frequencies(
    sampler: TransformersSampler, model: checks.PlainModel, temperature: float
) -> None:
    checks.check_distribution(sampler, model, checks.settings(temperature=temperature, max_tokens=1))


def test_stop_texts(sampler: TransformersSampler, folder: str) -> None:
    checks.check_stop_texts(sampler, AutoTokenizer.from_pretrained(folder))


def test_a_prompt_without_room_is_refused(sampler: TransformersSampler) -> None:
    with pytest.raises(UserError, match="a prompt of 512 tokens leaves no room"):
        sampler.sample([SampleRequest(np.zeros(512, np.int32), 0)], checks.settings())


def test_cuts_leave_the_most_probable_tokens() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    assert probabilities(logits, checks.settings(top_k=2)).round(decimals=6).tolist() == [[0.625, 0.375, 0, 0]]
    assert probabilities(logits, checks.settings(top_p=0.6)).round(decimals=6).tolist() == [[0.625, 0.375, 0, 0]]
    assert drawn(torch.tensor([[0.0, 0.25, 0.75, 0.0]] * 3).double(), torch.tensor([0.0, 0.25, 0.999])).tolist() == [
        1,
        2,
        2,
    ]


def check_alone(sampler: TransformersSampler, *lengths: int) -> None:
    """Each prompt gets the response beside others that it gets alone."""
    random = np.random.default_rng(3)
    asked = [SampleRequest(random.integers(0, 512, size=n).astype(np.int32), n) for n in lengths]
    how = checks.settings(max_tokens=40, stop_ids=())
    for request, sample in zip(asked, sampler.sample(asked, how), strict=True):
        alone = sampler.sample([request], how)[0]
        assert (len(sample.ids), sample.finish_reason) == (min(40, 512 - len(request.prompt_ids)), "length")
        assert sample.ids.tolist() == alone.ids.tolist()
        np.testing.assert_allclose(sample.logprobs, alone.logprobs, atol=1e-4)


def test_a_long_prompt_takes_no_room_from_others(sampler: TransformersSampler) -> None:
    check_alone(sampler, 5, 500, 490, 472, 473, 500)


def test_rotary_frequencies_are_each_prompt_s_own(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    folder = tiny_models.make_model(tmp_path, rope_parameters=rope)
    sampler = TransformersSampler(PolicyConfig(model=folder, dtype="float32"), folder)
    check_alone(sampler, 5, 20, 30, 50, 70, 90)
    sampler.close()


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"quantization": "fp8"}, "quantization: fp8 needs engine: vllm"),
        ({"tensor_parallel": 2}, "tensor_parallel needs engine: vllm"),
        ({"engine": "transformers", "engine_args": {"load_in_4bit": True}}, "engine_args has no 'load_in_4bit'"),
    ],
)
def test_what_it_cannot_do_is_refused(folder: str, over: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TransformersSampler(PolicyConfig.model_validate({"model": folder, **over}), folder)
