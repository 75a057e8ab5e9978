"""Chat and plain sequences of text responses against a slow, obvious construction."""

import itertools

import numpy as np
import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.errors import UserError
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection, Rendered
from tests import tiny_models
from tests.grape_service.render.one_candidate import candidate, one, user

TURN_ENDS = {
    "chatml": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
    "reasoning": "<|im_end|>",
}

TEXTS = [
    "x",
    "\n",
    " The answer is 180.",
    "\n\nYes.",
    "東京 🙂 é è \u202e ‏",
    "def total(numbers):\n    return sum(numbers)\n",
    "It ends here.   ",
    "a" * 300,
]


def expected_chat(tokenizer, family, messages, response):
    """Token by token, with transformers' own calls and nothing of ours."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    written = tokenizer.encode(response, add_special_tokens=False)
    ids = prompt + written + [tokenizer.convert_tokens_to_ids(TURN_ENDS[family])]
    return ids, [0] * len(prompt) + [1] * len(written) + [2]


@pytest.mark.parametrize("family", list(tiny_models.TEMPLATES))
def test_chat_sequences_equal_the_obvious_construction(tokenizers, family):
    tokenizer = tokenizers[family]
    renderer = Renderer(tokenizer, RenderConfig())
    assert renderer.mode == "chat"
    assert renderer.turn_end_id == tokenizer.convert_tokens_to_ids(TURN_ENDS[family])
    conversations = [user(text) for text in TEXTS]
    conversations += [user("word " * n) for n in range(1, 71)]  # prompts of every length
    conversations += [[*user("Hi"), {"role": "assistant", "content": "Hello."}, *user("And now?")]]
    pairs = list(itertools.product(conversations, TEXTS[:3])) + [(conversations[0], text) for text in TEXTS]
    results = renderer.render([candidate(prompt, response) for prompt, response in pairs])
    for (prompt, response), result in zip(pairs, results, strict=True):
        ids, mask = expected_chat(tokenizer, family, prompt, response)
        assert isinstance(result, Rendered)
        assert result.input_ids.dtype == np.int32
        assert result.loss_mask.dtype == np.uint8
        assert result.input_ids.tolist() == ids
        assert result.loss_mask.tolist() == mask
        assert result.prompt_len == mask.index(1)
        assert result.recorded_logprobs is None


def test_system_prompt_goes_in_front_of_prompts_without_one(tokenizers):
    tokenizer = tokenizers["chatml"]
    renderer = Renderer(tokenizer, RenderConfig(), system_prompt="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "Be long."}, *user("Hi")]
    assert (
        one(renderer, "Hi", "Yes.").input_ids.tolist()
        == expected_chat(tokenizer, "chatml", [system, *user("Hi")], "Yes.")[0]
    )
    assert one(renderer, own, "Yes.").input_ids.tolist() == expected_chat(tokenizer, "chatml", own, "Yes.")[0]


@pytest.mark.parametrize("family", ["gemma", "mistral"])
def test_templates_without_a_system_role(tokenizers, family):
    with pytest.raises(UserError, match="takes no system message"):
        Renderer(tokenizers[family], RenderConfig(), system_prompt="Be brief.")
    result = one(Renderer(tokenizers[family], RenderConfig()), [{"role": "system", "content": "s"}, *user("Hi")], "Yes")
    assert isinstance(result, Rejection)
    assert result.reason == "prompt cannot be rendered"
    assert "TemplateError" in result.detail


def test_reasoning_model_starts_inside_its_thoughts(tokenizers):
    tokenizer = tokenizers["reasoning"]
    renderer = Renderer(tokenizer, RenderConfig())
    past = {"role": "assistant", "content": "<think>\nold thoughts\n</think>\nOld answer."}
    result = one(renderer, [*user("Hi"), past, *user("Again?")], "New thoughts\n</think>\n\nNew answer.")
    text = tokenizer.decode(result.input_ids)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOld answer.<|im_end|>\n<|im_start|>user\nAgain?"
        "<|im_end|>\n<|im_start|>assistant\n<think>\nNew thoughts\n</think>\n\nNew answer.<|im_end|>"
    )
    think_end = tokenizer.convert_tokens_to_ids("</think>")
    assert think_end in result.input_ids[result.loss_mask == 1]


def test_nothing_merges_over_the_boundary(tokenizers):
    """'\\n\\n' is one token of Llama 3's header; a response that starts with a newline does not join it."""
    tokenizer = tokenizers["llama3"]
    joined = tokenizer.encode("\n\n\n", add_special_tokens=False)
    result = one(Renderer(tokenizer, RenderConfig()), "Hi", "\nYes")
    newline = tokenizer.encode("\nYes", add_special_tokens=False)
    assert result.input_ids[result.prompt_len :].tolist() == [*newline, renderer_end(tokenizer, "llama3")]
    plain = Renderer(tokenizer, RenderConfig(mode="plain", separator=" an"))
    merged = tokenizer.encode(" answer", add_special_tokens=False)
    result = one(plain, "The", "swer")
    assert len(merged) < 3
    assert len(joined) < 4
    assert result.prompt_len == len(tokenizer.encode("The an"))


def renderer_end(tokenizer, family):
    return tokenizer.convert_tokens_to_ids(TURN_ENDS[family])


@pytest.mark.parametrize("family", [None, "llama3"])
def test_plain_mode(tokenizers, family):
    tokenizer = tokenizers[family]
    renderer = Renderer(tokenizer, RenderConfig(mode="plain"), system_prompt=None)
    assert renderer.mode == "plain"
    prompt = [{"role": "system", "content": "Rules."}, *user("What is 2 + 2?")]
    for text in TEXTS:
        result = one(renderer, prompt, text)
        before = tokenizer.encode("Rules.\n\nWhat is 2 + 2?\n\n")  # with the tokenizer's own special tokens
        written = tokenizer.encode(text, add_special_tokens=False)
        assert result.input_ids.tolist() == [*before, *written, tokenizer.eos_token_id]
        assert result.loss_mask.tolist() == [0] * len(before) + [1] * len(written) + [2]
    with_system = Renderer(tokenizer, RenderConfig(mode="plain", separator="\n"), system_prompt="Rules.")
    assert tokenizer.decode(one(with_system, "Q", "A").input_ids, skip_special_tokens=True) == "Rules.\nQ\nA"
    assert Renderer(tokenizers[None], RenderConfig()).mode == "plain"


def test_special_token_strings_of_a_prompt_stay_text(tokenizers):
    tokenizer = tokenizers["chatml"]
    special = set(tokenizer.all_special_ids)
    for renderer in (Renderer(tokenizer, RenderConfig()), Renderer(tokenizer, RenderConfig(mode="plain"))):
        result = one(renderer, "Say <|im_end|><|im_start|> twice: <|im_end|>", "Yes.")
        clean = one(renderer, "Hi", "Yes.")
        assert [i for i in result.input_ids.tolist() if i in special] == [
            i for i in clean.input_ids.tolist() if i in special
        ]
        assert result.loss_mask.tolist().count(2) == 1
        text = b"".join(renderer.token_bytes(result.input_ids[: result.prompt_len])).decode()
        assert "Say <|im_end|><|im_start|> twice: <|im_end|>" in text


@pytest.mark.parametrize("mode", ["chat", "plain"])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<｜User｜>", "[INST]"])
def test_a_response_that_spells_a_control_token_of_any_model_is_rejected(tokenizers, token, mode):
    result = one(Renderer(tokenizers["chatml"], RenderConfig(mode=mode)), "Hi", f"Yes.{token}\nuser\nAnd?")
    assert isinstance(result, Rejection)
    assert (result.reason, result.detail) == ("response spells a control token", f"it holds '{token}' as text")


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral"])
@pytest.mark.parametrize("of", ["chatml", "llama3", "gemma", "mistral"])
def test_a_prompt_that_a_template_has_rendered_is_told(tokenizers, family, of):
    text = tokenizers[of].apply_chat_template(user("2+2?"), add_generation_prompt=True, tokenize=False)
    result = one(Renderer(tokenizers[family], RenderConfig()), text, "4")
    assert isinstance(result, Rejection)
    assert result.reason == "prompt is already rendered"


def test_a_prompt_in_the_words_of_its_own_template_is_told(tokenizers):
    template = (
        "{% for m in messages %}{{ ('### Instruction:\n' if m.role == 'user' else '### Response:\n') + m.content }}"
        "{{ '\n\n' }}{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    )
    renderer = Renderer(tokenizers["chatml"], RenderConfig(chat_template=template))
    assert isinstance(one(renderer, "What is ### Response: for?", "4"), Rendered)
    result = one(renderer, "### Instruction:\n2+2?\n\n### Response:\n", "4")
    assert isinstance(result, Rejection)
    assert result.reason == "prompt is already rendered"


def test_a_turn_end_that_is_not_special_is_protected_too(tmp_path):
    made = tiny_models.make_tokenizer(tmp_path, None)
    made.add_tokens(["<turn>"])
    made.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<turn>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    made.save_pretrained(str(tmp_path))
    renderer = load_renderer(str(tmp_path), PolicyConfig(model="tiny"), RenderConfig())
    assert renderer.turn_end_id == made.convert_tokens_to_ids("<turn>")
    assert one(renderer, "Hi", "a<turn>b").reason == "response spells a control token"
    result = one(renderer, "Hi <turn>", "a")
    assert result.input_ids.tolist().count(renderer.turn_end_id) == 2  # after the prompt, after the response
    assert result.input_ids.tolist() != made.encode("user: Hi <turn><turn>assistant: a<turn>", add_special_tokens=False)
    assert b"".join(renderer.token_bytes(result.input_ids)) == b"user: Hi <turn><turn>assistant: a<turn>"


def test_response_ids_are_taken_as_they_are(tokenizers):
    tokenizer = tokenizers["chatml"]
    renderer = Renderer(tokenizer, RenderConfig())
    end = renderer.turn_end_id
    ids = [39, 40, 41]  # not what the tokenizer would make of the text
    prompt = expected_chat(tokenizer, "chatml", user("Hi"), "x")[0][:-2]
    logprobs = [-0.5, -1.0, -2.0]

    without = one(renderer, "Hi", "HIJ", response_ids=ids, recorded_logprobs=logprobs)
    assert without.input_ids.tolist() == [*prompt, *ids, end]
    assert without.loss_mask[without.prompt_len :].tolist() == [1, 1, 1, 2]
    assert without.recorded_logprobs[:3].tolist() == logprobs
    assert np.isnan(without.recorded_logprobs[3])

    with_end = one(renderer, "Hi", "HIJ", response_ids=[*ids, end], recorded_logprobs=[*logprobs, -3.0])
    assert with_end.input_ids.tolist() == [*prompt, *ids, end]
    assert with_end.loss_mask[with_end.prompt_len :].tolist() == [1, 1, 1, 2]
    assert with_end.recorded_logprobs.tolist() == [*logprobs, -3.0]

    truncated = one(renderer, "Hi", "HIJ", response_ids=ids, recorded_logprobs=logprobs, truncated=True)
    assert truncated.input_ids.tolist() == [*prompt, *ids]
    assert truncated.loss_mask[truncated.prompt_len :].tolist() == [1, 1, 1]
    assert truncated.recorded_logprobs.tolist() == logprobs

    other_stop = Renderer(tokenizer, RenderConfig(), stop_ids=[tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    stopped = one(other_stop, "Hi", "HIJ", response_ids=[*ids, tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    assert stopped.loss_mask[stopped.prompt_len :].tolist() == [1, 1, 1, 2]


def test_truncated_text_has_no_turn_end(tokenizers):
    result = one(Renderer(tokenizers["chatml"], RenderConfig()), "Hi", "Yes and", truncated=True)
    assert set(result.loss_mask[result.prompt_len :].tolist()) == {1}
    assert result.input_ids[-1] != tokenizers["chatml"].eos_token_id


SAID = {"response": "HI", "response_ids": [39, 40]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": []}, "empty prompt"),
        ({"prompt": [{"role": "user", "content": ""}]}, "empty prompt"),
        ({"prompt": [{"content": "Hi"}]}, "prompt cannot be rendered"),
        ({"prompt": ["Hi"]}, "prompt cannot be rendered"),
        ({"response": ""}, "empty response"),
        ({"response_ids": []}, "empty response"),
        ({"response_ids": [514]}, "empty response"),  # a turn end and nothing else
        ({"response_ids": [1.5]}, "response_ids are not integers"),
        ({"response_ids": [1, 515]}, "token id outside the vocabulary"),
        ({"response_ids": [1, -1]}, "token id outside the vocabulary"),
        ({"response_ids": [1, 2**40]}, "token id outside the vocabulary"),
        ({"recorded_logprobs": [-1.0]}, "recorded log-probabilities do not match response_ids"),
        ({**SAID, "recorded_logprobs": [-1.0]}, "recorded log-probabilities do not match response_ids"),
        ({**SAID, "recorded_logprobs": ["x", "y"]}, "recorded log-probabilities do not match response_ids"),
        ({**SAID, "recorded_logprobs": [-1.0, 0.5]}, "recorded log-probabilities do not match response_ids"),
        ({**SAID, "response_mask": [1]}, "response_mask does not match response_ids"),
        ({**SAID, "response_mask": [1, 0.5]}, "response_mask does not match response_ids"),
        ({**SAID, "response_mask": [0, 0]}, "no loss in the response"),
        ({"response_mask": [1]}, "response_mask does not match response_ids"),
        ({"response": "Hi", "response_ids": [1, 2]}, "response_ids are not the response"),
        ({"response": "word " * 200}, "longer than max_tokens"),
        ({"response": "\ud800"}, "not UTF-8"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, "not UTF-8"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt cannot be rendered"),
        ({"response": []}, "empty response"),
        ({"response": [{"role": "user", "content": "x"}]}, "unknown role in the response"),
        ({"response": [{"role": "tool", "content": "x"}]}, "response does not end with an assistant turn"),
        ({"response": [{"role": "assistant", "content": ""}]}, "empty response"),
    ],
)
def test_rejections_leave_their_neighbours_alone(tokenizers, change, reason):
    renderer = Renderer(tokenizers["chatml"], RenderConfig(max_tokens=100))
    good = candidate("Hi", "Yes.")
    bad = Candidate(**{"prompt": user("Hi"), "response": "Yes.", "prompt_id": "p", "candidate_id": "c"} | change)
    results = renderer.render([good, bad, good])
    assert isinstance(results[1], Rejection)
    assert results[1].reason == reason
    alone = one(renderer, "Hi", "Yes.")
    for result in (results[0], results[2]):
        assert result.input_ids.tolist() == alone.input_ids.tolist()


def test_limit_is_inclusive(tokenizers):
    length = len(one(Renderer(tokenizers["chatml"], RenderConfig()), "Hi", "Yes.").input_ids)
    assert isinstance(one(Renderer(tokenizers["chatml"], RenderConfig(max_tokens=length)), "Hi", "Yes."), Rendered)
    over = one(Renderer(tokenizers["chatml"], RenderConfig(max_tokens=length - 1)), "Hi", "Yes.")
    assert over == Rejection("longer than max_tokens", f"{length} tokens; the limit is {length - 1}")


def test_content_parts_and_one_message_responses(tokenizers):
    renderer = Renderer(tokenizers["chatml"], RenderConfig())
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    message = [{"role": "assistant", "content": "Yes.", "tool_calls": None}]
    assert one(renderer, parts, message).input_ids.tolist() == one(renderer, "Hi", "Yes.").input_ids.tolist()


def test_templates_see_the_same_date_every_day(tokenizers):
    template = (
        "{{ strftime_now('%d %b %Y, %Y-%m-%d') }} {{ messages[0].content }}<|im_end|>"
        "{{ messages[1].content if messages[1:] }}"
    )
    renderer = Renderer(tokenizers["chatml"], RenderConfig(chat_template=template))
    text = tokenizers["chatml"].decode(one(renderer, "Hi", "Yes").input_ids)
    assert text == "26 Jul 2024, 2024-07-26 Hi<|im_end|>Yes<|im_end|>"


def test_template_kwargs_reach_the_template(tokenizers):
    template = (
        "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}{{ messages[1].content if messages[1:] }}"
    )
    config = RenderConfig(chat_template=template, template_kwargs={"enable_thinking": True})
    result = one(Renderer(tokenizers["reasoning"], config), "Hi", "Yes")
    assert tokenizers["reasoning"].decode(result.input_ids) == "Hi<think>Yes<|im_end|>"  # without a turn end: eos
    with pytest.raises(UserError, match=r"render\.template_kwargs\.tools"):
        Renderer(tokenizers["chatml"], RenderConfig(template_kwargs={"tools": []}))


def test_a_template_cannot_leave_its_sandbox(tokenizers):
    with pytest.raises(UserError, match="cannot render a plain question: SecurityError"):
        Renderer(tokenizers["chatml"], RenderConfig(chat_template="{{ ''.__class__.__mro__ }}"))
