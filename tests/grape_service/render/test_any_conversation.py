"""Random conversations through every template: the tokens say the conversation, or the row is rejected."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grape_service.config.schema import RenderConfig
from grape_service.render.encoding import MARK_CLOSE, MARK_OPEN
from grape_service.render.proof import problem_of
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from grape_service.rows.columns import LOSS_TOKEN
from tests.template_families import FAMILIES, make

CONTROL = [
    *sorted({token for family in FAMILIES.values() for token in (*family.special, *family.added)}),
    "[INST]",
    "<|assistant|>\n",
    "<think>\n",
    "\n</think>\n\n",
    "{{ x }}",
    "▁",
    "<0x0A>",
]
WORDS = st.one_of(
    st.sampled_from(["The answer is 7.", "Paris", " ", "\n", "é", "東京", "🙂", "a  b"]), st.sampled_from(CONTROL)
)
TEXT = st.one_of(
    st.lists(WORDS, max_size=5).map("".join), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": st.just("add"), "arguments": st.dictionaries(st.just("a"), TEXT)})}
    ),
    min_size=1,
    max_size=2,
)
TOOLS = st.one_of(st.none(), st.just([{"type": "function", "function": {"name": "add", "parameters": {}}}]))


def message(role: str, text: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": text, **{name: value for name, value in fields.items() if value}}


PROMPTS = st.builds(
    lambda system, past, last: [
        *([message("system", system)] if system else []),
        *(one for question, answer in past for one in (message("user", question), message("assistant", answer))),
        message("user", last),
    ],
    st.one_of(st.none(), TEXT),
    st.lists(st.tuples(TEXT, TEXT), max_size=1),
    TEXT,
)
RESPONSES = st.one_of(
    TEXT,
    st.builds(lambda thoughts, text: f"<think>\n{thoughts}\n</think>\n\n{text}", TEXT, TEXT),
    st.builds(
        lambda text, calls, thoughts, extra, result, last: [
            message("assistant", text, tool_calls=calls, reasoning_content=thoughts, function_call=extra),
            message("tool", result, tool_call_id="c1"),
            message("assistant", last),
        ],
        TEXT,
        st.one_of(st.none(), CALLS),
        st.one_of(st.none(), TEXT),
        st.one_of(st.none(), st.just({"name": "add"})),
        TEXT,
        TEXT,
    ),
)


@pytest.mark.parametrize("family", list(FAMILIES))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(prompt=PROMPTS, response=RESPONSES, tools=TOOLS)
def test_tokens_say_the_conversation_or_the_row_is_rejected(
    family: str, prompt: list[dict[str, Any]], response: Any, tools: Any
) -> None:
    renderer = renderer_of(family)
    candidate = Candidate(prompt, response, prompt_id="p", candidate_id="c", tools=tools)
    [row] = renderer.render([candidate])
    if isinstance(row, Rejection):
        return
    assert isinstance(row, Rendered)
    assert problem_of(renderer, candidate, row) is None
    stated = said(renderer, row.input_ids)
    assert MARK_OPEN not in stated
    assert MARK_CLOSE not in stated
    written = said(renderer, row.input_ids[row.loss_mask == LOSS_TOKEN])
    if isinstance(response, str):
        once = written.removeprefix(" ") if not response.startswith(" ") else written
        assert response.endswith(once)
        assert said(renderer, row.input_ids[: row.prompt_len]).rstrip().endswith(response[: -len(once)].rstrip())
        assert np.count_nonzero(np.diff((row.loss_mask > 0).astype(int)) == 1) == 1
    else:
        for one in response:
            assert letters(one["content"].rsplit("</think>")[-1]) in letters(stated)
            assert "function_call" not in one  # none of these templates shows it
        for one in (response[0], response[-1]):
            assert letters(one["content"].rsplit("</think>")[-1]) in letters(written)
        for call in response[0].get("tool_calls") or []:
            assert call["function"]["name"] in written
    for one in prompt:
        if one["role"] != "assistant":
            assert letters(one["content"]) in letters(stated)


@lru_cache(maxsize=32)
def renderer_of(family: str) -> Renderer:
    return Renderer(make(family), RenderConfig(template_kwargs=FAMILIES[family].kwargs))


def said(renderer: Renderer, ids: Any) -> str:
    return b"".join(part or b"" for part in renderer.token_bytes(ids)).decode(errors="replace")


def letters(text: str) -> str:
    return "".join(text.replace("▁", " ").split())
