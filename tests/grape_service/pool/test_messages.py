"""Messages as servers and tools write them: parts, thoughts, calls, notes, what is trained on."""

import pytest

from grape_service.pool.lines import parse_line
from grape_service.pool.messages import Unusable, conversation_of
from tests.grape_service.pool.one_row import CALL, accepted, reason

pytestmark = pytest.mark.quick


def test_messages_as_python_writes_them_are_read_or_told():
    messages = [{"role": "system", "content": "Don't."}, {"role": "user", "content": 'Say "2+2"?'}]
    assert accepted({"prompt": str(messages), "response": "4"}).prompt == messages
    for text in (
        "[{'role': 'user', 'content': '2+2?'}\n {'role': 'user'}]",
        "array([{'content': 'a', 'role': 'user'}])",
    ):
        assert reason({"prompt": text, "response": "4"}) == "prompt has the wrong type"
    assert accepted({"prompt": "{'a': 1}, what is it?", "response": "4"}).prompt[0]["content"].startswith("{'a'")


ANSWER = {"role": "assistant", "content": "It is 4.<|im_end|>\n"}


def test_a_turn_end_behind_a_response_is_no_part_of_it():
    assert accepted({"prompt": "a", "response": "It is 4.<|im_end|>\n"}).response == "It is 4."
    assert reason({"prompt": "a", "response": "<|im_end|>"}) == "empty response"
    turns = [{"role": "assistant", "content": "I look.<|im_end|>"}, {"role": "tool", "content": "4<|im_end|>"}, ANSWER]
    assert [one["content"] for one in accepted({"prompt": "a", "response": turns}).response] == [
        "I look.",
        "4<|im_end|>",
        "It is 4.",
    ]


def conversation(*messages):
    return accepted({"messages": [{"role": "user", "content": "2+2?"}, *messages]})


@pytest.mark.parametrize("kind", ["reasoning", "thinking"])
def test_thoughts_in_content_parts_are_thoughts(kind):
    parts = [
        {"type": kind, "text" if kind == "reasoning" else kind: "two and two"},
        {"type": "text", "text": "It is 4."},
    ]
    found = conversation({"role": "assistant", "content": parts})
    assert found.response == [{"role": "assistant", "content": "It is 4.", "reasoning_content": "two and two"}]


def test_parts_of_other_servers_are_messages():
    anthropic = [
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 2}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "4"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is 4."}]},
    ]
    gemini = [
        {"role": "model", "parts": [{"functionCall": {"name": "add", "args": {"a": 2}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "add", "response": {"result": 4}}}]},
        {"role": "model", "parts": [{"text": "two and two", "thought": True}, {"text": "It is 4."}]},
    ]
    openai = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "two and two"}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "4"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 4."}]},
    ]
    for turns, arguments in ((anthropic, {"a": 2}), (gemini, {"a": 2}), (openai, '{"a": 2}')):
        call, answer, words = accepted({"prompt": "2+2?", "response": turns}).response
        assert call["tool_calls"][0]["function"] == {"name": "add", "arguments": arguments}
        assert (answer["role"], answer["content"]) in (("tool", "4"), ("tool", '{"result":4}'))
        assert words["content"] == "It is 4."
    assert accepted({"prompt": "2+2?", "response": {"output": openai[3:]}}).response == "It is 4."
    body = {"candidates": [{"content": {"role": "model", "parts": [{"text": "It is 4."}]}}]}
    assert accepted({"prompt": "2+2?", "response": body}).response == "It is 4."


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "refusal", "refusal": "no"}, 3]
)
def test_parts_that_are_no_text_reject_the_row(part):
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}], "response": "b"}
    assert reason(row) == "prompt has the wrong type"


def test_messages_that_are_not_trained_on_say_so():
    turns = [
        {"role": "assistant", "content": "a", "weight": 0},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c", "train": True},
    ]
    assert [one.get("weight") for one in conversation(*turns).response] == [0, None, None]
    row = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "train": False}]}
    assert reason(row) == "no loss in the response"
    row["messages"][1] = {"role": "assistant", "content": "4", "weight": 0.5}
    assert reason(row) == "a message's weight is not 0 or 1"


@pytest.mark.parametrize(
    ("field", "problem"),
    [
        *(({name: 0}, "no loss in the response") for name in ("training", "trainable", "train_on_turn", "loss_mask")),
        ({"loss_weight": 0.0}, "no loss in the response"),
        ({"masked": True}, "no loss in the response"),
        ({"masked": 0.5}, "a message's masked is not true or false"),
        ({"mask": 1}, "a message's mask is not read"),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": False}]},
            "a message's train_detail is not read",
        ),
    ],
)
def test_other_words_for_not_trained_on_are_no_notes(field, problem):
    for turns in (
        [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", **field}],
        [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", **field}],
    ):
        assert reason({"messages": turns}) == problem
    assert accepted({"messages": [*turns[:1], {"from": "gpt", "value": "4", "masked": False}]}).response == "4"


def test_notes_make_no_other_prompt_and_ignored_fields_are_put_aside():
    first, second = (
        {"messages": [{"role": "user", "content": "a", "timestamp": when}, {"role": "assistant", "content": "b"}]}
        for when in ("2024", "2025")
    )
    assert accepted(first).prompt_id == accepted(second).prompt_id
    assert accepted(first).prompt[0]["timestamp"] == "2024"
    row = {"messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]}
    ignored = accepted(row, pool={"messages": {"ignore": ["name"]}})
    assert ignored.prompt == [{"role": "user", "content": "a", "notes": {"name": "Ann"}}]


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "assistant", "content": "4"}]',
        ' {"role": "model", "content": "4"}',
        "[{'role': 'assistant', 'content': '4'}]",
    ],
)
def test_a_response_that_is_messages_as_text_is_these_messages(text):
    assert accepted({"prompt": "2+2?", "response": text}).response == "4"


def test_a_response_that_is_one_message_is_that_message():
    plain = {"role": "assistant", "content": "4", "refusal": None}
    assert accepted({"prompt": "2+2?", "response": plain}).response == "4"
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2"}
    assert accepted({"prompt": "2+2?", "response": thought}).response == [thought]
    assert reason({"prompt": "2+2?", "response": {"role": "user", "content": "4"}}) == "response has the wrong type"


@pytest.mark.parametrize("text", ['{"role": "admin", "content": "4"}', '[{"role": "user"}]', '{"role": "assistant"}'])
def test_other_json_is_a_response_as_it_is(text):
    assert accepted({"prompt": "Give a role as JSON.", "response": text}).response == text


def test_a_chat_message_that_says_it_is_one_keeps_its_fields():
    question, first, out, last = (
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "T", "tool_calls": [CALL["tool_calls"][0]]},
        {"role": "tool", "content": "out", "tool_call_id": "c1", "name": "add"},
        {"role": "assistant", "content": "b", "weight": 0},
    )
    turns = [{"type": "message", **message} for message in (question, first, out, last)]
    assert conversation_of(turns) == ([question], [first, out, last])
    assert accepted({"prompt": "q", "response": turns[1:]}).response == [first, out, last]
    two = [{"type": "message", **last}, {"type": "message", "role": "assistant", "content": "c"}]
    assert conversation_of([question, *two])[1] == [last, {"role": "assistant", "content": "c"}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}]}, {"type": "function_call", "name": "f"}]
    assert [one["content"] for one in conversation_of([question, *parts])[1]] == ["a", ""]
    answer = {"type": "message", **first, "stop_reason": "end_turn"}
    assert accepted({"prompt": "q", "response": answer}).response == [first]


def parts_in_turns(*parts):
    return [*TALK, {"role": "user", "content": list(parts)}, {"role": "assistant", "content": "It is 4."}]


TALK = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "I look."}]


RESULT = {"type": "tool_result", "tool_use_id": "c1"}


def test_a_call_may_stand_one_level_down_and_has_a_name():
    function = {"name": "f", "arguments": "{}"}
    for call in (
        {"type": "tool_call", "id": "c1", "function": function},
        {"type": "function_call", "call_id": "c1", **function},
        {"id": "c1", "text": None, "functionCall": {"name": "f", "args": "{}"}},
    ):
        (message,) = accepted({"prompt": "q", "response": [{"role": "assistant", "content": [call]}]}).response
        assert message["tool_calls"] == [{"id": "c1", "type": "function", "function": function}]
    for call in ({"type": "tool_call", "call": function}, {"type": "tool_use", "name": "", "input": {}}):
        turns = [{"role": "assistant", "content": [call]}]
        assert reason({"prompt": "q", "response": turns}) == "response has the wrong type"


@pytest.mark.parametrize(
    "result",
    [
        {**RESULT, "content": [{"type": "text", "text": "4"}, {"type": "image", "source": {"data": "iVBO"}}]},
        {**RESULT, "type": "function_call_output", "output": [{"type": "input_image", "image_url": "data:"}]},
        {**RESULT, "text": "4"},
        {"functionResponse": {"name": "f", "response": {}, "parts": [{"inlineData": {"data": "iVBO"}}]}},
    ],
)
def test_what_a_tool_answered_is_text_or_rejects_the_row(result):
    with pytest.raises(Unusable, match="conversation has the wrong type"):
        conversation_of(parts_in_turns(result))


@pytest.mark.parametrize(
    ("more", "text"),
    [({}, ""), ({"is_error": True}, ""), ({"content": ["4"]}, "4"), ({"content": [{"a": 4}]}, '[{"a":4}]')],
)
def test_a_tool_may_answer_nothing_or_json(more, text):
    prompt = accepted({"prompt": parts_in_turns({**RESULT, **more})[:-1], "response": "b"}).prompt
    assert prompt[-1] == {"role": "tool", "content": text, "tool_call_id": "c1"}


def test_an_integer_that_a_call_would_have_as_text_is_a_reject():
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": 1, "function": '
    line += f'{{"name": "f", "arguments": {{"n": [{2**64}]}}}}}}]}}], "prompt_id": {2**64}}}'
    row = parse_line(line.encode())
    assert reason(row) == "an integer has more than 64 bits"
    arguments = f'{{"n": [{2**64}]}}'
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = arguments
    assert accepted(row).response[0]["tool_calls"][0]["function"]["arguments"] == arguments
    assert accepted(row).prompt_id == str(2**64)
    tool = parse_line(f'{{"prompt": "a", "response": "b", "tools": [{{"name": "f", "most": {2**64}}}]}}'.encode())
    assert reason(tool) == "an integer has more than 64 bits"
