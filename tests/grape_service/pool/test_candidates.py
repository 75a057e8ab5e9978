import pytest

from grape_service.pool.candidates import Accepted, Filtered, Normaliser, Rejected, recorded_columns
from grape_service.rows.keys import candidate_id_of, prompt_id_of
from tests.prepared_pools import make_config

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": [{"type": "text", "text": "2 + 2?"}, {"type": "text", "text": "Now."}]},
]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "{}"}}]}
TRAJECTORY = [CALL, {"role": "tool", "content": "4", "name": "add"}, {"role": "assistant", "content": "It is 4."}]


def normalise(row, **keys):
    return list(Normaliser(make_config("pool.jsonl", **keys)).candidates(row))


def accepted(row, **keys):
    (item,) = normalise(row, **keys)
    assert isinstance(item, Accepted), item
    return item.candidate


def reason(row, **keys):
    (item,) = normalise(row, **keys)
    assert isinstance(item, Rejected), item
    return item.rejection.reason


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
        ({"prompt": CHAT[:3], "response": "b"}, "prompt does not end with a user or tool turn"),
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
            {"prompt": "a", "response": "b", "response_ids": [1], "behavior_logprobs": [None]},
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
