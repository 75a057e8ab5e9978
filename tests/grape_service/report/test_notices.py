"""Warnings of singletons and of winners that the target, or its family, wrote."""

from __future__ import annotations

from typing import Any

import pytest

from grape_service.report.families import families_of, is_same_model
from grape_service.report.notices import warnings_of


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
    behavior = {"sources": {"gen-a": {"model": "org/target"}, "gen-b": {"column": "lp"}}}
    found = texts(facts({"gen-a": 30, "gen-b": 70}, "/models/target/", behavior=behavior))
    assert found == ["30 of 100 kept rows (30%) were written by the target itself."]


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
