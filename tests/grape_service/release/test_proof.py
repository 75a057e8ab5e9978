"""What a release says of a row's prompt is proven, also where the response begins with tokens without loss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grape_service.config.schema import RenderConfig
from grape_service.release.proof import renders_to
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rendered
from tests import tiny_models

ROW = Candidate([{"role": "user", "content": "2+2?"}], "It is 4.", "p", "c")


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(tiny_models.make_tokenizer(tmp_path_factory.mktemp("model")), RenderConfig())


@pytest.mark.parametrize("num_masked", [0, 1, 3])
def test_the_beginning_of_a_response_may_have_no_loss(renderer: Renderer, num_masked: int) -> None:
    ids = renderer.tokenizer.encode("It is 4.", add_special_tokens=False)
    mask = [0] * num_masked + [1] * (len(ids) - num_masked)
    [row] = renderer.render([replace(ROW, response_ids=ids, response_mask=mask)])
    assert isinstance(row, Rendered)
    prompt, span = row.input_ids[: row.prompt_len], row.input_ids[row.prompt_len :]
    assert renders_to(renderer, ROW, prompt, span)
    as_message = [{"role": "assistant", "content": "It is 4.", "model": "a"}]
    assert renders_to(renderer, replace(ROW, response=as_message), prompt, span)
    assert not renders_to(renderer, replace(ROW, prompt=[{"role": "user", "content": "3+3?"}]), prompt, span)
    assert not renders_to(renderer, ROW, prompt[: -1 - num_masked], span)
    if num_masked:
        assert not renders_to(renderer, replace(ROW, response="That is 4."), prompt, span)


def test_a_sampled_response_may_hold_a_control_token(renderer: Renderer) -> None:
    """As text it is refused; a policy that was cut off wrote it all the same."""
    ids = [*renderer.tokenizer.encode("It is", add_special_tokens=False), 513]
    text = renderer.tokenizer.decode(ids)
    sampled = replace(ROW, response=text, truncated=True)
    [row] = renderer.render([replace(sampled, response_ids=ids)])
    assert isinstance(row, Rendered)
    prompt, span = row.input_ids[: row.prompt_len], row.input_ids[row.prompt_len :]
    assert renders_to(renderer, sampled, prompt, span)
    assert not renders_to(renderer, sampled, prompt[:-1], span)
