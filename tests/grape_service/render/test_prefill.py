"""Prompts that end with a prefill: against the template's own rendering of the whole turn, and of one to go on with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grape_service.config.schema import RenderConfig
from grape_service.render.proof import problem_of
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Message, Rejection, Rendered
from grape_service.rows.columns import LOSS_TOKEN
from tests import tiny_models
from tests.grape_service.render.test_any_conversation import PROMPTS, TEXT, letters, renderer_of, said
from tests.template_families import FAMILIES, QWEN25, make

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
DIALOGUE = [*QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}]
TURNS = [("The capital", " is Rome."), ("It is ", "Rome, 東京 🙂."), ("a\n", "\n  b"), ("Ro", "me."), ("{", '"a": 1}')]
THOUGHT = "<think>\nIt has"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def prefilled(prompt: list[Message], prefill: str, response: Any, **over: Any) -> Candidate:
    return Candidate([*prompt, {"role": "assistant", "content": prefill}], response, "p", "c", **over)


def one(renderer: Renderer, candidate: Candidate) -> Rendered | Rejection:
    [found] = renderer.render([candidate])
    return found


def rendered(renderer: Renderer, candidate: Candidate) -> Rendered:
    found = one(renderer, candidate)
    assert isinstance(found, Rendered), found
    return found


def text_of(family: str, messages: list[Message], **options: Any) -> str:
    text: str = make(family).apply_chat_template(messages, tokenize=False, **FAMILIES[family].kwargs, **options)
    return text


def ids_of(family: str, text: str) -> list[int]:
    ids: list[int] = make(family)(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("prompt", [QUESTION, DIALOGUE], ids=["question", "dialogue"])
@pytest.mark.parametrize("turn", TURNS, ids=[prefill for prefill, _ in TURNS])
def test_a_row_is_the_rendering_of_the_whole_turn(family: str, prompt: list[Message], turn: tuple[str, str]) -> None:
    prefill, response = turn
    renderer = renderer_of(family)
    row = rendered(renderer, prefilled(prompt, prefill, response))
    whole = text_of(family, [*prompt, {"role": "assistant", "content": prefill + response}])
    place = whole.rindex(prefill + response) + len(prefill)
    assert row.input_ids[: row.prompt_len].tolist() == ids_of(family, whole[:place])
    assert said(renderer, row.input_ids[row.loss_mask == LOSS_TOKEN]) == response
    assert row.loss_mask[: row.prompt_len].tolist() == [0] * row.prompt_len
    assert row.input_ids[-1] == renderer.turn_end_id
    assert row.loss_mask[-1] > 0
    in_one_go = ids_of(family, whole)
    if in_one_go[: row.prompt_len] == row.input_ids[: row.prompt_len].tolist():  # no token stands across the boundary
        words = row.input_ids[:-1].tolist()
        assert in_one_go[: len(words)] == words


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("prefill", ["The capital", "It is\n\n Ro", "{", "x"])
def test_a_prompt_is_what_an_engine_is_asked_to_continue(family: str, prefill: str) -> None:
    [asked] = renderer_of(family).render_prompts([prefilled(DIALOGUE, prefill, "")])
    assert isinstance(asked, Rendered)
    text = text_of(family, [*DIALOGUE, {"role": "assistant", "content": prefill}], continue_final_message=True)
    assert asked.input_ids.tolist() == ids_of(family, text)


PREFILLS = st.one_of(TEXT, st.sampled_from([THOUGHT, "<think>\n", "<think>\n\n</think>\n\n", "The answer"]))


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(prompt=PROMPTS, prefill=PREFILLS, response=TEXT)
def test_any_prefill_is_the_end_of_the_prompt_or_the_row_is_rejected(
    family: str, prompt: list[Message], prefill: str, response: str
) -> None:
    renderer = renderer_of(family)
    candidate = prefilled(prompt, prefill, response)
    row = one(renderer, candidate)
    if isinstance(row, Rejection):
        assert row.reason
        return
    assert problem_of(renderer, candidate, row) is None
    [asked] = renderer.render_prompts([candidate])
    assert isinstance(asked, Rendered)
    assert asked.input_ids.tolist() == row.input_ids[: row.prompt_len].tolist()  # whatever the response is
    written = said(renderer, row.input_ids[row.loss_mask == LOSS_TOKEN])
    once = written.removeprefix(" ") if not response.startswith(" ") else written
    assert response.endswith(once)
    assert letters(said(renderer, asked.input_ids)).endswith(letters(prefill + response[: -len(once)]))


@pytest.mark.parametrize(
    ("family", "prefill", "response", "start"),
    [
        ("qwen-3", THOUGHT, " a tower.\n</think>\n\nParis.", f"assistant\n{THOUGHT}"),
        ("qwen-3", "<think>\n\n</think>\n\nIt", " is Paris.", "assistant\n<think>\n\n</think>\n\nIt"),
        ("qwen-3", "<think>\n\n</think>\n\n", "Paris.", "assistant\n<think>\n\n</think>\n\n"),
        ("qwen-3", "It", " is Paris.", "assistant\n<think>\n\n</think>\n\nIt"),
        ("deepseek-r1", THOUGHT, " a tower.\n</think>\n\nParis.", f"<｜Assistant｜>{THOUGHT}"),
        ("deepseek-r1", "<think>", "\nA tower.\n</think>\n\nParis.", "<｜Assistant｜><think>\n"),
        ("deepseek-r1", "It", " is Paris.", "<｜Assistant｜>It"),
        ("qwen-3", "<think>\n", "\n</think>\n\nParis.", "assistant\n<think>\n"),
        ("llama-3", "\nIt", " is Paris.", "assistant<|end_header_id|>\n\nIt"),
        ("llama-3", "  It", " is Paris.", "assistant<|end_header_id|>\n\nIt"),
    ],
)
def test_what_templates_do_with_thoughts_and_white_space(family: str, prefill: str, response: str, start: str) -> None:
    renderer = renderer_of(family)
    row = rendered(renderer, prefilled(QUESTION, prefill, response))
    assert said(renderer, row.input_ids[: row.prompt_len]).endswith(start)
    assert start[-1] == "\n" or said(renderer, row.input_ids[row.loss_mask == LOSS_TOKEN]) == response


@pytest.mark.parametrize(
    ("family", "prefill", "response", "reason"),
    [
        ("qwen-3", "It", " is</think>Paris.", "prefill cannot be told from the response"),
        ("deepseek-r1", "It", " is</think>Paris.", "prefill cannot be told from the response"),
        ("qwen-3", "<think>\n", "\n\n\n</think>\n\nParis.", "prefill cannot be told from the response"),
        (
            "qwen-3",
            "Let",
            [
                {"role": "assistant", "content": " me look."},
                {"role": "tool", "content": "Rome"},
                {"role": "assistant", "content": "It is Rome."},
            ],
            "rendering cannot be split",
        ),
        ("qwen-2.5", "It is", "It is Paris.", "response repeats its prefill"),
        ("qwen-2.5", "It is", " Paris.<|im_start|>", "response spells a control token"),
        ("qwen-2.5", "It is", "", "empty response"),
        (
            "qwen-2.5",
            "It is",
            [{"role": "assistant", "content": " Paris.", "reasoning_content": "A tower."}],
            "prefill cannot be told from the response",
        ),
        (
            "qwen-2.5",
            "It is",
            [{"role": "tool", "content": "1"}, {"role": "assistant", "content": " Paris."}],
            "prefill cannot be told from the response",
        ),
    ],
)
def test_what_is_not_certain_is_rejected(family: str, prefill: str, response: Any, reason: str) -> None:
    found = one(renderer_of(family), prefilled(QUESTION, prefill, response))
    assert isinstance(found, Rejection), found
    assert found.reason == reason


def test_a_template_that_rewrites_a_turn_is_told() -> None:
    joins = tiny_models.CHATML.replace("(message.content or '')", "(message.content or '') | replace('  ', ' ')")
    assert joins != tiny_models.CHATML
    renderer = Renderer(make("qwen-2.5"), RenderConfig(chat_template=joins))
    found = one(renderer, prefilled(QUESTION, "It is ", " Paris."))
    assert isinstance(found, Rejection)
    assert (found.reason, found.detail) == (
        "prefill cannot be told from the response",
        "the template rewrites the turn that both are",
    )
    assert isinstance(one(renderer, prefilled(QUESTION, "It is", " Paris.")), Rendered)


def test_the_first_turn_of_a_trajectory_goes_on_with_its_prefill(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["chatml"]
    renderer = Renderer(tokenizer, RenderConfig())
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "assistant", "content": " me look.", "tool_calls": [call]},
        {"role": "tool", "content": "Rome"},
        {"role": "assistant", "content": "It is Rome."},
    ]
    row = rendered(renderer, prefilled(QUESTION, "Let", turns, tools=TOOLS))
    whole = [*QUESTION, {**turns[0], "content": "Let me look."}, *turns[1:]]
    text = tokenizer.apply_chat_template(whole, tools=TOOLS, tokenize=False)
    assert tokenizer.decode(row.input_ids) == text.rstrip("\n")
    place = text.rindex("Let me look.") + len("Let")
    assert tokenizer.decode(row.input_ids[: row.prompt_len]) == text[:place]
    assert np.count_nonzero(np.diff((row.loss_mask > 0).astype(int)) == 1) == 2
    again = rendered(renderer, prefilled(QUESTION, "", turns, tools=TOOLS))
    assert again.prompt_len < row.prompt_len


def test_recorded_ids_are_taken_as_they_are(tokenizers: dict[str, Any]) -> None:
    """Where one token would stand across the boundary, and where a rollout has the prefill in front."""
    tokenizer = tokenizers["chatml"]
    renderer = Renderer(tokenizer, RenderConfig())
    prompt = rendered(renderer, prefilled(QUESTION, "The ans", "wer")).prompt_len
    ids = [*tokenizer.encode("w"), *tokenizer.encode("er")]
    own = prefilled(QUESTION, "The ans", "wer", response_ids=ids, recorded_logprobs=[-0.5] * len(ids))
    row = rendered(renderer, own)
    assert row.input_ids[row.prompt_len : -1].tolist() == ids
    assert row.prompt_len == prompt
    assert row.recorded_logprobs is not None
    assert row.recorded_logprobs[:-1].tolist() == [-0.5] * len(ids)
    there = row.input_ids[: row.prompt_len].tolist()
    in_front = prefilled(QUESTION, "The ans", "wer", response_ids=[*there, *ids])
    assert rendered(renderer, in_front).input_ids.tolist() == row.input_ids.tolist()
    other = one(renderer, prefilled(QUESTION, "The ans", "wer", response_ids=tokenizer.encode("The answer")))
    assert isinstance(other, Rejection)
    assert other.reason == "response_ids are not the response"


@pytest.mark.parametrize("response", [" is 180.", [{"role": "assistant", "content": " is 180.", "id": "x"}]])
def test_a_behavior_reads_the_prefill_in_its_own_context(tokenizers: dict[str, Any], response: Any) -> None:
    target = Renderer(tokenizers["chatml"], RenderConfig())
    behavior = Renderer(tokenizers["llama3"], RenderConfig(), system_prompt="Be brief.")
    rows = [prefilled(QUESTION, "The answer", response)]
    [theirs] = target.render(rows)
    assert isinstance(theirs, Rendered)
    [ours], [own] = behavior.render_behavior(rows, [theirs], target.turn_end_id), behavior.render(rows)
    assert isinstance(ours, Rendered)
    assert isinstance(own, Rendered)
    assert ours.input_ids.tolist() == own.input_ids.tolist()
    assert ours.loss_mask.tolist() == own.loss_mask.tolist()
    assert tokenizers["llama3"].decode(ours.input_ids[: ours.prompt_len]).endswith("\n\nThe answer")
    [same] = target.render_behavior(rows, [theirs], target.turn_end_id)
    assert isinstance(same, Rendered)
    assert same.input_ids.tolist() == theirs.input_ids.tolist()


def test_a_behavior_writes_its_empty_block_before_the_prefill_once() -> None:
    target = Renderer(make("qwen-3"), RenderConfig(chat_template=QWEN25))
    behavior = renderer_of("qwen-3")
    rows = [prefilled(QUESTION, "It", " is Paris.")]
    [theirs], [own] = target.render(rows), behavior.render(rows)
    [ours] = behavior.render_behavior(rows, [theirs], target.turn_end_id)
    assert isinstance(ours, Rendered)
    assert isinstance(own, Rendered)
    assert ours.input_ids.tolist() == own.input_ids.tolist()
    assert said(behavior, ours.input_ids[: ours.prompt_len]).endswith("assistant\n<think>\n\n</think>\n\nIt")


def test_plain_text_and_a_system_prompt() -> None:
    plain = Renderer(make("qwen-2.5"), RenderConfig(mode="plain", separator="\n\n"))
    row = rendered(plain, prefilled(QUESTION, "It", " is Paris."))
    assert said(plain, row.input_ids[: row.prompt_len]) == f"{QUESTION[0]['content']}\n\nIt"
    own = renderer_of("llama-3").with_system_prompt("Be brief.")
    row = rendered(own, prefilled(QUESTION, "It", " is Paris."))
    assert "Be brief." in said(own, row.input_ids[: row.prompt_len])
    assert said(own, row.input_ids[: row.prompt_len]).endswith("\n\nIt")


def test_a_control_token_in_a_prefill_is_text() -> None:
    renderer = renderer_of("qwen-2.5")
    row = rendered(renderer, prefilled(QUESTION, "See <|im_start|>", " there."))
    start = make("qwen-2.5").convert_tokens_to_ids("<|im_start|>")
    without = rendered(renderer, prefilled(QUESTION, "See", " there."))
    assert row.input_ids.tolist().count(start) == without.input_ids.tolist().count(start)
    assert said(renderer, row.input_ids[: row.prompt_len]).endswith("See <|im_start|>")
