"""What the gather section refuses before anything is sampled."""

from __future__ import annotations

from typing import Any

import pytest

from grape_service.config.gather import GatherConfig
from grape_service.config.schema import Config

pytestmark = pytest.mark.quick


def gather(**values: Any) -> GatherConfig:
    return GatherConfig.model_validate({"policies": {"a": {"model": "m"}}, **values})


@pytest.mark.parametrize("key", ["speculative_config", "num_speculative_tokens", "speculative_model"])
def test_speculative_decoding_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="speculative decoding changes recorded log-probabilities"):
        gather(policies={"a": {"model": "m", "engine_args": {key: 1}}})


def test_what_cannot_be_stopped_or_paid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stop_after\.right needs gather\.verify"):
        gather(stop_after={"right": 1})
    with pytest.raises(ValueError, match=r"cost needs gather\.limit\.gpu_hour_price"):
        gather(limit={"cost": 1})


def test_candidates_have_a_name_of_their_own() -> None:
    policy = {"policies": {"a": {"model": "m"}}, "release": "sums"}
    base = {"pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": "o"}, "gather": policy}
    with pytest.raises(ValueError, match="as the training set is"):
        Config.model_validate({"name": "sums", **base})
    Config.model_validate({"name": "sft", **base})
    with pytest.raises(ValueError, match="release"):
        gather(release="Not A Name")


def test_numbers_of_a_cut_distribution_are_scored_again() -> None:
    for sampling in ({"top_p": 0.9}, {"top_k": 5}, {"temperature": 0}):
        assert gather(sampling=sampling).behavior_of("a") == gather().policy("a")
    assert gather(sampling={"temperature": 0.7}).behavior_of("a") == gather().behavior_of("a")
