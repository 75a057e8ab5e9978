"""A renderer from the folder of a model, and the digest that names it."""

import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.errors import StageError, UserError
from grape_service.render.loading import load_renderer, load_same_renderer
from grape_service.render.renderer import Renderer
from tests import tiny_models
from tests.grape_service.render.one_candidate import one


def test_user_errors(tokenizers, tmp_path):
    with pytest.raises(UserError, match=r"render\.mode is chat"):
        Renderer(tokenizers[None], RenderConfig(mode="chat"))
    with pytest.raises(UserError, match=r"render\.chat_template is not a template"):
        Renderer(tokenizers["chatml"], RenderConfig(chat_template="{% for %}"))
    with pytest.raises(UserError, match="no folder"):
        load_renderer(str(tmp_path / "none"), PolicyConfig(model="m"), RenderConfig())
    with pytest.raises(UserError, match="no tokenizer"):
        load_renderer(str(tmp_path), PolicyConfig(model="m"), RenderConfig())


def test_loading_takes_limit_and_stops_from_the_folder(tmp_path):
    folder = tiny_models.make_model(tmp_path, max_position_embeddings=64)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [512, 514]}')
    renderer = load_renderer(folder, PolicyConfig(model="m"), RenderConfig())
    assert renderer.max_tokens == 64
    assert renderer.stop_ids == {512, 514}
    assert load_renderer(folder, PolicyConfig(model="m"), RenderConfig(max_tokens=32)).max_tokens == 32
    assert load_renderer(folder, PolicyConfig(model="m"), RenderConfig()) is renderer
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 514}')
    assert load_renderer(folder, PolicyConfig(model="m"), RenderConfig()).stop_ids == {514}


def test_another_policy_keeps_its_own_template(tmp_path):
    config = RenderConfig(
        chat_template="{{ messages[0].content + '<|eot_id|>' }}{{ messages[1].content if messages[1:] }}"
    )
    tiny_models.make_tokenizer(tmp_path / "chat", "llama3")
    tiny_models.make_tokenizer(tmp_path / "base", None)
    policy = PolicyConfig(model="m")
    chat = load_renderer(str(tmp_path / "chat"), policy, config, own_template=True)
    assert chat.digest() == load_renderer(str(tmp_path / "chat"), policy, RenderConfig()).digest()
    assert chat.digest() != load_renderer(str(tmp_path / "chat"), policy, config).digest()
    base = load_renderer(str(tmp_path / "base"), policy, config, own_template=True)
    assert base.mode == "chat"
    assert load_same_renderer(chat.digest(), str(tmp_path / "chat"), policy, config, own_template=True) is chat
    with pytest.raises(StageError, match=r"tokenizer or chat template of m on .* is not that of the run"):
        load_same_renderer(chat.digest(), str(tmp_path / "chat"), policy, config)


def test_digests_tell_everything_that_decides_tokens_apart(tokenizers):
    chatml = tokenizers["chatml"]
    renderers = [
        Renderer(chatml, RenderConfig()),
        Renderer(tokenizers["llama3"], RenderConfig()),
        Renderer(chatml, RenderConfig(), system_prompt="Be brief."),
        Renderer(chatml, RenderConfig(mode="plain")),
        Renderer(chatml, RenderConfig(mode="plain", separator="\n")),
        Renderer(chatml, RenderConfig(max_tokens=100)),
        Renderer(chatml, RenderConfig(template_kwargs={"a": 1})),
        Renderer(chatml, RenderConfig(chat_template=tiny_models.REASONING)),
    ]
    assert len({renderer.digest() for renderer in renderers}) == len(renderers)
    assert renderers[0].vocabulary.digest == renderers[2].vocabulary.digest
    again = Renderer(chatml, RenderConfig())
    chatml("a text", truncation=True, max_length=2)  # leaves state behind in the tokenizer
    after = Renderer(chatml, RenderConfig())
    assert renderers[0].digest() == again.digest() == after.digest()
    assert len(one(after, "Hi", "word " * 9).input_ids) > 9


def test_the_digest_of_a_renderer_holds_its_stop_tokens(tokenizers):
    """Whether the end of response_ids is a turn end depends on them."""
    digests = {Renderer(tokenizers["chatml"], RenderConfig(), stop_ids=stop).digest() for stop in ([], [0], [0, 1])}
    assert len(digests) == 3
