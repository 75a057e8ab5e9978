"""Warnings of singletons and of winners that the target, or its family, wrote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from grape_service.config.methods import SelectConfig
from grape_service.report.families import families_of, is_same_model
from grape_service.report.misled import not_compared, overlaps
from grape_service.report.notices import warnings_of
from grape_service.report.statistics import SelectStatistics
from grape_service.select.choose import Candidates, Detail, choose


def facts(kept: dict[str, int], target: str, singletons: int = 0, **config: Any) -> dict[str, Any]:
    rows = sum(kept.values())
    sources = {name: {"candidates": 2 * count, "kept": count} for name, count in kept.items()}
    select = {"kept_rows": rows, "kept_prompts": rows, "singletons": singletons, "sources": sources}
    config = {"target": {"model": target}, **config}
    return {"counts": {"select": select}, "config": config, "statistics": {}}


def texts(found: dict[str, Any]) -> list[str]:
    return [warning.text for warning in warnings_of(found)]


def test_singletons_are_added_up():
    assert texts(facts({"a": 100}, "m", singletons=25)) == [
        "25 of 100 kept prompts (25%) have one response, with nothing to choose."
    ]
    assert texts(facts({"a": 100}, "m", singletons=5)) == []
    assert texts(facts({"a": 100}, "m", singletons=100, select={"method": "all"})) == []


def test_winners_of_the_target_itself_and_of_its_family_are_added_up():
    kept = {"Qwen2.5-7B": 10, "qwen2.5-72b-instruct": 60, "llama-3": 20, "person": 10}
    assert texts(facts(kept, "Qwen/Qwen2.5-7B")) == [
        "10 of 100 kept rows (10%) were written by the target itself.",
        "60 of 100 kept rows (60%) were written by models of the target's family (qwen).",
    ]
    assert texts(facts(kept, "models/my-own")) == []


def test_the_policy_that_behavior_names_counts_as_the_sources_name():
    behavior = {"sources": {"gen-a": {"model": "org/target"}, "gen-b": {"column": "lp"}, "human": "none"}}
    found = texts(facts({"gen-a": 30, "gen-b": 60, "human": 10}, "/models/target/", behavior=behavior))
    assert found == ["30 of 100 kept rows (30%) were written by the target itself."]


def test_a_family_that_wins_beyond_its_share() -> None:
    found = facts({"qwen3-32b": 45, "llama-3": 55}, "Qwen/Qwen2.5-7B")
    assert texts(found) == []
    found["counts"]["select"]["sources"]["qwen3-32b"]["candidates"] = 30
    assert texts(found) == [
        "The target's own family has 45% of the kept rows and 21% of the candidates (qwen3-32b; by name)."
    ]
    # By what the release says of the policy, whatever its source is called.
    found = facts({"gen-a": 45, "llama-3": 55}, "my-model")
    found["counts"]["select"]["sources"]["gen-a"]["candidates"] = 30
    assert texts(found) == []
    found["statistics"]["kin"] = {"gen-a": ["tokenizer", "architecture"]}
    assert texts(found) == [
        "The target's own family has 45% of the kept rows and 21% of the candidates (gen-a; by architecture, "
        "tokenizer)."
    ]


def select_of(step_tokens: int, tokens: int, drawn: int = 40, **config: Any) -> dict[str, Any]:
    """Facts of 40 prompts with a candidate of each of two sources: the first wins with steps of `step_tokens`, the
    second has steps of 20. The first `drawn` are cut into steps."""
    made = SelectStatistics.empty(["a", "b"])
    parts = []
    for number in range(40):
        lengths = np.array([tokens, tokens])
        steps = np.array([tokens // step_tokens, tokens // 20])
        others = {"steps": np.array([-1.0, -0.5 if number % 4 else -2.0])}
        if number >= drawn:
            steps, others = np.full(2, -1), {"steps": np.full(2, np.nan)}
        detail = Detail(pa.array([f"p{number}"]), lengths, None, others, steps)
        parts.append(
            Candidates(
                *(np.zeros(2, np.int64), 1, np.arange(2), pa.array(["a", "b"]), lengths, np.array([-1.0, -2.0])),
                failed=np.zeros(2, bool),
                detail=detail,
            )
        )
    found = Candidates.concatenate(parts)
    made.add_candidates(found, choose(found, SelectConfig()))
    config = {"target": {"model": "m"}, **config}
    return {"counts": {}, "config": config, "statistics": {"report": {"select": made.to_json()}}}


def test_longer_steps_and_what_the_method_without_their_first_tokens_says() -> None:
    found = select_of(40, 400)
    made = found["statistics"]["report"]["select"]
    assert (made["winner_step_tokens"], made["rival_step_tokens"]) == (40.0, 20.0)
    assert made["overlap"] == {"mean|steps": 10}
    assert overlaps(made) == [{"left": "grape", "right": "steps", "share": 0.25, "prompts": 40}]
    sentence = (
        "Winners have longer steps than their rivals: 40 tokens a step against 20. Without the first tokens of steps "
        "25% stay."
    )
    assert sentence in texts(found)
    assert not any("steps" in text for text in texts(select_of(20, 400)))
    assert sentence not in texts(select_of(40, 400, select={"method": "steps"}))
    json = SelectStatistics.empty(["a"]).to_json()  # nothing was cut
    assert (json["winner_step_tokens"], json["rival_step_tokens"]) == (None, None)


def test_of_a_large_pool_some_prompts_are_cut_into_steps() -> None:
    found = select_of(40, 400, drawn=24)
    made = found["statistics"]["report"]["select"]
    assert (made["compared"], made["compared_steps"], made["stepped"]) == (40, 24, 24)
    assert (made["winner_step_tokens"], made["rival_step_tokens"]) == (40.0, 20.0)
    assert overlaps(made) == [{"left": "grape", "right": "steps", "share": 0.25, "prompts": 24}]
    assert any(text.endswith("Without the first tokens of steps 25% stay.") for text in texts(found))


def test_several_teachers_with_long_traces() -> None:
    (found,) = [warning for warning in warnings_of(select_of(20, 4000)) if "long responses" in warning.text]
    assert found.text.startswith("2 sources compete with long responses (")
    assert all(word in found.change for word in ("steps", "local", "rsr", "select.max_source_share"))
    assert not any("long responses" in text for text in texts(select_of(20, 400)))


def test_methods_whose_scores_were_not_made_are_named() -> None:
    made = select_of(20, 4000)["statistics"]["report"]["select"]
    lacking = {"rsr": "rank", "surprise": "entropy", "local": "each step scored in its window"}
    assert dict(not_compared(made, "grape")) == lacking
    assert "rsr" not in dict(not_compared({**made, "agree": {**made["agree"], "rsr": 3}}, "grape"))
    assert "local" not in dict(not_compared(made, "local"))


@pytest.mark.parametrize(
    ("name", "families"),
    [
        ("meta-llama/Llama-3.1-8B", {"llama"}),
        ("DeepSeek-R1-Distill-Qwen-7B", {"deepseek", "qwen"}),
        ("QwQ-32B", {"qwen"}),
        ("gemini-2.0", {"gemini"}),
        ("google/gemma-2-9b", {"gemma"}),
        ("philosopher", set()),
        ("teacher", set()),
    ],
)
def test_families_by_the_words_of_a_name(name, families):
    assert families_of(name) == families


def test_one_model_under_several_names():
    assert is_same_model("Qwen/Qwen2.5-7B", "qwen2.5_7b")
    assert not is_same_model("Qwen2.5-7B", "Qwen2.5-7B-Instruct")
    assert not is_same_model("", "")
