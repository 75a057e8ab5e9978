import pytest

from grape_service.pool.candidates import Normaliser, recorded_columns
from grape_service.pool.outcomes import Accepted, Filtered, Rejected
from grape_service.rows.keys import candidate_id_of, prompt_id_of
from tests.grape_service.pool.one_row import CALL, accepted, normalise, reason
from tests.prepared_pools import make_config

pytestmark = pytest.mark.quick

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}, {"type": "text", "text": "Now."}]},
]
TRAJECTORY = [CALL, {"role": "tool", "content": "4", "name": "add"}, {"role": "assistant", "content": "It is 4."}]


def test_texts_become_a_chat_and_ids_are_derived():
    candidate = accepted({"prompt": "2 + 2?", "response": "4", "source": "a", "level": 3, "note": None})
    assert candidate.prompt == [{"role": "user", "content": "2 + 2?"}]
    assert candidate.response == "4"
    assert candidate.prompt_id == prompt_id_of(candidate.prompt)
    assert candidate.candidate_id == candidate_id_of(candidate.prompt_id, "a", "4")
    assert candidate.other == {"level": 3, "note": None}
    assert not candidate.truncated


def test_chat_prompts_and_trajectories_keep_their_messages():
    candidate = accepted({"prompt": CHAT, "response": TRAJECTORY, "tools": '[{"name": "add"}]'})
    assert candidate.prompt[:3] == CHAT[:3]
    assert candidate.prompt[3] == {"role": "user", "content": "2 + 2?\nNow."}
    assert candidate.response == [{**CALL, "content": ""}, *TRAJECTORY[1:]]
    assert candidate.tools == [{"name": "add"}]


def test_columns_under_other_names():
    columns = {"prompt": "instruction", "response": "output", "source": "generator", "prompt_id": "id"}
    row = {"instruction": "a", "output": "b", "generator": "g", "id": 7, "prompt": "theirs", "source": "web"}
    candidate = accepted(row, pool={"columns": columns})
    assert (candidate.prompt[0]["content"], candidate.response, candidate.source) == ("a", "b", "g")
    assert candidate.prompt_id == "7"
    assert candidate.other == {"prompt": "theirs", "source": "web"}


@pytest.mark.parametrize(("given", "text"), [("x", "x"), (12, "12"), (3.0, "3"), ("01", "01")])
def test_given_ids_become_text(given, text):
    candidate = accepted({"prompt": "a", "response": "b", "prompt_id": given, "candidate_id": given})
    assert (candidate.prompt_id, candidate.candidate_id) == (text, text)


@pytest.mark.parametrize("missing", [None, "", float("nan")])
def test_an_id_that_is_missing_is_derived(missing):
    candidate = accepted({"prompt": "a", "response": "b", "prompt_id": missing, "candidate_id": missing})
    assert len(candidate.prompt_id) == len(candidate.candidate_id) == 32


def test_a_list_of_responses_is_as_many_candidates():
    row = {
        "prompt": "a",
        "source": "row",
        "level": 1,
        "correct": None,
        "responses": ["x", {"response": "y", "source": "own", "correct": True}, {"output": "z"}, "", TRAJECTORY],
    }
    items = normalise(row, pool={"columns": {"response": "output"}})
    assert [type(item) for item in items] == [Accepted, Accepted, Accepted, Rejected, Accepted]
    candidates = [item.candidate for item in items if isinstance(item, Accepted)]
    assert [candidate.response for candidate in candidates[:3]] == ["x", "y", "z"]
    assert [candidate.source for candidate in candidates] == ["row", "own", "row", "row"]
    assert [candidate.other for candidate in candidates[:2]] == [
        {"level": 1, "correct": None},
        {"level": 1, "correct": True},
    ]
    assert len({candidate.prompt_id for candidate in candidates}) == 1


def test_filters_look_at_each_candidate_of_a_list():
    row = {"prompt": "a", "responses": ["x", {"response": "y", "ok": False}, {"response": "z", "ok": True}]}
    items = normalise(row, pool={"where": [{"column": "ok", "equals": True}]})
    assert [type(item) for item in items] == [Filtered, Filtered, Accepted]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"response": "b"}, "missing prompt"),
        ({"prompt": " \n", "response": "b"}, "empty prompt"),
        ({"prompt": [], "response": "b"}, "empty prompt"),
        ({"prompt": [{"role": "user", "content": ""}], "response": "b"}, "empty prompt"),
        ({"prompt": 5, "response": "b"}, "prompt has the wrong type"),
        ({"prompt": ["a"], "response": "b"}, "prompt has the wrong type"),
        ({"prompt": [{"content": "a"}], "response": "b"}, "prompt has the wrong type"),
        ({"prompt": [{"role": "user", "content": {"text": "a"}}], "response": "b"}, "prompt has the wrong type"),
        ({"prompt": [{"role": "user", "content": [{"image": "x"}]}], "response": "b"}, "prompt has the wrong type"),
        ({"prompt": [{"role": "human", "content": "a"}], "response": "b"}, "unknown role in the prompt"),
        ({"prompt": [CHAT[0]], "response": "b"}, "prompt does not end with a user or tool turn"),
        ({"prompt": [CHAT[0], CHAT[2]], "response": "b"}, "prompt does not end with a user or tool turn"),
        ({"prompt": [*CHAT[:3], CHAT[2]], "response": "b"}, "prompt does not end with a user or tool turn"),
        ({"prompt": "a"}, "missing response"),
        ({"prompt": "a", "response": None, "responses": None}, "missing response"),
        ({"prompt": "a", "response": "\t"}, "empty response"),
        ({"prompt": "a", "response": []}, "empty response"),
        ({"prompt": "a", "response": [{"role": "assistant", "content": " "}]}, "empty response"),
        ({"prompt": "a", "response": {"text": "b"}}, "response has the wrong type"),
        ({"prompt": "a", "response": [*TRAJECTORY, CHAT[1]]}, "unknown role in the response"),
        ({"prompt": "a", "responses": []}, "missing response"),
        ({"prompt": "a", "responses": "b"}, "responses are not a list"),
        ({"prompt": "a", "responses": ["b"], "response": "c"}, "both response and responses"),
        ({"prompt": "", "responses": ["b", "c"]}, "empty prompt"),
        ({"prompt": "a", "response": "b", "source": ["x"]}, "source has the wrong type"),
        ({"prompt": "a", "response": "b", "prompt_id": True}, "prompt_id has the wrong type"),
        ({"prompt": "a", "response": "b", "candidate_id": 1.5}, "candidate_id has the wrong type"),
        ({"prompt": "a", "response": "b", "finish_reason": "length"}, "truncated"),
        ({"prompt": "a", "response": "b", "tools": "{"}, "tools are not a list of objects"),
        ({"prompt": "a", "response": "b", "tools": ["x"]}, "tools are not a list of objects"),
        ({"prompt": "a", "response": "b", "response_ids": [1, "2"]}, "response_ids are not integers"),
        ({"prompt": "a", "response": "b", "response_ids": [1, True]}, "response_ids are not integers"),
        ({"prompt": "a", "response": "b", "response_ids": "1 2"}, "response_ids are not integers"),
        (
            {"prompt": "a", "response": "b", "response_ids": [1], "behavior_logprobs": [[-1.0]]},
            "recorded log-probabilities do not match response_ids",
        ),
        ({"prompt": "a", "response": "b", "sampling": "hot"}, "sampling is not an object"),
        ({"prompt": "a", "response": "b", "sampling": [1]}, "sampling is not an object"),
        ({"prompt": "a", "response": "b", "sampling": {"temperature": "hot"}}, "sampling settings are not numbers"),
        ({"prompt": "a", "response": "b", "sampling": {"temperature": -1}}, "sampling settings are not numbers"),
    ],
)
def test_each_thing_that_makes_a_row_unusable_has_its_reason(row, expected):
    assert reason(row) == expected


def test_a_rejected_row_is_named_by_the_ids_it_has():
    (item,) = normalise({"prompt_id": "p", "candidate_id": 3, "prompt": "a"})
    assert (item.prompt_id, item.candidate_id) == ("p", "3")


def test_truncated_responses_may_be_kept():
    row = {"prompt": "a", "response": "b", "finish_reason": "length"}
    assert accepted(row, pool={"truncated": "keep"}).truncated
    assert not accepted({**row, "finish_reason": "stop"}).truncated


def test_what_was_recorded_comes_from_the_column_of_the_source():
    behavior = {"sources": {"a": {"column": "lp_a"}, "b": {"column": "behavior_logprobs"}, "c": {"model": "m"}}}
    keys = {"behavior": behavior, "pool": {"columns": {"behavior_logprobs": "logp"}}}
    row = {"prompt": "p", "response": "r", "response_ids": [5], "lp_a": [-1], "logp": [-2.0], "behavior_logprobs": 0}
    assert recorded_columns(make_config("pool.jsonl", **keys)) == {"lp_a", "logp"}
    recorded = {name: accepted({**row, "source": name}, **keys).recorded_logprobs for name in "abcd"}
    assert recorded == {"a": [-1], "b": [-2.0], "c": [-2.0], "d": [-2.0]}
    assert accepted({**row, "source": "a"}, **keys).other == {"behavior_logprobs": 0}


def test_of_the_sampling_settings_those_that_change_probabilities_are_kept():
    row = {"prompt": "p", "response": "r", "sampling": '{"top_p": 0.9, "seed": 4, "temperature": 0.7, "top_k": -1}'}
    assert accepted(row).sampling == {"temperature": 0.7, "top_p": 0.9, "top_k": -1}
    assert accepted({**row, "sampling": {"seed": 1}}).sampling is None


def test_a_response_that_is_an_object_may_call_its_mask_otherwise():
    candidate = {"role": "assistant", "content": "It is 4.", "response_ids": [5, 6, 7], "loss_mask": [1, 1, 0]}
    row = {"prompt": "2+2?", "candidates": [candidate]}
    assert accepted(row).response_mask == [1, 1, 0]
    carried = accepted(row, pool={"carry": ["loss_mask"]})
    assert carried.response_mask is None
    assert carried.other == {"loss_mask": [1, 1, 0]}
    row = {"prompt": "2+2?", "candidates": [{"text": "4", "sampling_params": {"temperature": 0.5}}]}
    assert accepted(row).sampling == {"temperature": 0.5}
    assert accepted(row).other == {"sampling_params": {"temperature": 0.5}}


def test_further_fields_of_a_candidate_are_columns():
    row = {"prompt": "a", "responses": [{"role": "assistant", "content": "b", "model": "m", "reward": 0.5}]}
    found = accepted(row)
    assert (found.response, found.other.get("reward")) == ("b", 0.5)
    assert "m" in (found.source, found.other.get("model"))


def test_an_answer_beside_a_response_stays_a_column_of_its_own():
    elements = [
        {"message": {"role": "assistant", "content": "It is 4."}, "answer": "4", "text": "t", "index": 0},
        {"role": "assistant", "content": "It is 4.", "answer": "4", "text": "t"},
        {"content": "It is 4.", "answer": "4"},
        {"text": "It is 4.", "answer": "4"},
        {"response": "It is 4.", "answer": "4", "text": "t"},
    ]
    for element in elements:
        found = accepted({"prompt": "2+2?", "responses": [element]})
        assert found.response == "It is 4.", element
        rest = {name: element[name] for name in ("answer", "text") if element.get(name, "It is 4.") != "It is 4."}
        assert found.other == rest
    assert accepted({"prompt": "2+2?", "responses": [{"answer": "4"}]}).response == "4"
    both = {"message": {"role": "assistant", "content": "a"}, "response": "b"}
    assert reason({"prompt": "q", "responses": [both]}) == "both response and message"


def test_a_limit_of_tokens_is_seen_beside_a_finish_reason_that_is_null():
    element = {"text": "a", "finish_reason": None, "stop_reason": "max_tokens"}
    assert reason({"prompt": "q", "responses": [element]}) == "truncated"


def test_a_prompt_alone_has_what_its_row_says_of_the_prompt():
    keys = {"pool": {"shape": "prompts"}}
    row = {"instruction": "Sum these.", "input": "2 and 2", "generations": [], "level": 1}
    found = accepted(row, pool={"shape": "prompts", "columns": {"responses": "generations"}})
    assert found.prompt == [{"role": "user", "content": "Sum these.\n\n2 and 2"}]
    assert found.other == {"level": 1}
    dotted = {"columns": {"prompt": "task.text", "system_prompt": "task.system", "prompt_id": "meta.id"}}
    nested = {"task": {"text": "2+2?", "system": "Be brief."}, "meta": {"id": 7}, "responses": []}
    found = accepted(nested, pool={"shape": "prompts", **dotted})
    assert [message["content"] for message in found.prompt] == ["Be brief.", "2+2?"]
    assert found.prompt_id == "7"
    pair = {"prompt": "q", "response_a": None, "response_b": None, "source": "row"}
    assert accepted(pair, **keys).prompt == [{"role": "user", "content": "q"}]
    assert reason({"prompt": "q", "images": ["cat.png"]}, **keys) == "needs images, video or sound"
    for name, value, seen in (("history", [["a", "b"]], 1), ("functions", [{"name": "f"}], 1), ("logprobs", [-1], 0)):
        normaliser = Normaliser(make_config("pool.jsonl", **keys))
        list(normaliser.candidates({"prompt": "q", name: value}))
        assert len(normaliser.unread.counts) == seen, name


def test_lists_as_python_writes_them_are_dealt_and_those_of_numpy_are_told():
    row = {"prompt": "2+2?", "responses": "['4', '5']", "correct": "[True, False]"}
    both = normalise(row, pool={"where": [{"column": "correct", "equals": True}]})
    assert [type(one) for one in both] == [Accepted, Filtered]
    assert both[0].candidate.response == "4"
    for text in ("['4' '5']", "['4'\n '5']", "[{'4'}, {'5'}]", f"['4', {2**64}]"):
        assert reason({**row, "responses": text}) == "responses are not a list"
    assert accepted({"prompt": "2+2?", "response": "['4', '5']"}).response == "['4', '5']"


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "2+2?",
            "chosen": {"role": "assistant", "content": "4"},
            "rejected": {"role": "model", "content": "5"},
        },
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
        {"prompt": "2+2?", "response_a": {"role": "assistant", "content": "4"}, "response_b": "5"},
    ],
)
def test_pairs_of_one_message_each_are_read(row):
    chosen, rejected = (one.candidate for one in normalise(row))
    assert (chosen.response, rejected.response) == ("4", "5")
    assert chosen.prompt == rejected.prompt == [{"role": "user", "content": "2+2?"}]


@pytest.mark.parametrize(
    "said",
    [
        {"details": {"finish_reason": "length", "generated_tokens": 5}},
        {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}},
        {"meta": {"finish_reason": "max_tokens"}},
        {"is_truncated": True},
        {"truncated": "True"},
        {"truncated": True, "finish_reason": "stop"},
    ],
)
def test_a_limit_of_tokens_is_seen_where_servers_say_it(said):
    row = {"prompt": "a", "response": "b", **said}
    assert reason(row) == "truncated"
    assert reason({"prompt": "a", "responses": [{"text": "b", **said}]}) == "truncated"
    assert not accepted(row, pool={"carry": [name for name in said if name != "finish_reason"]}).truncated
    assert not accepted({"prompt": "a", "response": "b", "details": {}, "truncated": False, "meta": "x"}).truncated


def test_a_system_prompt_that_is_no_text_is_a_reject():
    assert reason({"prompt": "a", "response": "b", "system": ["s"]}) == "system_prompt has the wrong type"
    assert accepted({"prompt": "a", "response": "b", "system": []}).prompt[0]["role"] == "user"


def test_a_response_beside_messages_that_end_with_another_is_a_reject():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "response": "c"}
    assert reason(row) == "both response and messages"
    for same in ("b", " b<|im_end|>", None, ""):
        assert accepted({**row, "response": same}).response == "b"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    turns = [row["messages"][0], call, {"role": "tool", "content": "1"}, row["messages"][1]]
    assert len(accepted({"messages": turns, "response": "b"}).response) == 3
    assert accepted(row, pool={"carry": ["response"]}).response == "b"
