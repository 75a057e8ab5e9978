"""Rollouts of trainers: the tokens that were sampled have loss and their own numbers, and nothing is compared with a
number that is another distribution's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from grape_service.config.policy import BehaviorConfig
from grape_service.config.pool import PoolGroup
from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.pool.candidates import Normaliser
from grape_service.pool.outcomes import Accepted, Rejected
from grape_service.pool.rollouts import rollouts
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Rejection, Rendered
from grape_service.weigh.behavior import RECORDED, row_behaviors
from tests import tiny_models
from tests.prepared_pools import make_config
from tests.published_rollouts import PUBLISHED, VERIFIERS_TRACE

ROLLOUTS = [name for name, pool in PUBLISHED.items() if pool.sampling is not None]
PROMPT = [{"role": "user", "content": "2+2?"}]
TEXT = "The answer is 4."
END, PAD = 514, 512


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    folder = tmp_path_factory.mktemp("chatml")
    tiny_models.make_tokenizer(folder, "chatml")
    return Renderer(AutoTokenizer.from_pretrained(str(folder)), RenderConfig())


def read(row: dict[str, Any], **pool: Any) -> list[Accepted]:
    config = make_config("pool.jsonl", pool={"truncated": "keep", **pool})
    found = [one for row_ in rollouts(row, config.pool.groups[0]) for one in Normaliser(config).candidates(row_)]
    assert all(isinstance(one, Accepted) for one in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_rollout_says_what_its_numbers_are(name: str) -> None:
    pool = PUBLISHED[name]
    for row in pool.rows:
        for one in read(row):
            assert one.candidate.sampling == pool.sampling
            ids, logprobs = one.candidate.response_ids, one.candidate.recorded_logprobs
            assert ids
            assert logprobs
            assert len(ids) == len(logprobs)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_numbers_after_an_unknown_temperature_are_no_policys(name: str) -> None:
    def kind(behavior: BehaviorConfig, **pool: Any) -> tuple[int, float]:
        candidate = read(PUBLISHED[name].rows[0], **pool)[0].candidate
        columns = {
            "prompt_id": ["p"],
            "candidate_id": ["c"],
            "source": pa.array([None], pa.string()),
            "sampling": pa.array([orjson.dumps(candidate.sampling).decode()], pa.string()),
            "recorded_logprobs": pa.array([candidate.recorded_logprobs], pa.list_(pa.float32())),
        }
        found = row_behaviors(pa.table(columns), behavior)
        return int(found.policy[0]), float(found.temperature[0])

    plain, raw = BehaviorConfig(column="behavior_logprobs"), BehaviorConfig(column="behavior_logprobs", recorded="raw")
    says = PUBLISHED[name].sampling or {}
    if says == {"temperature": 0.7, "logprobs": "processed"}:
        assert kind(plain) == (RECORDED, 0.7)
    elif "temperature" in says:
        with pytest.raises(UserError, match=r"sampled at temperature 0\.7, and nobody says"):
            kind(plain)
    else:
        with pytest.raises(UserError, match="no row says at which temperature they were sampled"):
            kind(plain)
        assert kind(plain, sampling={"temperature": 1.0}) == (RECORDED, 1.0)
        at_0_7 = {"temperature": 0.7, "logprobs": "processed"}
        assert kind(plain, sampling=at_0_7) == (RECORDED, 0.7)
    assert kind(plain, sampling={"temperature": 0.5, "logprobs": "raw"})[0] == RECORDED
    if says["logprobs"] == "unsaid":
        assert kind(raw) == (RECORDED, 1.0)


def of_trainer(trainer: str, prompt: list[int], words: list[int], values: list[float]) -> dict[str, Any]:
    """A rollout of one response, as each trainer keeps it; `words` end with the turn end."""
    shared = {"prompt": PROMPT, "reward": 1.0}
    if trainer == "verl":
        pad = [PAD] * 2
        return {
            "prompts": [*pad, *prompt],
            "responses": [*words, *pad],
            "response_mask": [1] * len(words) + [0, 0],
            "rollout_log_probs": [*values, 0.0, 0.0],
            "raw_prompt": PROMPT,
        }
    if trainer == "openrlhf":
        return {
            "prompt": "2+2?",
            "observation_tokens": [*prompt, *words],
            "action_ranges": [[len(prompt), len(prompt) + len(words)]],
            "rollout_log_probs": [0.0] * len(prompt) + values,
            "truncated": False,
        }
    if trainer == "skyrl":
        lists = {"prompt_token_ids": prompt, "response_ids": words, "loss_masks": [1] * len(words)}
        return {"prompt": PROMPT, **lists, "rollout_logprobs": values, "stop_reasons": "stop", "rewards": 1.0}
    if trainer == "slime":
        numbers = {"tokens": [*prompt, *words], "response_length": len(words), "rollout_log_probs": values}
        return {**shared, **numbers, "response": TEXT, "loss_mask": [1] * len(words), "status": "completed"}
    if trainer == "trl":
        ids = {"input_ids": [*prompt, *words], "completion_mask": [0] * len(prompt) + [1] * len(words)}
        said = {"completion": [{"role": "assistant", "content": TEXT}]}
        return {**shared, **said, **ids, "old_log_probs": [0.0] * len(prompt) + values}
    nodes = [
        {
            "parent": None,
            "message": PROMPT[0],
            "sampled": False,
            "token_ids": prompt[:-3],
            "mask": [False] * len(prompt[:-3]),
        },
        {
            "parent": 0,
            "message": {"role": "assistant", "content": TEXT},
            "sampled": True,
            "token_ids": [*prompt[-3:], *words],
            "mask": [False] * 3 + [True] * len(words),
            "logprobs": values,
        },
    ]
    call = {"node": 1, "model": "m", "sampling": {"temperature": 1.0}, "finish_reason": "stop"}
    return {**VERIFIERS_TRACE, "nodes": nodes, "calls": [call], "tools": []}


@pytest.mark.parametrize("trainer", ["verifiers", "verl", "openrlhf", "skyrl", "slime", "trl"])
def test_the_sampled_tokens_are_trained_on_with_their_own_numbers(renderer: Renderer, trainer: str) -> None:
    prompt = list(renderer.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=False))
    words = [*renderer.tokenizer.encode(TEXT, add_special_tokens=False), END]
    values = [-(1.0 + place) / 8 for place in range(len(words))]
    [one] = read(of_trainer(trainer, prompt, words, values))
    [found] = renderer.render([one.candidate])
    assert isinstance(found, Rendered), found
    assert found.input_ids.tolist() == [*prompt, *words]
    assert found.input_ids[found.loss_mask > 0].tolist() == words
    assert found.recorded_logprobs is not None
    np.testing.assert_array_equal(found.recorded_logprobs, np.float32(values))
    assert one.candidate.response in (TEXT, [{"role": "assistant", "content": TEXT}])


def test_two_responses_of_ids_alone_are_two_candidates() -> None:
    rows = [copy.deepcopy(PUBLISHED["skyrl"].rows[0]) for _ in range(2)]
    rows[1]["response_ids"] = [7, 9, 2]
    one, other = (read(row)[0].candidate.candidate_id for row in rows)
    assert one != other


def test_turns_of_an_agent_are_masked_between() -> None:
    [one] = read(PUBLISHED["verifiers"].rows[0])
    assert one.candidate.response_ids == [9, 10, 2, 11, 12, 8, 13, 2]
    assert one.candidate.response_mask == [1, 1, 1, 0, 0, 0, 1, 1]
    assert one.candidate.recorded_logprobs == [-0.25, -0.5, -0.125, 0.0, 0.0, 0.0, -1.0, -0.0625]


STEP = PUBLISHED["verifiers-steps"].rows[0]["trajectory"][0]


def steps(*prompts: list[int]) -> dict[str, Any]:
    given = [{**STEP, "tokens": {**STEP["tokens"], "prompt_ids": ids}} for ids in prompts]
    return {**PUBLISHED["verifiers-steps"].rows[0], "trajectory": given}


def test_steps_that_continue_one_another_are_one_response() -> None:
    [one] = read(steps([5, 6], [5, 6, 7, 2, 9]))
    assert one.candidate.response_ids == [7, 2, 9, 7, 2]
    assert one.candidate.response_mask == [1, 1, 0, 1, 1]
    assert one.candidate.recorded_logprobs == [-0.5, -0.25, 0.0, -0.5, -0.25]


def changed(name: str, **over: Any) -> dict[str, Any]:
    return {**PUBLISHED[name].rows[0], **over}


BRANCHED = [*VERIFIERS_TRACE["nodes"][:3], {**VERIFIERS_TRACE["nodes"][3], "parent": 0}]  # type: ignore[index]
UNUSABLE = {
    "branches": (changed("prime-rl", nodes=BRANCHED), "several branches"),
    "steps of other prompts": (steps([5, 6], [5, 9]), "several branches"),
    "nothing sampled": (changed("prime-rl", nodes=VERIFIERS_TRACE["nodes"][:1]), "without sampled tokens"),  # type: ignore[index]
    "aborted": (changed("slime", status="aborted"), "unfinished"),
    "too long": (changed("slime", response_length=9), "do not fit"),
    "no ranges": (changed("openrlhf-rollout", action_ranges=[]), "without sampled tokens"),
    "no mask": (changed("trl-async", completion_mask=[0] * 5), "without sampled tokens"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_rollout_that_cannot_be_read_is_a_reject(name: str) -> None:
    row, reason = UNUSABLE[name]
    [found] = rollouts(row, PoolGroup(path="p"))
    assert isinstance(found, Rejection)
    assert reason in found.reason


def test_two_temperatures_in_one_response_are_a_reject() -> None:
    calls = [dict(call) for call in VERIFIERS_TRACE["calls"]]  # type: ignore[attr-defined]
    calls[1]["sampling"] = {"temperature": 1.0}
    [found] = rollouts({**VERIFIERS_TRACE, "calls": calls}, PoolGroup(path="p"))
    assert isinstance(found, Rejection)
    assert "several temperatures" in (found.detail or "")


def test_an_empty_response_is_one_where_no_trainer_keeps_ids_alone() -> None:
    config = make_config("pool.jsonl")
    [found] = Normaliser(config).candidates({"prompt": "a", "response": "", "response_ids": [5, 6]})
    assert isinstance(found, Rejected)
    assert found.rejection.reason == "empty response"


def test_columns_of_the_config_go_first() -> None:
    row = PUBLISHED["trl-rollout"].rows[0]
    assert list(rollouts(row, PoolGroup(path="p", columns={"response_ids": "completion_ids"}))) == [row]
    assert list(rollouts(row, PoolGroup(path="p", shape="response"))) == [row]
    [found] = rollouts(PUBLISHED["verl-rollout"].rows[0], PoolGroup(path="p", columns={"source": "data_source"}))
    assert isinstance(found, dict)
    assert (found["recorded_by"], found["data_source"]) == ("verl", "sums")


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling.logprobs is raw or processed"):
        PoolGroup(path="p", sampling={"logprobs": 1.0})
    with pytest.raises(ValueError, match=r"sampling.temperature is a number"):
        PoolGroup(path="p", sampling={"temperature": "raw"})
