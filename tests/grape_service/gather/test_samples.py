"""Samples are found by key, made once, and the first file wins; files of candidates are what prepare reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from grape_service.config.gather import GatherConfig, SamplingConfig, VerifyConfig
from grape_service.errors import StageError
from grape_service.gather.samples import SampleStore, sample_key, sampler_id, seed_of, verify_id
from grape_service.storage.storage import Storage


def sample(number: int, **over: Any) -> dict[str, Any]:
    key = sample_key(b"p" * 16, number)
    value = {"sample_key": key, "prompt_id": "p", "number": number, "seed": seed_of("s", key), "finish_reason": "stop"}
    return {**value, "ids": [1, 2], "logprobs": [-0.5, -1.0], "verdict": None, "verdict_reason": None, **over}


def test_samples_are_found_by_key_and_the_first_file_wins(any_storage: Storage) -> None:
    store = SampleStore(any_storage, "sampler")
    store.write("b0", [sample(0), sample(1)], "x/shard-00000.parquet", {"made_by": {"engine": "e"}})
    store.write("b0", [sample(1, ids=[9]), sample(2, verdict="right")], "x/shard-00000.parquet", {"verify_id": "v"})
    keys = [sample_key(b"p" * 16, number) for number in (2, 0, 1, 5, 0)]
    found = store.read("b0", keys)
    assert [one and one["number"] for one in found] == [2, 0, 1, None, 0]
    assert found[2] is not None
    assert found[2]["ids"] == [1, 2]
    assert found[0] is not None
    assert (found[0]["verify_id"], found[0]["verdict"]) == ("v", "right")
    assert store.read("b00", keys[:1]) == found[:1]  # with more partitions a longer prefix reads its parent's files
    assert store.read("b1", keys) == [None] * 5


def test_files_of_other_shards_are_left_alone(tmp_path: Any) -> None:
    storage = Storage(str(tmp_path))
    store = SampleStore(storage, "s")
    store.write("b", [sample(0)], "prepared/b-00001.parquet", {})
    store.write("b", [sample(1)], "prepared/b-00011.parquet", {})
    storage.write("gathered/s/b/0000000000001-b-00011-abc.parquet", b"PAR1 no")
    keys = [sample_key(b"p" * 16, number) for number in range(2)]
    found = store.read("b", keys, shard="elsewhere/b-00001.parquet")
    assert [one and one["number"] for one in found] == [0, None]
    for shard in (None, "prepared/b-00011.parquet"):
        with pytest.raises(StageError, match="is damaged"):
            store.read("b", keys, shard=shard)


def test_a_damaged_file_is_named(tmp_path: Any) -> None:
    storage = Storage(str(tmp_path))
    storage.write("gathered/s/b/0000000000001-shard-abc.parquet", b"PAR1 no")
    with pytest.raises(StageError, match="is damaged"):
        SampleStore(storage, "s").read("b", [sample_key(b"p" * 16, 0)])


def test_keys_and_seeds_follow_from_what_decides_a_sample() -> None:
    keys = {sample_key(prompt, number) for prompt in (b"p" * 16, b"q" * 16) for number in range(50)}
    assert len(keys) == 100
    seeds = {seed_of(sampler, key) for key in keys for sampler in ("a", "b")}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    base = SamplingConfig()
    others = [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 5}, {"max_tokens": 7}, {"stop": ["x"]}, {"seed": 1}]
    ids = {sampler_id("m", SamplingConfig.model_validate(other), [2]) for other in [{}, *others]}
    assert len(ids) == 1 + len(others) == 1 + len(type(base).model_fields)
    assert sampler_id("m", base, [2, 3]) not in ids
    assert sampler_id("m", base, [3, 2, 3]) == sampler_id("m", base, [2, 3])
    verify = VerifyConfig(method="regex", pattern="x")
    assert verify_id(verify, "v1") != verify_id(verify, "v2")
    assert verify_id(verify, "v1") != verify_id(verify.model_copy(update={"seconds": 3.0}), "v1"), (
        "what was not judged in time is asked again with more time"
    )


@pytest.mark.parametrize(
    ("gather", "said"),
    [
        ({"policies": {}}, "at least 1 item"),
        ({"policies": {"../x": {"model": "m"}}}, "is no name"),
        ({"policies": {"x": {"model": "m", "engine_args": {"speculative_config": {}}}}}, "speculative decoding"),
        ({"policies": {"x": {"model": "m", "sampling": {"temprature": 1}}}}, "temprature"),
        ({"policies": {"x": {"model": "m"}}, "stop_after": {"right": 2}}, "needs gather.verify"),
        ({"policies": {"x": {"model": "m"}}, "verify": {"method": "math"}}, "needs verify.answer"),
        ({"policies": {"x": {"model": "m"}}, "verify": {"method": "regex", "pattern": "("}}, "no regular expression"),
        ({"policies": {"x": {"model": "m"}}, "limit": {"cost": 3}}, "gpu_hour_price"),
    ],
)
def test_a_bad_section_is_answered_in_a_sentence(gather: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GatherConfig.model_validate(gather)


def test_behavior_is_what_was_recorded_unless_the_support_was_cut() -> None:
    policies = {"plain": {"model": "m"}, "cut": {"model": "m", "sampling": {"top_p": 0.9}}}
    config = GatherConfig.model_validate({"policies": policies})
    assert config.behavior_of("plain").recorded == "raw"  # type: ignore[union-attr]
    assert config.behavior_of("cut") == config.policy("cut")
    assert np.isclose(config.sampling_of("cut").top_p, 0.9)
