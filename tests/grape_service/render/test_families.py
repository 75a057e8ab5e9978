"""The tokens of conversations, against apply_chat_template of the whole conversation, for the families' templates."""

from __future__ import annotations

from typing import Any

import pytest

from grape_service.config.schema import RenderConfig
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rendered
from tests.template_families import FAMILIES, make

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
DIALOGUE = [*QUESTION, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "And of Italy?"}]
ANSWERS = ["The capital of France is Paris.", "x", "東京 🙂 é", "a\n\n  b", "42"]


def renderer_of(family: str, **config: Any) -> Renderer:
    return Renderer(make(family), RenderConfig(template_kwargs=FAMILIES[family].kwargs, **config))


def render(family: str, prompt: list[dict[str, Any]], response: Any, **config: Any) -> Rendered:
    [result] = renderer_of(family, **config).render([Candidate(prompt, response, prompt_id="p", candidate_id="c")])
    assert isinstance(result, Rendered), result
    return result


def whole_ids(family: str, messages: list[dict[str, Any]]) -> list[int]:
    kwargs = FAMILIES[family].kwargs
    ids: list[int] = make(family).apply_chat_template(messages, tokenize=True, return_dict=False, **kwargs)
    return ids


def strip_after(ids: list[int], turn_end: int) -> list[int]:
    """Without what the template puts behind the last turn end."""
    return ids[: len(ids) - ids[::-1].index(turn_end)]


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("prompt", [QUESTION, DIALOGUE], ids=["question", "dialogue"])
@pytest.mark.parametrize("answer", ANSWERS)
def test_tokens_are_those_of_the_whole_conversation(family: str, prompt: list[dict[str, Any]], answer: str) -> None:
    result = render(family, prompt, answer)
    tokenizer, renderer = make(family), renderer_of(family)
    ids = result.input_ids.tolist()
    assert ids[-1] == renderer.turn_end_id
    written = result.input_ids[result.loss_mask == 1]
    assert tokenizer.backend_tokenizer.decode(written.tolist(), skip_special_tokens=False) == answer
    expected = strip_after(whole_ids(family, [*prompt, {"role": "assistant", "content": answer}]), ids[-1])
    if family == "llama-2":  # its template puts a space between the answer and the turn end, which nobody writes
        space = tokenizer.convert_tokens_to_ids("▁")
        assert expected[-2] == space
        del expected[-2]
    if family == "deepseek-r1":  # in a whole conversation its thoughts are left out, and <think> with them
        start = expected.index(tokenizer.convert_tokens_to_ids("<｜Assistant｜>"), -len(written) - 2)
        think = [tokenizer.convert_tokens_to_ids("<think>"), *tokenizer.encode("\n", add_special_tokens=False)]
        expected = [*expected[: start + 1], *think, *expected[start + 1 :]]
    if family == "zephyr-prefix-space":  # the tokenizer puts a space behind each added token: never before a response
        assert tokenizer.decode(ids[result.prompt_len :]) == f"{answer}</s>"
    assert ids == expected


@pytest.mark.parametrize("family", ["qwen-3", "special-think"])
def test_thoughts_of_a_response_are_its_own_tokens(family: str) -> None:
    answer = "<think>\nFrance, so Paris.\n</think>\n\nParis."
    result = render(family, QUESTION, answer)
    tokenizer = make(family)
    assert result.input_ids.tolist() == strip_after(
        whole_ids(family, [*QUESTION, {"role": "assistant", "content": answer}]), int(result.input_ids[-1])
    )
    assert tokenizer.decode(result.input_ids[result.loss_mask == 1]) == answer
    assert tokenizer.convert_tokens_to_ids("<think>") in result.input_ids.tolist()


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", "<think>\n\n", ""])
def test_what_the_generation_prompt_ends_with_stands_once(opening: str) -> None:
    result = render("deepseek-r1", QUESTION, f"{opening}France.\n</think>\n\nParis.")
    text = make("deepseek-r1").decode(result.input_ids)
    assert text.count("<think>") == 1
    assert (
        text.endswith("<｜Assistant｜><think>\nFrance.\n</think>\n\nParis.<｜end▁of▁sentence｜>")
        or opening == "<think>\n\n"
    )
    none = render("qwen-3-no-thinking", QUESTION, "<think>\n\n</think>\n\nParis.")
    assert make("qwen-3").decode(none.input_ids).count("<think>") == 1


@pytest.mark.parametrize("family", ["zephyr", "zephyr-first", "mistral-v1", "zephyr-prefix-space", "phi-3", "llama-2"])
def test_no_space_is_put_before_a_response_in_plain_mode(family: str) -> None:
    result = render(family, QUESTION, "Paris.", mode="plain", separator="\n\n")
    tokenizer = make(family)
    text = "".join(part.decode() for part in renderer_of(family).token_bytes(result.input_ids) if part)
    eos = FAMILIES[family].eos
    assert text.removeprefix("<s>").removeprefix(" ") == f"{QUESTION[0]['content']}\n\nParis.{eos}"
    assert tokenizer.decode(result.input_ids[result.loss_mask == 1]) == "Paris."


@pytest.mark.parametrize("family", ["zephyr", "zephyr-first", "phi-3"])
def test_turns_of_a_trajectory_are_those_of_the_whole_conversation(family: str) -> None:
    response = [
        {"role": "assistant", "content": "Let me look."},
        {"role": "tool", "content": "Rome"},
        {"role": "assistant", "content": "It is Rome."},
    ]
    result = render(family, QUESTION, response)
    expected = strip_after(whole_ids(family, [*QUESTION, *response]), int(result.input_ids[-1]))
    assert result.input_ids.tolist() == expected
    written = make(family).decode(result.input_ids[result.loss_mask == 1])
    assert written.replace(" ", "") == "Letmelook.ItisRome."


def test_a_generation_prompt_that_differs_in_white_space_alone_is_taken() -> None:
    """As in Zephyr's own template, which writes it inside of the loop, before the last line's end."""
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    result = render("zephyr", QUESTION, "Paris.", chat_template=template)
    assert make("zephyr").decode(result.input_ids).endswith("<|assistant|>\nParis.</s>")
