"""The release's rendering in training: where a turn ends, and which tokens a prompt is.

The model that is trained has to stop where the template ends a turn, whatever its tokenizer calls the end: a base
model's own end token is one that SFT never taught it to write.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.config.training import OptimizerSettings
from grape_service.errors import UserError
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.candidate import Candidate, Rejection
from workers.training.trainers.session import template_text


def renderer_of(
    folder: str,
    tokenizer: Any,
    settings: OptimizerSettings,
    rendered_with: tuple[str | None, dict[str, Any]],
    note: Callable[[str], None],
) -> Renderer | None:
    """The release's renderer on the tokenizer of a model; None, noted, where it cannot be proven there.

    `rendered_with`: (system prompt, render section of the config), as the release's manifest has them.
    """
    system_prompt, given = rendered_with
    try:
        config = RenderConfig.model_validate({name: given[name] for name in given if name in RenderConfig.model_fields})
        template = template_text(tokenizer.chat_template, config.chat_template, folder)
        config = config.model_copy(update={"chat_template": template})
        policy = PolicyConfig(model=folder, trust_remote_code=settings.trust_remote_code, system_prompt=system_prompt)
        return load_renderer(folder, policy, config)
    except (UserError, ValidationError) as error:
        note(f"where the template ends a turn is not known, so generation stops at the model's own end alone: {error}")
        return None


def stop_at_turn_ends(generation_config: Any, renderer: Renderer | None) -> list[int]:
    """Have generation stop at the template's turn end too; all ids at which it stops, the turn end first.

    The configuration is saved with every checkpoint, so that whoever loads one stops there as well.
    """
    known = generation_config.eos_token_id
    ids = [] if known is None else list(known) if isinstance(known, list | tuple) else [known]
    if renderer is not None:
        turn_end = [] if renderer.turn_end_id is None else [renderer.turn_end_id]
        ids = list(dict.fromkeys([*turn_end, *ids, *sorted(renderer.stop_ids)]))
    generation_config.eos_token_id = ids
    return ids


def prompt_tokens(prompts: list[dict[str, Any]], renderer: Renderer | None) -> tuple[list[list[int]], int]:
    """Token ids of each prompt: the release's own, and for those of a pool what the renderer makes, which these need.

    Also the number of the release's prompts that this model's template renders otherwise. Raises UserError for a
    prompt of a pool that cannot be rendered.
    """
    if renderer is None:
        return [prompt["ids"] for prompt in prompts], 0
    candidates = [
        Candidate(prompt["messages"], _answer(prompt["response"]), "", "", tools=prompt["tools"]) for prompt in prompts
    ]
    ids: list[list[int]] = []
    others = 0
    for prompt, found in zip(prompts, renderer.render(candidates), strict=True):
        rendered = None if isinstance(found, Rejection) else found.input_ids[: found.prompt_len].tolist()
        if prompt["ids"] is not None:
            others += rendered != prompt["ids"]
            ids.append(prompt["ids"])
        elif rendered is not None:
            ids.append(rendered)
        else:
            assert isinstance(found, Rejection)
            raise UserError(f"a prompt of train.rl.prompts cannot be rendered ({found.reason}): {found.detail}")
    return ids, others


def _answer(response: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A response as a pool has it; any will do behind a prompt that has none yet."""
    if not response:
        return "."
    if len(response) == 1 and set(response[0]) == {"role", "content"}:
        return str(response[0]["content"])
    return response
