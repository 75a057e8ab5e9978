"""Two policies, one response: own contexts, shared tokens with loss; and when that is possible at all."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from grape_service.config.schema import RenderConfig
from grape_service.models.vocabulary import incompatible_ids
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection
from tests import tiny_models

RESPONSES = [
    "x",
    " The answer is 180.\n",
    [
        {"role": "assistant", "content": "I look it up."},
        {"role": "tool", "content": "180"},
        {"role": "assistant", "content": "It is 180."},
    ],
]


def candidates(responses, **over):
    prompt = [{"role": "user", "content": "How many eggs?"}]
    return [
        Candidate(prompt=prompt, response=response, prompt_id="p", candidate_id=str(index), **over)
        for index, response in enumerate(responses)
    ]


def with_loss(rendered):
    return rendered.input_ids[rendered.loss_mask > 0], rendered.loss_mask[rendered.loss_mask > 0]


def test_the_target_itself_as_behavior_gives_the_same_rows(tokenizers):
    renderer = Renderer(tokenizers["chatml"], RenderConfig())
    rows = [*candidates(RESPONSES), *candidates(["cut"], truncated=True), *candidates(["A"], response_ids=[32])]
    targets = renderer.render(rows)
    for target, own in zip(targets, renderer.render_behavior(rows, targets, renderer.turn_end_id), strict=True):
        assert own.input_ids.tolist() == target.input_ids.tolist()
        assert own.loss_mask.tolist() == target.loss_mask.tolist()
        assert own.prompt_len == target.prompt_len


@pytest.mark.parametrize(("target_name", "behavior_name"), [("chatml", "llama3"), ("llama3", "chatml")])
def test_own_contexts_shared_tokens_own_turn_ends(tokenizers, target_name, behavior_name):
    target = Renderer(tokenizers[target_name], RenderConfig())
    behavior = Renderer(tokenizers[behavior_name], RenderConfig(), system_prompt="Be brief.")
    rows = candidates(RESPONSES)
    targets = target.render(rows)
    # The behavior policy's own rendering has the same text here, so it is what must come out.
    own_rows = behavior.render(rows)
    shared = behavior.render_behavior(rows, targets, target.turn_end_id)
    for theirs, ours, expected in zip(targets, shared, own_rows, strict=True):
        assert ours.input_ids.tolist() == expected.input_ids.tolist()
        assert ours.loss_mask.tolist() == expected.loss_mask.tolist()
        their_ids, their_mask = with_loss(theirs)
        our_ids, our_mask = with_loss(ours)
        assert our_mask.tolist() == their_mask.tolist()
        assert our_ids[our_mask == 1].tolist() == their_ids[their_mask == 1].tolist()
        assert set(our_ids[our_mask == 2].tolist()) == {behavior.turn_end_id}


def test_response_ids_are_shared_even_where_the_text_has_other_tokens(tokenizers):
    target = Renderer(tokenizers["chatml"], RenderConfig())
    behavior = Renderer(tokenizers["mistral"], RenderConfig())
    rows = candidates(["The"], response_ids=[51, 71, 68], recorded_logprobs=[-1.0, -1.0, -1.0])
    targets = target.render(rows)
    [ours] = behavior.render_behavior(rows, targets, target.turn_end_id)
    assert ours.input_ids[ours.prompt_len :].tolist() == [51, 71, 68, behavior.turn_end_id]
    assert ours.recorded_logprobs is None


def test_a_behavior_that_cannot_follow_is_rejected(tokenizers):
    target = Renderer(tokenizers["chatml"], RenderConfig())
    rows = candidates(RESPONSES[2:])
    targets = target.render(rows)
    [refused] = Renderer(tokenizers["mistral"], RenderConfig()).render_behavior(rows, targets, target.turn_end_id)
    assert isinstance(refused, Rejection)
    assert refused.reason == "response cannot be rendered"
    [plain] = Renderer(tokenizers[None], RenderConfig()).render_behavior(rows, targets, target.turn_end_id)
    assert plain.reason == "messages need a chat template"
    rows = candidates(["</think>x"], response_ids=[516, 87])
    reasoning = Renderer(tokenizers["reasoning"], RenderConfig())
    targets = reasoning.render(rows)
    [unknown] = target.render_behavior(rows, targets, reasoning.turn_end_id)
    assert unknown.reason == "token id outside the vocabulary"
    [long] = Renderer(tokenizers["chatml"], RenderConfig(max_tokens=4)).render_behavior(
        candidates(["x"]), target.render(candidates(["x"])), target.turn_end_id
    )
    assert long.reason == "longer than max_tokens"


def test_plain_target_and_chat_behavior(tokenizers):
    target = Renderer(tokenizers["llama3"], RenderConfig(mode="plain"))
    behavior = Renderer(tokenizers["llama3"], RenderConfig())
    rows = candidates(RESPONSES[:2])
    targets = target.render(rows)
    assert target.turn_end_id != behavior.turn_end_id
    for ours, expected in zip(
        behavior.render_behavior(rows, targets, target.turn_end_id), behavior.render(rows), strict=True
    ):
        assert ours.input_ids.tolist() == expected.input_ids.tolist()


def test_incompatible_ids(tokenizers, tmp_path):
    chatml, llama3 = (Renderer(tokenizers[name], RenderConfig()) for name in ("chatml", "llama3"))
    plain = Renderer(tokenizers["chatml"], RenderConfig(mode="plain"))
    used = np.arange(512, dtype=np.int32)
    assert incompatible_ids(chatml.vocabulary, llama3.vocabulary, used) == []
    assert incompatible_ids(chatml.vocabulary, llama3.vocabulary, np.array([512, 3, 513, 512])) == [
        512,
        513,
    ]  # other special tokens
    assert incompatible_ids(chatml.vocabulary, plain.vocabulary, np.arange(600)) == []
    tiny_models.make_tokenizer(tmp_path, "chatml", corpus=["Other words make other merges, of course."] * 3)
    other = Renderer(AutoTokenizer.from_pretrained(str(tmp_path)), RenderConfig())
    different = incompatible_ids(chatml.vocabulary, other.vocabulary, used)
    assert different
    assert min(different) >= 256  # the bytes are the same in both
    for id_ in used.tolist():
        same = tokenizers["chatml"].convert_ids_to_tokens(id_) == other.tokenizer.convert_ids_to_tokens(id_)
        assert same == (id_ not in different)
