"""The quickstart's pool is what its README says: real, complete, marked rightly and truly sampled."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from check_answer import is_right
from sample_pool import SAMPLERS, as_messages

from grape_service.config.loading import load_config
from grape_service.config.policy import PolicyConfig, RecordedBehavior
from grape_service.pool.candidates import Normaliser
from grape_service.pool.outcomes import Accepted, Rejected
from grape_service.render.loading import load_renderer
from grape_service.rows.candidate import Rejection, Rendered
from tests.smollm2 import smollm2_folder

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
WRITTEN = {"textbook", "terse", "chatty", "forum"}
SAMPLED = {"smollm2-tutor", "smollm2-brief"}


def read_rows() -> list[dict[str, Any]]:
    """Every candidate of the pool, one per row."""
    rows: list[dict[str, Any]] = []
    for path in sorted((QUICKSTART / "pool").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            candidates = row.pop("responses", [{}])
            rows.extend({**row, **candidate} for candidate in candidates)
    return rows


ROWS = read_rows()
QUESTIONS = {question["prompt_id"]: question for question in json.loads((QUICKSTART / "questions.json").read_text())}
RECORDED = [row for row in ROWS if row["source"] == "smollm2-tutor"]


def test_enough_questions_candidates_and_sources() -> None:
    sources_of: dict[str, list[str]] = defaultdict(list)
    for row in ROWS:
        sources_of[row["prompt_id"]].append(row["source"])
    assert len(sources_of) >= 28
    for sources in sources_of.values():
        assert sorted(sources) == sorted(WRITTEN | SAMPLED)
    topics = Counter(question["topic"] for question in QUESTIONS.values())
    assert set(topics) == {"arithmetic", "facts", "reasoning", "code"}
    assert min(topics.values()) >= 4
    assert sum(path.stat().st_size for path in (QUICKSTART / "pool").iterdir()) < 400_000


def test_rows_agree_with_the_questions() -> None:
    for row in ROWS:
        question = QUESTIONS[row["prompt_id"]]
        assert {key: row[key] for key in ("prompt", "topic", "difficulty")} == {
            key: question[key] for key in ("prompt", "topic", "difficulty")
        }
        assert row["response"].strip()
        assert row["correct"] in (True, False)
    assert len({(row["prompt_id"], row["response"]) for row in ROWS}) == len(ROWS), "a candidate occurs twice"


def test_filters_leave_a_choice() -> None:
    usable = [row for row in ROWS if row["correct"] and row.get("finish_reason") != "length"]
    left = Counter(row["prompt_id"] for row in usable)
    assert set(left) == set(QUESTIONS)
    assert min(left.values()) >= 2
    wrong = Counter(row["source"] for row in ROWS if not row["correct"])
    assert set(wrong) == {"terse", "chatty", "forum"} | SAMPLED
    assert {row["source"] for row in usable} == WRITTEN | SAMPLED


def test_correct_answers_satisfy_the_rule_of_their_question() -> None:
    """Wrong written ones break it; of sampled ones, some satisfy it and are wrong in what else they say."""
    mismarked = [
        (row["prompt_id"], row["source"])
        for row in ROWS
        if is_right(row["response"], QUESTIONS[row["prompt_id"]]["rule"]) != row["correct"]
        and (row["correct"] or row["source"] in WRITTEN)
    ]
    assert mismarked == []


def test_config_matches_the_pool_and_the_sampler() -> None:
    config = load_config(QUICKSTART / "grape.yaml")
    assert config.behavior is not None
    assert config.behavior.sources is not None
    assert set(config.behavior.sources) == SAMPLED
    assert isinstance(config.behavior.sources["smollm2-tutor"], RecordedBehavior)
    brief = config.behavior.sources["smollm2-brief"]
    assert isinstance(brief, PolicyConfig)
    [sampler] = [sampler for sampler in SAMPLERS if sampler.source == "smollm2-brief"]
    assert brief.system_prompt == sampler.system_prompt
    assert sampler.temperature == 1.0, "a policy's scores are at temperature 1"
    assert (QUICKSTART.parents[1] / config.pool.path).resolve() == QUICKSTART / "pool"


def test_every_right_answer_becomes_a_row_of_tokens() -> None:
    config = load_config(QUICKSTART / "grape.yaml")
    normaliser = Normaliser(config)
    files = [path.read_text(encoding="utf-8").splitlines() for path in sorted((QUICKSTART / "pool").glob("*.jsonl"))]
    outcomes = [outcome for lines in files for line in lines for outcome in normaliser.candidates(json.loads(line))]
    accepted = [outcome.candidate for outcome in outcomes if isinstance(outcome, Accepted)]
    truncated = sum(row["correct"] and row.get("finish_reason") == "length" for row in ROWS)
    assert len(outcomes) == len(ROWS)
    assert len(accepted) == sum(row["correct"] for row in ROWS) - truncated
    assert sum(isinstance(outcome, Rejected) for outcome in outcomes) == truncated
    rendered = load_renderer(str(smollm2_folder()), config.target, config.render).render(accepted)
    assert [row for row in rendered if isinstance(row, Rejection)] == []
    assert sum(len(row.input_ids) for row in rendered if isinstance(row, Rendered)) < 20_000


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder())


def test_recorded_ids_decode_to_the_response(tokenizer: Any) -> None:
    for row in RECORDED:
        ids = row["response_ids"]
        assert len(row["behavior_logprobs"]) == len(ids)
        assert max(row["behavior_logprobs"]) <= 0
        assert row["sampling"] == {"temperature": 0.6, "top_p": 1.0, "top_k": 0}
        assert row["finish_reason"] == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        text_ids = ids[:-1] if row["finish_reason"] == "stop" else ids
        assert tokenizer.eos_token_id not in text_ids
        assert tokenizer.decode(text_ids, clean_up_tokenization_spaces=False) == row["response"]


def test_recorded_log_probabilities_are_those_of_the_policy(tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    [sampler] = [sampler for sampler in SAMPLERS if sampler.source == "smollm2-tutor"]
    for row in RECORDED[::5]:
        messages = [{"role": "system", "content": sampler.system_prompt}, *as_messages(row["prompt"])]
        prompt_ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        ids = torch.tensor(row["response_ids"])
        with torch.inference_mode():
            logits_TV = model(torch.tensor([prompt_ids + row["response_ids"]])).logits[0]
        logits_RV = logits_TV[len(prompt_ids) - 1 : -1] / row["sampling"]["temperature"]
        logprobs_R = torch.log_softmax(logits_RV, dim=-1).gather(1, ids[:, None])[:, 0]
        assert logprobs_R.tolist() == pytest.approx(row["behavior_logprobs"], abs=1e-3)
