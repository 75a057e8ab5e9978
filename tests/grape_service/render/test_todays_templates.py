"""Templates in the manner of today's families: whole conversations, thoughts and calls of tools, against their own
rendering of the whole."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grape_service.config.schema import RenderConfig
from grape_service.render.proof import problem_of
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from tests.template_families import QWEN3, Family, make_family

QUESTION = [{"role": "user", "content": "2+2?"}]
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEAD = "{%- if tools %}{{ '<|im_start|>system\nTools: ' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
PLAIN = "{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + m.content + '<|im_end|>\n' }}"
CALLS = "{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{% endfor %}"
NEMOTRON = (
    HEAD + "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set body = m.content or '' %}"
    "{%- if m.reasoning_content %}{%- set body = '<think>\n' + m.reasoning_content + '\n</think>\n' + body %}"
    "{%- elif '</think>' not in body %}{%- set body = '<think></think>' + body %}{% endif %}"
    "{{- '<|im_start|>assistant\n' + body }}" + CALLS + "{{- '<|im_end|>\n' }}"
    "{%- else %}" + PLAIN + "{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{{- '<think></think>' if enable_thinking is defined and not enable_thinking else '<think>\n' }}{% endif %}"
)
UNPARSED = (
    HEAD + "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{%- if loop.last or m.reasoning_content %}"
    "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{% endif %}"
    "{{- m.content }}" + CALLS + "{{- '<|im_end|>\n' }}{%- else %}" + PLAIN + "{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)
"""In the manner of Qwen3's, but that it does not look for thoughts in the words of an answer."""
GLM = (
    "{{ '[gMASK]<sop>' }}{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{%- set content = m.content %}{%- set thoughts = m.reasoning_content or '' %}"
    "{%- if '</think>' in content %}{%- set thoughts = content.split('</think>')[0].split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1] %}{% endif %}"
    "{{- '<|assistant|>\n<think>' + thoughts.strip() + '</think>' }}"
    "{%- if content.strip() %}{{- '\n' + content.strip() }}{% endif %}"
    "{%- for c in m.tool_calls or [] %}{{- '\n<tool_call>' + c.function.name }}"
    "{%- for k, v in c.function.arguments.items() %}{{- '\n<arg_key>' ~ k ~ '</arg_key>' }}"
    "{{- '\n<arg_value>' ~ v ~ '</arg_value>' }}"
    "{%- endfor %}{{- '\n</tool_call>' }}{%- endfor %}"
    "{%- elif m.role == 'tool' %}{{- '<|observation|>\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{%- else %}{{- '<|' + m.role + '|>\n' + m.content }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}"
    "{{- '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)
GEMMA4 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'tool' %}{{- '<|tool_response>' + m.content + '<tool_response|>' }}"
    "{%- else %}{%- if m.role != 'assistant' or loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}{% endif %}{{- m.content | trim }}"
    "{%- for c in m.tool_calls or [] %}{{- '<|tool_call>call:' + c.function.name + (c.function.arguments | tojson) }}"
    "{{- '<tool_call|>' }}{%- endfor %}"
    "{%- if not m.tool_calls %}{{- '<turn|>\n' }}{% endif %}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt and messages[-1].role != 'tool' %}{{- '<|turn>model\n' }}"
    "{%- if not enable_thinking | default(false) %}{{- '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
    "{%- if m.role == 'assistant' and m.tool_calls %}{{ '<｜Assistant｜></think>' + (m.content or '') }}"
    "{%- for c in m.tool_calls %}{{ '<call>' + c.function.name + '<sep>' }}{{ c.function.arguments + '</call>' }}"
    "{% endfor %}"
    "{{- '<｜end▁of▁sentence｜>' }}"
    "{%- elif m.role == 'assistant' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] %}{% endif %}"
    "{{ '<｜Assistant｜></think>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}"
    "{%- if m.role == 'tool' %}{{ '<out>' + m.content + '</out>' }}{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"
)
MISTRAL_TOOLS = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined and m.tool_calls is not none %}{{- '[TOOL_CALLS] [' }}"
    "{%- for c in m.tool_calls %}{%- if c.id is not defined or c.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    "{{- (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{- ', ' if not loop.last }}{%- endfor %}"
    "{{- ']' + eos_token }}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + m.content + '}[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)
GRANITE = (
    "{%- for m in messages %}{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}"
    + CALLS
    + "{{- '<|end_of_text|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
SMOLLM3 = (
    "{{- '<|im_start|>system\nToday Date: ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}"
    "{%- for m in messages %}"
    "{%- set off = enable_thinking is defined and not enable_thinking %}"
    "{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{{- '<think>\n\n</think>\n' if off and '<think>' not in m.content else '' }}{{- m.content.lstrip('\n') }}"
    "{{- '<|im_end|>\n' }}{%- else %}" + PLAIN + "{% endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{{- '<think>\n\n</think>\n' if enable_thinking is defined and not enable_thinking else '' }}{% endif %}"
)
GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>")
GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>")
GEMMA_TOKENS += ("<tool_call|>", "<|tool_response>", "<tool_response|>")
DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")
THINK = ("<think>", "</think>")
OFF = {"enable_thinking": False}

TODAY: dict[str, tuple[Family, tuple[str, ...]]] = {
    "nemotron": (Family(NEMOTRON, "bytes", CHATML, "<|im_end|>", added=THINK), ()),
    "nemotron-off": (Family(NEMOTRON, "bytes", CHATML, "<|im_end|>", added=THINK, kwargs=OFF), ()),
    "qwen-3": (Family(QWEN3, "bytes", CHATML, "<|im_end|>", added=THINK), ()),
    "qwen-3-off": (Family(QWEN3, "bytes", CHATML, "<|im_end|>", added=THINK, kwargs=OFF), ()),
    "unparsed": (Family(UNPARSED, "bytes", CHATML, "<|im_end|>", added=THINK), ()),
    "glm": (Family(GLM, "bytes", GLM_TOKENS, "<|endoftext|>", added=THINK), ("<|user|>", "<|observation|>")),
    "glm-off": (
        Family(GLM, "bytes", GLM_TOKENS, "<|endoftext|>", added=THINK, kwargs=OFF),
        ("<|user|>", "<|observation|>"),
    ),
    "gemma-4": (Family(GEMMA4, "plain-space", GEMMA_TOKENS, "<eos>", "<bos>"), ("<turn|>", "<|tool_response>")),
    "deepseek": (
        Family(DEEPSEEK, "bytes", DEEPSEEK_TOKENS, DEEPSEEK_TOKENS[1], DEEPSEEK_TOKENS[0], added=THINK),
        (),
    ),
    "deepseek-thinking": (
        Family(
            DEEPSEEK, "bytes", DEEPSEEK_TOKENS, DEEPSEEK_TOKENS[1], DEEPSEEK_TOKENS[0], THINK, kwargs={"thinking": True}
        ),
        (),
    ),
    "mistral-tools": (
        Family(MISTRAL_TOOLS, "first", ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"), "</s>", "<s>"),
        (),
    ),
    "granite": (
        Family(GRANITE, "bytes", ("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"), "<|end_of_text|>"),
        (),
    ),
    "smollm3": (Family(SMOLLM3, "bytes", CHATML, "<|im_end|>"), ()),
    "smollm3-off": (Family(SMOLLM3, "bytes", CHATML, "<|im_end|>", added=THINK, kwargs=OFF), ()),
}


@lru_cache(maxsize=32)
def renderer_of(family: str, reasoning: Any = "template") -> Renderer:
    spec, stops = TODAY[family]
    tokenizer = make_family(family, spec)
    stop_ids = [tokenizer.convert_tokens_to_ids(token) for token in stops]
    return Renderer(tokenizer, RenderConfig(template_kwargs=spec.kwargs, reasoning=reasoning), stop_ids=stop_ids)


def render(family: str, response: Any, reasoning: Any = "template", **over: Any) -> Rendered | Rejection:
    [result] = renderer_of(family, reasoning).render([Candidate(QUESTION, response, "p", "c", **over)])
    return result


def said(family: str, ids: Any) -> str:
    return b"".join(part or b"" for part in renderer_of(family).token_bytes(ids)).decode(errors="replace")


def parts(family: str, response: Any, reasoning: Any = "template") -> list[tuple[str, int]]:
    """Runs of one mask value, as text, behind the prompt's first."""
    result = render(family, response, reasoning)
    assert isinstance(result, Rendered), result
    runs: list[tuple[str, int]] = []
    for id_, value in zip(result.input_ids.tolist(), result.loss_mask.tolist(), strict=True):
        text = said(family, [id_])
        if runs and runs[-1][1] == value:
            runs[-1] = runs[-1][0] + text, value
        else:
            runs.append((text, value))
    return runs


def whole(family: str, response: Any) -> str:
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
    tokenizer = make_family(family, TODAY[family][0])
    template = tokenizer.chat_template.replace("strftime_now('%d %B %Y')", "'26 July 2024'")
    messages = [*QUESTION, *answer]
    text: str = tokenizer.apply_chat_template(messages, None, None, template, tokenize=False, **TODAY[family][0].kwargs)
    return text


PLAIN_ANSWERS = {
    "nemotron": ("<think></think>", "<|im_end|>"),
    "nemotron-off": ("<think></think>", "<|im_end|>"),
    "qwen-3": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "qwen-3-off": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "unparsed": ("<think>\n\n</think>\n\n", "<|im_end|>"),
    "glm": ("<|assistant|>\n<think></think>\n", "<|user|>"),
    "glm-off": ("<|assistant|>\n<think></think>\n", "<|user|>"),
    "gemma-4": ("<|turn>model\n<|channel>thought\n<channel|>", "<turn|>"),
    "deepseek": ("<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    "deepseek-thinking": ("<｜Assistant｜></think>", "<｜end▁of▁sentence｜>"),
    "mistral-tools": ("2+2?[/INST]", "</s>"),
    "granite": ("assistant<|end_of_role|>", "<|end_of_text|>"),
    "smollm3": ("26 July 2024<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "smollm3-off": ("<think>\n\n</think>\n", "<|im_end|>"),
}


@pytest.mark.parametrize("family", list(TODAY))
def test_an_answer_stands_where_the_template_puts_it(family: str) -> None:
    before, end = PLAIN_ANSWERS[family]
    context, written, turn_end = parts(family, "It is 4.")
    assert context[0].endswith(before)
    assert (written, turn_end) == ((" It is 4." if family == "mistral-tools" else "It is 4.", 1), (end, 2))
    text = context[0] + written[0]
    if family == "gemma-4":  # the block stands in the generation prompt alone
        text = text.replace("<|channel>thought\n<channel|>", "")
    assert whole(family, "It is 4.").startswith(text)


@pytest.mark.parametrize("opening", ["<think>\n", "\n<think>\n", "<think>", ""])
@pytest.mark.parametrize("family", ["nemotron", "qwen-3", "qwen-3-off", "unparsed", "glm", "deepseek-thinking"])
def test_thoughts_are_opened_once(family: str, opening: str) -> None:
    result = render(family, f"{opening}add\n</think>\n\nIt is 4.")
    assert isinstance(result, Rendered), result
    text = said(family, result.input_ids)
    assert text.count("<think>") == text.count("</think>") == 1
    assert "add" in said(family, result.input_ids[result.loss_mask == 1])


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", "</think>\n\n"])
@pytest.mark.parametrize("family", ["nemotron", "nemotron-off", "qwen-3-off", "deepseek"])
def test_an_empty_block_stands_once(family: str, block: str) -> None:
    result = render(family, f"{block}It is 4.")
    assert isinstance(result, Rendered), result
    assert said(family, result.input_ids).count("</think>") == 1


def call(value: str, id_: str = "abcdefghi") -> dict[str, Any]:
    function = {"name": "add", "arguments": f'{{"a": "{value}"}}'}
    return {"role": "assistant", "content": "", "tool_calls": [{"id": id_, "type": "function", "function": function}]}


def tool_turns(value: str, answer: str, last: str) -> list[dict[str, Any]]:
    return [
        call(value),
        {"role": "tool", "content": answer, "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": last},
    ]


WITH_TOOLS = [name for name in TODAY if not name.startswith("smollm3")]


@pytest.mark.parametrize("family", WITH_TOOLS)
def test_turns_of_a_tool_trajectory_are_split_with_their_own_turn_ends(family: str) -> None:
    turns = tool_turns("two", "RES4", "It is 4.")
    runs = parts(family, turns)
    written = [text for text, value in runs if value == 1]
    assert len(written) == 2
    assert "add" in written[0]
    assert "two" in written[0]
    assert written[1].strip() == "It is 4."
    assert "RES4" not in "".join(written)
    first, last = [text for text, value in runs if value == 2]
    expected = {"glm": "<|observation|>", "gemma-4": "<|tool_response>"}.get(family.removesuffix("-off"))
    assert first == (expected or last)
    assert "<think>" not in "".join(written)
    assert "RES4" in runs[3][0]


def test_a_trajectory_with_an_empty_block_before_its_thoughts_is_a_reject() -> None:
    turns = tool_turns("two", "RES4", "<think>\nadd\n</think>\n\nIt is 4.")
    result = render("unparsed", turns)
    assert isinstance(result, Rejection)
    assert result.detail == "the template puts empty thoughts before those of response message 2"


def parsed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As templates that take objects get them."""
    import json

    made = []
    for message in messages:
        calls = [
            {**one, "function": {**one["function"], "arguments": json.loads(one["function"]["arguments"])}}
            for one in message.get("tool_calls", [])
        ]
        made.append({**message, "tool_calls": calls} if calls else message)
    return made


@pytest.mark.parametrize("family", [name for name in WITH_TOOLS if name != "gemma-4"])
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    value=st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6),
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    last=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)
def test_tokens_of_trajectories_are_those_of_the_whole_conversation(
    family: str, value: str, answer: str, last: str
) -> None:
    turns = tool_turns(value, answer, last)
    result = render(family, turns)
    if isinstance(result, Rejection):
        assert not last.strip() or last != last.strip() or not answer.isprintable() or not last.isprintable(), result
        return
    text = said(family, result.input_ids)
    rendered = whole(family, turns if family.startswith("deepseek") else parsed(turns))
    end = text[: len(text) - len(said(family, result.input_ids[-1:]))]  # GLM's last turn ends with a role that follows
    assert rendered.startswith(end)
    assert not rendered[len(end) :].strip() or rendered.startswith(text)


@pytest.mark.parametrize("family", list(TODAY))
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    answer=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
    thoughts=st.none() | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8),
)
def test_answers_of_any_words_say_themselves_or_are_rejected(family: str, answer: str, thoughts: str | None) -> None:
    response = answer if thoughts is None else f"<think>\n{thoughts}\n</think>\n\n{answer}"
    candidate = Candidate(QUESTION, response, "p", "c")
    [result] = renderer_of(family).render([candidate])
    if isinstance(result, Rejection):
        return
    assert problem_of(renderer_of(family), candidate, result) is None
    written = said(family, result.input_ids[result.loss_mask == 1])
    assert response.strip().endswith(written.strip())
    assert answer.strip() in written


THINKS = [{"role": "assistant", "content": "It is 4.", "reasoning_content": "two and two"}]


@pytest.mark.parametrize("family", ["nemotron", "qwen-3", "glm"])
def test_a_place_for_thoughts_is_used(family: str) -> None:
    for reasoning in ("template", "tags", "drop"):
        result = render(family, THINKS, reasoning)
        assert isinstance(result, Rendered), result
        text = said(family, result.input_ids)
        assert text.count("<think>") == 1
        assert whole(family, THINKS).startswith(text.removesuffix("<|user|>"))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_what_becomes_of_thoughts_without_a_place(name: str) -> None:
    thinks = [{"role": "assistant", "content": "It is 4.", name: "two and two"}]
    refused = render("granite", thinks)
    assert isinstance(refused, Rejection)
    assert "render.reasoning" in str(refused.detail)
    dropped, tagged = (parts("granite", thinks, reasoning)[1][0] for reasoning in ("drop", "tags"))
    assert dropped == "It is 4."
    assert tagged == "<think>\ntwo and two\n</think>\n\nIt is 4."
    assert parts("deepseek-thinking", thinks, "tags")[1][0].strip() == "two and two\n</think>\n\nIt is 4."


def test_a_turn_without_loss_is_read() -> None:
    turns = tool_turns("two", "RES4", "It is 4.")
    turns[0]["weight"] = 0
    runs = parts("qwen-3", turns)
    assert [value for _, value in runs] == [0, 1, 2]
    assert "add" in runs[0][0]
    everything = render("qwen-3", tool_turns("two", "RES4", "It is 4."))
    assert isinstance(everything, Rendered)
    assert said("qwen-3", everything.input_ids) == "".join(text for text, _ in runs)


def test_notes_reject_no_row_and_fields_of_a_prompt_do() -> None:
    noted = [{**QUESTION[0], "country": "Germany", "provider_specific_fields": {"refusal": None, "x": 1}}]
    renderer = renderer_of("granite")
    plain, with_notes = renderer.render([Candidate(prompt, "4", "p", "c") for prompt in (QUESTION, noted)])
    assert with_notes.input_ids.tolist() == plain.input_ids.tolist()
    for name, value in (("images", ["a.png"]), ("function_call", {"name": "add"})):
        [refused] = renderer.render([Candidate([{**QUESTION[0], name: value}], "4", "p", "c")])
        assert isinstance(refused, Rejection)
        assert name in str(refused.detail)


def test_a_row_with_variables_of_its_own_is_proved_under_them() -> None:
    renderer = renderer_of("smollm3")
    candidate = Candidate(QUESTION, "It is 4.", "p", "c", template_kwargs={"enable_thinking": False})
    [result] = renderer.render([candidate])
    assert isinstance(result, Rendered)
    assert said("smollm3", result.input_ids[: result.prompt_len]).endswith("<think>\n\n</think>\n")
    assert problem_of(renderer, candidate, result) is None
