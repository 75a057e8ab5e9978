"""Prefills from pool to release and back: scores of a float32 forward, weights again bit for bit, prompts for RL,
gather, exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import grape_service
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config, RenderConfig
from grape_service.config.training import RewardSettings, RlSettings, RlTask, SftSettings
from grape_service.exports import export
from grape_service.release.load import Release
from grape_service.release.verify import verify
from grape_service.render.loading import load_renderer
from tests.jobs import write_jsonl
from tests.tiny_models import make_model
from workers.pipeline import reweigh, run_pipeline
from workers.training.base_model import check_tokenizer
from workers.training.trainers.prompts import pool_rows as prompts_of_pool
from workers.training.trainers.prompts import release_rows
from workers.training.trainers.rendering import prompt_tokens
from workers.training.trainers.rl import run_rl

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]

EXACT = {"engine": "transformers", "dtype": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def pool_rows(model: str) -> list[dict[str, Any]]:
    """Prompts with a prefill in each way, and without one, of whose candidates some were recorded."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[dict[str, Any]] = []
    for number in range(8):
        question = {"role": "user", "content": f"What is {number} plus {number}?"}
        given: list[dict[str, Any]] = [{"role": "assistant", "content": "The ans"}] if number % 2 else []
        column = {"prefill": "So: "} if number % 4 == 2 else {}
        for place, words in enumerate(("wer is", " It is", "we say")):
            row = {"prompt": [question, *given], "response": f"{words} {2 * number + place}.", "source": "same"}
            if place == 2:
                ids = tokenizer.encode(row["response"], add_special_tokens=False)
                row |= {"source": "recorded", "response_ids": ids, "behavior_logprobs": [-0.25] * len(ids)}
            rows.append({**row, **column, "answer": str(2 * number)})
    return rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model: str) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("prefills")
    write_jsonl(folder / "pool.jsonl", pool_rows(model))
    target = {"model": model, **EXACT}
    return {
        "name": "prefilled",
        "pool": {"path": str(folder / "pool.jsonl"), "max_reject_share": 0},
        "target": target,
        "select": {"keep": 2},
        "behavior": {
            "sources": {
                "same": {**target, "system_prompt": "You are terse."},
                "recorded": {"column": "behavior_logprobs"},
            }
        },
        "weights": {"method": "pear"},
        "output": {"path": str(folder / "datasets")},
        "workers": {"replicas": 1},
    }


@pytest.fixture(scope="module")
def release(config: dict[str, Any]) -> Release:
    return grape_service.run(config)


def prefill_of(number: int) -> str | None:
    return "The ans" if number % 2 else "So: " if number % 4 == 2 else None


def test_scores_are_those_of_a_float32_forward_of_the_whole_turn(model: str, release: Release) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = release.to_table().to_pylist()
    assert len(rows) == 16
    for row in rows:
        asked, turn = row["messages"]
        number = int(asked["content"].split()[2])
        assert row["prefill"] == prefill_of(number)
        begin = row["prefill"] or ""
        assert turn["content"].startswith(begin)
        whole = tokenizer.apply_chat_template([asked, turn], tokenize=False)
        place = whole.rindex(turn["content"]) + len(begin)
        before = tokenizer(whole[:place], add_special_tokens=False)["input_ids"]
        written = tokenizer(turn["content"][len(begin) :], add_special_tokens=False)["input_ids"]
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert row["input_ids"] == [*before, *written, end]
        assert row["loss_mask"] == [False] * len(before) + [True] * (len(written) + 1)
        with torch.no_grad():
            logits = network(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        places = range(len(before), len(row["input_ids"]))
        expected = [float(logits[token - 1, row["input_ids"][token]]) for token in places]
        assert row["target_logprobs"][len(before) :] == pytest.approx(expected, abs=1e-4)
        assert row["grape_score"] == pytest.approx(np.mean(expected[:-1]), abs=1e-4)
        if row["source"] == "recorded":
            assert row["behavior_logprobs"][len(before) : -1] == [-0.25] * len(written)
    assert {row["source"] for row in rows} == {"same", "recorded"}
    assert verify(release) == []


def test_weighed_again_the_bits_are_the_same(config: dict[str, Any], release: Release) -> None:
    again = reweigh(release.reference, Config.model_validate(config), force=True)
    assert again.reference is not None
    assert again.scored == 0
    other = grape_service.load(again.reference)
    assert other.version != release.version
    assert other.to_table().equals(release.to_table())
    assert other.manifest.statistics["proven"] == release.manifest.statistics["proven"]
    assert release.manifest.statistics["proven"]["rows"] == 16


def test_training_asks_with_the_prefill(tmp_path: Path, model: str, release: Release) -> None:
    by_ids = {tuple(row["input_ids"]): row for row in release.to_table().to_pylist()}
    prompts = list(release_rows(release))
    assert len(prompts) == 16
    for prompt, row in zip(prompts, by_ids.values(), strict=True):
        assert prompt["ids"] == row["input_ids"][: row["loss_mask"].index(True)]
        given = [] if row["prefill"] is None else [{"role": "assistant", "content": row["prefill"]}]
        assert prompt["messages"] == [row["messages"][0], *given]
        [answer] = prompt["response"]
        assert (row["prefill"] or "") + answer["content"] == row["messages"][1]["content"]
        assert "prefill" not in prompt["row"]
    renderer = load_renderer(model, PolicyConfig(model=model), RenderConfig())
    assert prompt_tokens(prompts, renderer) == ([prompt["ids"] for prompt in prompts], 0)
    other = AutoTokenizer.from_pretrained(model)
    other.add_tokens(["<|one-more|>"])  # of another digest, which says the same
    other.save_pretrained(tmp_path / "other")
    check_tokenizer(release, "other", str(tmp_path / "other"), SftSettings())


JUDGED: list[tuple[list[dict[str, str]], str]] = []


def begins_as_given(prompt: Any, response: str, row: dict[str, Any]) -> float:
    JUDGED.append((prompt, response))
    return float(len(response))


def test_rl_judges_the_whole_turn(tmp_path: Path, model: str, release: Release) -> None:
    settings = RlSettings(
        steps=1,
        prompts_per_step=6,
        num_generations=2,
        max_response_tokens=4,
        rewards=[RewardSettings(type="function", function=f"{__name__}:begins_as_given")],
        device="cpu",
    )
    JUDGED.clear()
    run_rl(RlTask(dataset=release.reference, checkpoint=model, output=str(tmp_path / "rl"), settings=settings))
    assert len(JUDGED) == 12
    prefills = [prompt[-1]["content"] for prompt, _ in JUDGED if prompt[-1]["role"] == "assistant"]
    assert {"The ans", "So: "} <= set(prefills)
    for prompt, response in JUDGED:
        given = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
        assert response.startswith(given)
        assert response != given


def test_prompts_for_rl_of_another_pool_have_their_prefill(tmp_path: Path) -> None:
    given = {"role": "assistant", "content": "It is"}
    rows = [{"question": [{"role": "user", "content": "1+1?"}, given]}, {"question": "2+2?", "prefill": "It is"}]
    found = prompts_of_pool(str(write_jsonl(tmp_path / "p.jsonl", rows)), "question", {})
    assert [row["messages"][-1] for row in found] == [given, given]


@pytest.mark.parametrize(("to", "rows"), [("llamafactory", 4), ("openrlhf", 4), ("llamafactory-v1", 16), ("jsonl", 16)])
def test_an_export_keeps_a_prefill_without_loss_or_leaves_the_row_out(
    tmp_path: Path, release: Release, to: str, rows: int
) -> None:
    found = export(release, to, tmp_path / "out", drop_weights=True)
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == found.rows == rows
    told = " ".join(found.notes)
    if rows == 4:
        assert "12 rows begin with a prefill, and " in told
        assert not any("The answer" in json.dumps(line) or "So: " in json.dumps(line) for line in lines)
    elif to == "jsonl":
        assert sum(line["prefill"] is not None for line in lines) == 12
    else:
        assert "the prefill of 12 rows" in told


def test_gather_samples_what_continues_a_prefill(tmp_path: Path, model: str) -> None:
    rows = [{"question": f"{n}+{n}?", "prefill": "The ans" if n % 2 else None, "answer": str(n)} for n in range(4)]
    write_jsonl(tmp_path / "pool" / "a.jsonl", rows)
    policy = {"model": model, **EXACT}
    config = {
        "name": "sampled",
        "pool": {"path": str(tmp_path / "pool"), "max_reject_share": 1.0, "truncated": "keep"},
        "target": policy,
        "gather": {
            "policies": {"self": {**policy, "samples": 2}},
            "sampling": {"max_tokens": 8},
            "verify": {"method": "regex", "pattern": "^The ans"},
        },
        "weights": {"method": "pear"},
        "output": {"path": str(tmp_path / "out")},
        "workers": {"replicas": 1},
    }
    outcome = run_pipeline(Config.model_validate(config))
    assert outcome.reference is not None
    files = sorted(tmp_path.glob("out/.grape/gathered/pools/*/*.parquet"))
    sampled = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len(sampled) == 8
    for row in sampled:  # what is judged is the whole turn
        has_prefill = json.loads(row["prompt"])[-1] == {"role": "assistant", "content": "The ans"}
        assert row["verdict"] == ("right" if has_prefill else "wrong")
    assert sum(row["verdict"] == "right" for row in sampled) == 4
    released = grape_service.load(outcome.reference).to_table().to_pylist()
    assert {row["prefill"] for row in released} == {"The ans", None}
    for row in released:  # the target sampled them in these tokens: recorded and scored are one number
        pairs = zip(row["target_logprobs"], row["behavior_logprobs"], row["loss_mask"], strict=True)
        assert all(abs(t - b) < 1e-4 for t, b, has_loss in pairs if has_loss)
        assert row["weight_source"] == "pear"
